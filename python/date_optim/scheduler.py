"""What gives a recipe's rates to torch: a scheduler of its own, and a callable for LambdaLR."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, full_like
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .recipe import BatchChange, Recipe
from .schedules import check_count, check_real

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .schedules import ConstantWarmup, Decay

__all__ = ["RecipeFactor", "RecipeScheduler"]

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

    **Changing the batch size.** `set_batch_size` goes on with another one, and the state holds that
    it did. Here, too, the rate is multiplied, so that a chain's other schedulers keep their share;
    in a ``SequentialLR`` call it while it is this scheduler's turn.
    """

    def __init__(self, optimizer: Optimizer, recipe: Recipe, last_epoch: int = -1) -> None:
        self.recipe = recipe
        self._lr_scales = _lr_scales(optimizer)
        for group, scale in zip(optimizer.param_groups, self._lr_scales, strict=True):
            group["initial_lr"] = recipe.peak * scale
        super().__init__(optimizer, last_epoch)

    def set_batch_size(self, batch_size: int, restart_warmup: bool = False) -> None:
        """Go on with another batch size, from the next optimizer step on.

        Call it after `step`, before the first batch of the new size. The samples of the run stay;
        `recipe` becomes ``recipe.then(batch_size, after=last_epoch, ...)``, and ``recipe.lr`` and
        ``recipe.iterations`` those of the run as it now is.

        Parameters
        ----------
        batch_size : int
            Samples per step.
        restart_warmup : bool, default: False
            Multiply the rates of the steps that follow by the warm-up once more.

        Raises
        ------
        TypeError, ValueError
            As `Recipe.then`, after the last step, say; nothing is changed then.
        """
        self._check_groups()
        previous = self.recipe.lr(self.last_epoch + 1)
        self.recipe = self.recipe.then(batch_size, self.last_epoch, restart_warmup)
        rate = self.recipe.lr(self.last_epoch + 1)
        if previous == 0.0:
            self._set_rates(self._get_closed_form_lr())
        elif rate != previous:
            self._set_rates([lr * (rate / previous) for lr in self._rates()])

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
        return [lr * ratio for lr in self._rates()]

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
            **self._identity(self.recipe),
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
            that differs. Nothing is changed then. Changes of the batch size are taken over where
            this scheduler has none, and have to be the same where it has.
        """
        saved = {key: value for key, value in state_dict.items() if key not in _PROGRESS}
        recipe = self.recipe
        if not (recipe.changes or override):
            recipe = recipe.with_changes(_saved_changes(saved))
        differences = _differences(saved, self._identity(recipe))
        if differences and not override:
            raise ValueError(
                f"the state was saved with another recipe ({differences}): make the scheduler from "
                "the recipe that was saved, or go on with this one by override=True"
            )
        self.recipe = recipe
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict["_step_count"]
        rates = self._get_closed_form_lr() if differences else state_dict["_last_lr"]
        groups = self.optimizer.param_groups
        self._last_lr = [
            full_like(group["lr"], rate) if isinstance(group["lr"], Tensor) else rate
            for group, rate in zip(groups, rates, strict=True)
        ]
        if differences:
            self._set_rates(rates)

    def _rates(self) -> list[float | Tensor]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def _set_rates(self, rates: Sequence[float | Tensor]) -> None:
        """Give the groups their rates, tensors in place; no device is waited for."""
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(rate, Tensor):
                group["lr"].copy_(rate)
            elif isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = [lr.clone() if isinstance(lr, Tensor) else lr for lr in self._rates()]

    def _identity(self, recipe: Recipe) -> dict[str, float]:
        """Numbers that two schedulers share only if they give the same rates."""
        return _identity(recipe) | {
            f"lr_scale.{index}": scale for index, scale in enumerate(self._lr_scales)
        }

    def _check_groups(self) -> None:
        have, know = len(self.optimizer.param_groups), len(self._lr_scales)
        if have != know:
            raise ValueError(
                f"the optimizer has {have} param groups, but had {know} when this scheduler was "
                "made: after add_param_group make another by recipe.scheduler(optimizer, "
                f"last_epoch={self.last_epoch - 1})"
            )


class RecipeFactor:
    """The rate of a recipe as a fraction of its peak, for torch's ``LambdaLR``.

    Made by `Recipe.factor`, which also checks the rates that ``LambdaLR`` will multiply. It can be
    pickled and copied. ``factor(steps)`` is ``recipe.lr(steps + 1) / recipe.peak`` after `steps`
    optimizer steps: torch's count, as in the notes of `RecipeScheduler`.

    Attributes
    ----------
    identity : dict
        Numbers that identify the recipe. ``LambdaLR`` saves a callable's attributes, and sets them
        where it loads a state; after that of another recipe the next call raises a ValueError.
    """

    # The recipe is no attribute that LambdaLR sees: a weights-only load reads numbers alone.
    __slots__ = ("__dict__", "_recipe")

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self.identity = _identity(recipe)

    def __call__(self, steps: int) -> float:
        """Fraction of the peak, after `steps` optimizer steps, for the next one.

        Raises
        ------
        TypeError, ValueError
            If `steps` is not an integer of at least 0, or a loaded state is of another recipe.
        """
        if differences := _differences(self.identity, _identity(self._recipe)):
            raise ValueError(
                f"LambdaLR loaded a state that was saved with another recipe ({differences}): make "
                "the factor from the recipe that was saved"
            )
        return self._recipe.lr(check_count("steps", steps, least=0) + 1) / self._recipe.peak


def check_rates(optimizer: Optimizer, peak: float) -> None:
    """Raise unless ``LambdaLR`` would multiply a factor by `peak` times each group's lr_scale.

    It multiplies the group's ``initial_lr``, which is its ``lr`` unless another scheduler or a
    loaded state has set it.
    """
    scales = _lr_scales(optimizer)
    for index, (group, scale) in enumerate(zip(optimizer.param_groups, scales, strict=True)):
        key = "initial_lr" if "initial_lr" in group else "lr"
        if group[key] != peak * scale:  # a tensor compares in its own precision
            raise ValueError(
                f"{key} of param group {index} must be recipe.peak * lr_scale = {peak * scale!r}, "
                f"got {group[key]!r}: LambdaLR multiplies it by eta/peak. Build the optimizer with "
                "it, or use recipe.scheduler(optimizer), which sets the rate itself"
            )


def _lr_scales(optimizer: Optimizer) -> list[float]:
    """The groups' multiples of the recipe's rate, checked."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
    return [
        float(check_real(f"lr_scale of param group {index}", group.get("lr_scale", 1.0), zero=True))
        for index, group in enumerate(optimizer.param_groups)
    ]


def _identity(recipe: Recipe) -> dict[str, float]:
    """Numbers that two recipes share only if they give the same rates."""
    base = recipe.baseline
    return {
        "batch_size": recipe.batch_size,
        "baseline_batch_size": base.batch_size,
        "samples": base.samples,
        "epochs": float(base.epochs),
        "iterations": recipe.unchanged.iterations,
        "warmup_iterations": recipe.warmup_iterations,
        "peak": recipe.peak,
        **_curve("warmup", base.warmup),
        **_curve("decay", base.decay),
        **{
            f"change.{index}.{name}": int(number)
            for index, change in enumerate(recipe.changes)
            for name, number in change._asdict().items()
        },
    }


def _saved_changes(saved: dict[str, Any]) -> tuple[BatchChange, ...]:
    """The changes of batch size that `_identity` wrote down."""
    count = sum(key.startswith("change.") for key in saved) // len(BatchChange._fields)
    numbers = [
        [saved.get(f"change.{index}.{name}", 0) for name in BatchChange._fields]
        for index in range(count)
    ]
    return tuple(BatchChange(after, size, bool(restart)) for after, size, restart in numbers)


def _curve(kind: str, curve: str | ConstantWarmup | Decay) -> dict[str, float]:
    """One number for the name of a curve, and one for each of its own.

    Tuples are spread, since JSON gives back a list; None is left out.
    """
    name = f"{kind}.{curve if isinstance(curve, str) else type(curve).__name__}"
    numbers: dict[str, float] = {name: 1}
    for field, value in ({} if isinstance(curve, str) else vars(curve)).items():
        if isinstance(value, tuple):
            numbers |= {f"{name}.{field}.{j}": float(item) for j, item in enumerate(value)}
        elif value is not None:
            numbers[f"{name}.{field}"] = float(value)
    return numbers


def _differences(saved: dict[str, Any], own: dict[str, float]) -> str:
    """Name each number that differs."""
    return "; ".join(
        f"{key}: saved {saved.get(key, 'nothing')}, here {own.get(key, 'nothing')}"
        for key in own | saved
        if saved.get(key) != own.get(key)
    )
