"""A tuned baseline, scaled to any batch size: LEGW's warm-up and peak, then a decay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

from .schedules import (
    WARMUPS,
    ConstantWarmup,
    Decay,
    RollerCoaster,
    check_count,
    check_flag,
    check_real,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from torch.optim import Optimizer

    from .scheduler import RecipeFactor, RecipeScheduler

__all__ = ["Baseline", "BatchChange", "Recipe"]

SCALINGS: dict[str, Callable[[Fraction], float]] = {"sqrt": math.sqrt, "linear": float}
"""How the peak grows with the ratio of the batch sizes."""

DEFAULT_DECAY = RollerCoaster()


@dataclass(frozen=True)
class Baseline:
    """What was tuned: the arguments of `Recipe`, checked."""

    batch_size: int
    lr: float
    warmup_epochs: float | Fraction
    epochs: float | Fraction
    samples: int
    iterations: int | None
    scaling: str
    warmup: str | ConstantWarmup
    decay: Decay


class BatchChange(NamedTuple):
    """Another batch size from the step that follows step `after` on; made by `Recipe.then`."""

    after: int
    batch_size: int
    restart_warmup: bool


@dataclass(frozen=True, init=False)
class Recipe:
    r"""The learning rates of a whole run, derived from a tuned baseline.

    With ``k = batch_size / baseline batch size``, LEGW (You et al. 2019) scales the peak by
    ``sqrt(k)`` and the warm-up *epochs* by ``k``, so that the warm-up takes the same number of
    iterations at every batch size. A recipe starts at its baseline; `at` scales it.

    A run is exactly `iterations` steps of full batches from an unbroken, reshuffled stream of
    samples; an epoch is `samples` samples, not a pass of a loader that drops or pads its last
    batch.

    Parameters
    ----------
    batch_size : int
        Samples per step of the baseline.
    lr : float
        Peak learning rate of the baseline.
    warmup_epochs : float or Fraction
        Length of the baseline's warm-up in epochs, at least 0.
    epochs : float or Fraction
        Length of the run in epochs, warm-up included.
    samples : int
        Samples per epoch.
    iterations : int, optional
        Steps of the baseline's run where they are known; else ``epochs * samples / batch_size``.
    scaling : {"sqrt", "linear"}, default: "sqrt"
        ``peak = lr * sqrt(k)`` or ``lr * k``.
    warmup : {"linear", "quadratic", "cosine", "constant"} or ConstantWarmup, default: "linear"
        The rate in iterations ``i < W``: ``peak * i/W``, its square, half a cosine wave, or one
        fraction of the peak, .1 by name.
    decay : Decay, default: RollerCoaster()
        What follows the warm-up. Its boundaries and periods are in epochs: `at` leaves them where
        they are, and changes how many iterations they take. Of its rates only a floor is absolute.

    Attributes
    ----------
    baseline : Baseline
        The arguments above.
    batch_size : int
        Samples per step of this run; the first ones where `then` changes it.
    changes : tuple of BatchChange
        What `then` was given.

    Raises
    ------
    TypeError, ValueError
        If an argument is of another type or out of its range, or if the warm-up fills the run.

    Notes
    -----
    The number of iterations is computed in rational arithmetic. A float stands for the decimal
    number it prints as: ``epochs=0.1`` is one tenth, and not the binary number slightly above it,
    which would make 101 steps of 1,000 samples in batches of one. Where that is not exact enough (a
    third of an epoch), give a `fractions.Fraction`.

    Examples
    --------
    DATE's LeNet on MNIST, tuned at batch 1,024 and run at 8,192:

    >>> recipe = Recipe(
    ...     batch_size=1024, lr=1.25e-3, warmup_epochs=2, epochs=30, samples=60_000, iterations=1755
    ... ).at(batch_size=8192)
    >>> recipe.iterations, recipe.warmup_iterations, recipe.warmup_epochs
    (220, 117.1875, 16.0)
    >>> [round(recipe.lr(i), 9) for i in (1, 117, 118, 220)]
    [3.017e-05, 0.003529877, 0.003512576, 1e-06]

    Note [Changes of the batch size]. A run that was made for some samples takes just those, in
    steps of any size (`then`). Progress on the decay is counted in samples, on the curve of the
    first batch size, which ends where it did; the warm-up takes the same number of iterations at
    every batch size (LEGW), and so its progress is counted in iterations: what a change leaves of
    it takes as many steps as before. Where the decay starts follows from that. So the rate is
    continuous in both, but for the peak, which jumps by the root of the batch sizes' ratio (or by
    the ratio itself); a decay's floor, which is absolute, does not. Back at its size a run that
    left it after the warm-up is on its curve again: a decay knows of samples alone.
    """

    baseline: Baseline
    batch_size: int
    changes: tuple[BatchChange, ...] = ()

    def __init__(
        self,
        batch_size: int,
        lr: float,
        warmup_epochs: float | Fraction,
        epochs: float | Fraction,
        samples: int,
        iterations: int | None = None,
        scaling: Literal["sqrt", "linear"] = "sqrt",
        warmup: Literal["linear", "quadratic", "cosine", "constant"] | ConstantWarmup = "linear",
        decay: Decay = DEFAULT_DECAY,
    ) -> None:
        if not isinstance(decay, Decay):
            raise TypeError(f"decay must be a Decay such as RollerCoaster(), got {decay!r}")
        baseline = Baseline(
            batch_size=check_count("batch_size", batch_size),
            lr=float(check_real("lr", lr)),
            warmup_epochs=check_real("warmup_epochs", warmup_epochs, zero=True),
            epochs=check_real("epochs", epochs),
            samples=check_count("samples", samples),
            iterations=None if iterations is None else check_count("iterations", iterations),
            scaling=_choice("scaling", scaling, SCALINGS),
            warmup=_warmup(warmup),
            decay=decay,
        )
        self._fix(baseline, baseline.batch_size, allow_warmup_only=False)

    def at(self, batch_size: int, allow_warmup_only: bool = False) -> Recipe:
        """Scale the baseline to another batch size, larger or smaller.

        Parameters
        ----------
        batch_size : int
            Samples per step. It is always the baseline that is scaled, so that
            ``recipe.at(a).at(b) == recipe.at(b)``, and without the changes of `then`.
        allow_warmup_only : bool, default: False
            Accept a warm-up that fills the whole run.

        Raises
        ------
        ValueError
            If the warm-up fills the whole run; the message names the largest batch that fits.
        """
        check_flag("allow_warmup_only", allow_warmup_only)
        recipe = object.__new__(Recipe)
        recipe._fix(self.baseline, check_count("batch_size", batch_size), allow_warmup_only)
        return recipe

    def then(self, batch_size: int, after: int, restart_warmup: bool = False) -> Recipe:
        """Go on with another batch size after step `after`: Note [Changes of the batch size].

        Parameters
        ----------
        batch_size : int
            Samples per step from step ``after + 1`` on.
        after : int
            Steps that come before, of the batch sizes so far: at least 0, less than `iterations`.
            A change after the same step gives way to this one; none may come later.
        restart_warmup : bool, default: False
            Multiply the rates of the steps that follow by the warm-up once more.

        Raises
        ------
        TypeError, ValueError
            If an argument is of another type or out of its range, or if the warm-up then fills what
            is left of the run.
        """
        batch_size = check_count("batch_size", batch_size)
        after = check_count("after", after, least=0)
        check_flag("restart_warmup", restart_warmup)
        if after >= self.iterations:
            raise ValueError(
                f"the run ends after {self.iterations} steps: its batch size cannot change after "
                f"step {after}"
            )
        if self.changes and after < self.changes[-1].after:
            raise ValueError(
                f"the batch size changes after step {self.changes[-1].after} already: it cannot "
                f"change after step {after}; give changes in their order"
            )
        changes = tuple(change for change in self.changes if change.after < after)
        before = changes[-1].batch_size if changes else self.batch_size
        if batch_size != before or restart_warmup:
            changes += (BatchChange(after, batch_size, restart_warmup),)
        recipe = self.with_changes(changes)
        begin, W = recipe._warmup_begins[-1], self.warmup_iterations
        fits = self._warmup_begins[-1] + W < self.iterations
        if fits and begin + W >= recipe.iterations:
            raise ValueError(
                f"the warm-up fills the rest of the run at batch_size {batch_size} after step "
                f"{after}: it takes {begin + W - after:g} more of {recipe.iterations - after} "
                "iterations; take a smaller batch, or change it later"
            )
        return recipe

    def with_changes(self, changes: tuple[BatchChange, ...]) -> Recipe:
        """The same run with these changes, unchecked; `then` makes one."""
        recipe = object.__new__(Recipe)
        for name, value in (
            ("baseline", self.baseline),
            ("batch_size", self.batch_size),
            ("changes", changes),
        ):
            object.__setattr__(recipe, name, value)
        return recipe

    def samples_after(self, i: int) -> int:
        """Samples that the first `i` steps take, each by its own batch size.

        Raises
        ------
        TypeError, ValueError
            If `i` is not an integer of at least 0.
        """
        return int(self._samples(check_count("i", i, least=0)))

    def lr(self, i: int) -> float:
        """Learning rate of optimizer step `i`, counted from 1 as in DATE's Algorithm 1.

        Never above the peak of the step's batch size. After the run's last iteration it stays as it
        is there.

        Raises
        ------
        TypeError, ValueError
            If `i` is not an integer of at least 1.
        """
        i = min(check_count("i", i), self.iterations)
        base, W = self.baseline, self.warmup_iterations
        peak = self._peak_at(i)
        warmed = i - max(begin for begin in self._warmup_begins if begin < i)
        fraction = 1.0
        if warmed < W:
            warmup = WARMUPS[base.warmup] if isinstance(base.warmup, str) else base.warmup
            fraction = warmup(warmed, W)
        # In samples, which are integers: no rounding moves a boundary or blurs what is left of I.
        start, end = self._decay_start, self._end
        warm = float(self._warmup_end)
        if i < warm or max(start, self._samples(warm)) >= end:
            return fraction * peak  # or nothing is left to decay in
        sample = min(self.samples_after(i), end)
        # A decay is asked from its start on alone, and exceeds the peak where its floor does.
        return fraction * min(
            peak, base.decay(sample, min(start, sample), end, peak, epoch=base.samples)
        )

    def scheduler(self, optimizer: Optimizer, last_epoch: int = -1) -> RecipeScheduler:
        """Make a torch learning-rate scheduler that owns the rate of `optimizer`.

        Parameters
        ----------
        optimizer : torch.optim.Optimizer
            A param group with a key ``lr_scale`` gets that multiple of the rate.
        last_epoch : int, default: -1
            As in torch: optimizer steps already taken, minus 1.

        See Also
        --------
        date_optim.scheduler.RecipeScheduler
        """
        # A recipe is numbers alone (tests/test_layering.py); only a scheduler of it needs torch.
        from .scheduler import RecipeScheduler  # noqa: PLC0415

        return RecipeScheduler(optimizer, self, last_epoch)

    def factor(self, optimizer: Optimizer) -> RecipeFactor:
        """Make a callable for torch's ``LambdaLR``, which multiplies it by the groups' own rates.

        It gives ``eta/peak``, above 1 at a larger batch size of `then`; one serves all groups. What
        it gives is fixed: `RecipeScheduler.set_batch_size` has no counterpart here. `scheduler`
        needs no such rates, and is what to take where ``LambdaLR`` itself is not asked for.

        Parameters
        ----------
        optimizer : torch.optim.Optimizer
            Built with ``lr=recipe.peak``; with `peak` times ``lr_scale`` in a param group that has
            this key.

        Raises
        ------
        TypeError, ValueError
            If `optimizer` is none, a group's ``lr_scale`` is not a finite number of at least 0, or
            its rate is another.

        See Also
        --------
        date_optim.scheduler.RecipeFactor
        """
        from .scheduler import RecipeFactor, check_rates  # noqa: PLC0415 (as above)

        check_rates(optimizer, self.peak)
        return RecipeFactor(self)

    @cached_property
    def peak(self) -> float:
        """Highest learning rate at `batch_size`, reached at the end of the warm-up."""
        return self._peak_of(self.batch_size)

    @cached_property
    def iterations(self) -> int:
        """Optimizer steps of the run: ``I = ceil(B0 * I0 / B)``, and what changes make of it."""
        first = BatchChange(0, self.batch_size, restart_warmup=False)
        after, batch_size, _ = (first, *self.changes)[-1]
        return after + math.ceil(Fraction(self._end - self.samples_after(after), batch_size))

    @cached_property
    def warmup_iterations(self) -> float:
        """Length of the warm-up in optimizer steps, the same at every batch size; not rounded."""
        return float(self._exact_warmup_iterations)

    @cached_property
    def warmup_epochs(self) -> float:
        """Length of the warm-up in epochs."""
        return float(_exact(self.baseline.warmup_epochs) * self._batch_ratio)

    @property
    def unchanged(self) -> Recipe:
        """The run without its `changes`."""
        return self.with_changes(())

    @property
    def _batch_ratio(self) -> Fraction:
        """The papers' k."""
        return Fraction(self.batch_size, self.baseline.batch_size)

    @property
    def _exact_warmup_iterations(self) -> Fraction:
        """The papers' W."""
        base = self.baseline
        return _exact(base.warmup_epochs) * base.samples / base.batch_size

    @property
    def _baseline_iterations(self) -> Fraction:
        """The papers' I0, not rounded."""
        base = self.baseline
        if base.iterations is not None:
            return Fraction(base.iterations)
        return _exact(base.epochs) * base.samples / base.batch_size

    @cached_property
    def _end(self) -> int:
        """Samples of the run, in full batches of the first size."""
        return math.ceil(self._baseline_iterations / self._batch_ratio) * self.batch_size

    @cached_property
    def _warmup_begins(self) -> list[int]:
        """The steps after which a warm-up begins."""
        return [0, *(change.after for change in self.changes if change.restart_warmup)]

    @cached_property
    def _warmup_end(self) -> Fraction:
        """The end of the first warm-up that is not cut short by another, in iterations."""
        ends = [begin + self._exact_warmup_iterations for begin in self._warmup_begins]
        following: list[int | Fraction] = [*self._warmup_begins[1:], ends[-1]]
        return next(end for end, begin in zip(ends, following, strict=True) if end <= begin)

    @cached_property
    def _decay_start(self) -> float:
        """Where the decay takes the warm-up to end: ``I * w/E`` (DATE, Algorithm 1), in samples.

        It differs from the end of the warm-up by the rounding of I alone.
        """
        base = self.baseline
        printed = isinstance(base.decay, RollerCoaster) and base.decay.paper_printed
        warmup = _exact(base.warmup_epochs)
        if not printed:
            warmup = _exact(self._samples(self._warmup_end)) / base.samples
        return float(self._end * (warmup / _exact(base.epochs)))

    @cached_property
    def _largest_batch(self) -> float:
        """The largest batch whose warm-up ends before the run, in epochs and in iterations."""
        base = self.baseline
        if base.warmup_epochs == 0:
            return math.inf
        bounds = [base.batch_size * _exact(base.epochs) / _exact(base.warmup_epochs)]
        # The iterations of a batch B are a ceiling: it exceeds W where B0*I0/B exceeds floor(W).
        if whole := math.floor(self._exact_warmup_iterations):
            bounds.append(base.batch_size * self._baseline_iterations / whole)
        return math.ceil(min(bounds)) - 1

    def _samples(self, i: float | Fraction) -> float | Fraction:
        """Samples up to a real iteration."""
        samples = 0
        begin, batch_size = 0, self.batch_size
        for change in self.changes:
            if i <= change.after:
                break
            samples += (change.after - begin) * batch_size
            begin, batch_size = change.after, change.batch_size
        return samples + (i - begin) * batch_size

    def _peak_at(self, i: int) -> float:
        """The peak at the batch size of step `i`."""
        passed = [change.batch_size for change in self.changes if change.after < i]
        return self._peak_of(passed[-1]) if passed else self.peak

    def _peak_of(self, batch_size: int) -> float:
        base = self.baseline
        return base.lr * SCALINGS[base.scaling](Fraction(batch_size, base.batch_size))

    def _fix(self, baseline: Baseline, batch_size: int, allow_warmup_only: bool) -> None:
        """Set the fields, as `__init__` of a frozen dataclass does, and check the warm-up."""
        object.__setattr__(self, "baseline", baseline)
        object.__setattr__(self, "batch_size", batch_size)
        object.__setattr__(self, "changes", ())
        if batch_size > self._largest_batch and not allow_warmup_only:
            largest = self._largest_batch
            remedy = f"the largest batch that fits is {largest}" if largest else "no batch fits"
            raise ValueError(
                f"the warm-up fills the whole run at batch_size {batch_size}: it takes "
                f"{self.warmup_epochs:g} of {float(baseline.epochs):g} epochs, "
                f"{self.warmup_iterations:g} of {self.iterations} iterations; {remedy}. Take a "
                "smaller batch or fewer warmup_epochs, or run it by at(..., allow_warmup_only=True)"
            )


def _exact(number: float | Fraction) -> Fraction:
    """Read a float as the decimal number that it prints as."""
    return number if isinstance(number, Fraction) else Fraction(str(number))


def _warmup(value: object) -> str | ConstantWarmup:
    """Check a warm-up; the constant one becomes the object, so that equal recipes are equal."""
    if isinstance(value, ConstantWarmup):
        return value
    name = _choice("warmup", value, WARMUPS)
    return ConstantWarmup() if name == "constant" else name


def _choice(name: str, value: object, choices: Collection[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value
