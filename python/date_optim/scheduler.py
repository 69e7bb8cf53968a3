"""The torch scheduler of a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, full_like
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .schedules import check_real

if TYPE_CHECKING:
    from .recipe import Recipe

__all__ = ["RecipeScheduler"]

_PROGRESS = {"last_epoch", "_step_count", "_last_lr"}
"""The keys of a state, named as torch names them, that say how far the run is."""


class RecipeScheduler(LRScheduler):
    r"""Give an optimizer the learning rates of a recipe; made by `Recipe.scheduler`.

    Call `step` once after each optimizer step, as with any scheduler of torch. The rate of a param
    group is ``recipe.lr(i)``, floor included, times the group's ``lr_scale`` (default 1); the
    learning rate that the optimizer was built with does not matter. After the last iteration of the
    recipe the rate stays.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        All its groups must be there. A group's ``lr`` may be a tensor; it is filled in place.
    recipe : Recipe
        The schedule, at the batch size of the run.
    last_epoch : int, default: -1
        As in torch: optimizer steps already taken, minus 1.

    Raises
    ------
    TypeError, ValueError
        If `optimizer` is none, or a group's ``lr_scale`` is not a finite number of at least 0.

    Notes
    -----
    **Counting.** torch counts from 0: ``last_epoch`` is the number of steps taken, and the next
    optimizer step uses ``recipe.lr(last_epoch + 1)``; the first one ``recipe.lr(1)``.

    **Chaining.** A step multiplies the group's rate by ``eta(i) / eta(i - 1)``, so that the
    schedulers of a ``ChainedScheduler`` multiply up in any order; ``SequentialLR`` works too. To
    make this scheduler sets the rate outright: make it before one that scales the rate at its own
    start, such as ``ConstantLR``.

    **Resuming.** As with every scheduler of torch the rate itself is restored with the optimizer's
    state: load both, after this scheduler was made. The run then continues bit for bit.
    """

    def __init__(self, optimizer: Optimizer, recipe: Recipe, last_epoch: int = -1) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
        self.recipe = recipe
        self._lr_scales = [
            float(
                check_real(
                    f"lr_scale of param group {index}", group.get("lr_scale", 1.0), zero=True
                )
            )
            for index, group in enumerate(optimizer.param_groups)
        ]
        for group, scale in zip(optimizer.param_groups, self._lr_scales, strict=True):
            group["initial_lr"] = recipe.peak * scale
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Rates of the groups for the next optimizer step, from their present ones.

        Raises
        ------
        ValueError
            If a param group was added since the scheduler was made.
        """
        if self._is_initial:
            return self._get_closed_form_lr()
        previous = self.recipe.lr(self.last_epoch)
        if previous == 0.0:
            return self._get_closed_form_lr()
        self._check_groups()
        ratio = self.recipe.lr(self.last_epoch + 1) / previous
        return [group["lr"] * ratio for group in self.optimizer.param_groups]

    def _get_closed_form_lr(self) -> list[float | Tensor]:
        """Rates of the groups from the recipe alone; torch calls it where it jumps to a step."""
        self._check_groups()
        rate = self.recipe.lr(self.last_epoch + 1)
        return [rate * scale for scale in self._lr_scales]

    def state_dict(self) -> dict[str, Any]:
        """Progress, and the numbers that identify the recipe; JSON holds all of it.

        Where a group's ``lr`` is a tensor its last rate is taken from the recipe, so that no device
        is waited for.
        """
        last_lr = [
            own if isinstance(lr, Tensor) else lr
            for lr, own in zip(self._last_lr, self._get_closed_form_lr(), strict=True)
        ]
        return {
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "_last_lr": last_lr,
            **self._identity(),
        }

    def load_state_dict(self, state_dict: dict[str, Any], override: bool = False) -> None:
        """Continue from a saved state.

        Parameters
        ----------
        state_dict : dict
            What `state_dict` returned.
        override : bool, default: False
            Continue with this recipe at the saved step although another recipe was saved. The
            groups' rates are set to this recipe's at once: load the optimizer's state before.

        Raises
        ------
        ValueError
            If the state was saved with another recipe, batch size or lr_scale; it names each number
            that differs. Nothing is changed then.
        """
        own = self._identity()
        saved = {key: value for key, value in state_dict.items() if key not in _PROGRESS}
        differences = [
            f"{key}: saved {saved.get(key, 'nothing')}, here {own.get(key, 'nothing')}"
            for key in own | saved
            if saved.get(key) != own.get(key)
        ]
        if differences and not override:
            raise ValueError(
                f"the state was saved with another recipe ({'; '.join(differences)}): make the "
                "scheduler from the recipe that was saved, or go on with this one by override=True"
            )
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict["_step_count"]
        rates = self._get_closed_form_lr() if differences else state_dict["_last_lr"]
        groups = self.optimizer.param_groups
        self._last_lr = [
            full_like(group["lr"], rate) if isinstance(group["lr"], Tensor) else rate
            for group, rate in zip(groups, rates, strict=True)
        ]
        if differences:
            for group, rate in zip(groups, rates, strict=True):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    def _identity(self) -> dict[str, float]:
        """Numbers that two schedulers share only if they give the same rates."""
        recipe = self.recipe
        base = recipe.baseline
        decay = f"decay.{type(base.decay).__name__}"
        return {
            "batch_size": recipe.batch_size,
            "baseline_batch_size": base.batch_size,
            "samples": base.samples,
            "epochs": float(base.epochs),
            "iterations": recipe.iterations,
            "warmup_iterations": recipe.warmup_iterations,
            "peak": recipe.peak,
            f"warmup.{base.warmup}": 1,
            decay: 1,
            **{f"{decay}.{field}": value for field, value in vars(base.decay).items()},
            **{f"lr_scale.{index}": scale for index, scale in enumerate(self._lr_scales)},
        }

    def _check_groups(self) -> None:
        have, know = len(self.optimizer.param_groups), len(self._lr_scales)
        if have != know:
            raise ValueError(
                f"the optimizer has {have} param groups, but had {know} when this scheduler was "
                "made: after add_param_group make another by recipe.scheduler(optimizer, "
                f"last_epoch={self.last_epoch - 1})"
            )
