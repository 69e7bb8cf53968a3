"""The learning-rate curves: what a warm-up and a decay are, as numbers alone.

Everything here is a pure function of a real iteration ``i``, the real length ``W`` of the warm-up
and the real length ``I`` of the run. No unit is assumed: epochs serve as well as iterations, as
long as all three agree. What a decay itself holds (boundaries, periods) is in epochs, which no
batch size changes; a call in another unit says how long an epoch is.

`date_optim.recipe.Recipe` makes these numbers from a baseline.

A new decay is one frozen dataclass derived from `Decay`, its fields numbers or tuples of numbers.
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from numbers import Integral, Real

__all__ = [
    "WARMUPS",
    "Constant",
    "ConstantWarmup",
    "Cosine",
    "Cyclical",
    "Decay",
    "Exponential",
    "MultiStep",
    "Polynomial",
    "RollerCoaster",
    "cosine_warmup",
    "linear_warmup",
    "quadratic_warmup",
]


def check_count(name: str, value: object, *, least: int = 1) -> int:
    """Return `value` as an int of at least `least`, or raise an error that names the argument."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return int(value)


def check_real(name: str, value: object, *, zero: bool = False) -> float | Fraction:
    """Return `value` as a finite number above 0 (or at least 0, with `zero`), or raise."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    number = value if isinstance(value, int | Fraction) else float(value)
    if not (math.isfinite(number) and (number > 0 or (zero and number == 0))):
        allowed = "at least 0" if zero else "above 0"
        raise ValueError(f"{name} must be finite and {allowed}, got {value!r}")
    return number


def check_share(name: str, value: object) -> float | Fraction:
    """Return `value` as a number above 0 and at most 1, or raise an error that names it."""
    number = check_real(name, value)
    if number > 1:
        raise ValueError(f"{name} must be at most 1, got {value!r}")
    return number


def check_flag(name: str, value: object) -> None:
    """Raise an error that names the argument unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(
            f"{name} must be True or False, got {value!r} of type {type(value).__name__}"
        )


def linear_warmup(i: float, W: float) -> float:
    """Fraction of the peak at iteration `i` of a warm-up of length `W`: ``i/W`` (LEGW).

    Parameters
    ----------
    i : float
        Iteration, ``0 <= i <= W``.
    W : float
        Length of the warm-up, above 0, in the unit of `i`.
    """
    return i / W


def quadratic_warmup(i: float, W: float) -> float:
    """Fraction of the peak at iteration `i` of a warm-up of length `W`: ``(i/W)**2`` (LEGW).

    Parameters
    ----------
    i : float
        Iteration, ``0 <= i <= W``.
    W : float
        Length of the warm-up, above 0, in the unit of `i`.
    """
    return (i / W) ** 2


def cosine_warmup(i: float, W: float) -> float:
    """Fraction of the peak at iteration `i` of a warm-up of length `W`: ``(1-cos(pi*i/W))/2``.

    It is computed as ``sin(pi/2 * i/W)**2``, which keeps its digits where the cosine is near 1, and
    is 0 and 1 at the ends. Half a wave that rises; read backwards it is the decay `Cosine`.

    Parameters
    ----------
    i : float
        Iteration, ``0 <= i <= W``.
    W : float
        Length of the warm-up, above 0, in the unit of `i`.
    """
    return math.sin(math.pi / 2 * (i / W)) ** 2


@dataclass(frozen=True)
class ConstantWarmup:
    """One fraction of the peak for the whole warm-up, then a jump to the peak.

    Parameters
    ----------
    fraction : float, default: 0.1
        Fraction of the peak, above 0 and at most 1. The default is the ResNet of He et al. (2016)
        on CIFAR-10: .01 before .1. Goyal et al. (2017) warm a peak that was scaled by k up at the
        rate of the baseline, a fraction of ``1/k``.

    Raises
    ------
    TypeError, ValueError
        If `fraction` is of another type or out of its range.
    """

    fraction: float = 0.1

    def __post_init__(self) -> None:
        check_share("fraction", self.fraction)

    def __call__(self, i: float, W: float) -> float:
        """Fraction of the peak at iteration `i` of a warm-up of length `W`."""
        return self.fraction


WARMUPS: dict[str, Callable[[float, float], float]] = {
    "constant": ConstantWarmup(),
    "linear": linear_warmup,
    "quadratic": quadratic_warmup,
    "cosine": cosine_warmup,
}
"""The warm-ups by the name that `Recipe` knows them by."""


class Decay(ABC):
    """A curve from the peak at ``i = W`` to the end of the run at ``i = I``."""

    @abstractmethod
    def __call__(
        self,
        i: float,
        W: float,
        I: float,  # noqa: E741
        peak: float = 1.0,
        epoch: float = 1.0,
    ) -> float:
        """Learning rate at iteration `i`.

        Parameters
        ----------
        i : float
            Iteration, ``W <= i <= I``.
        W : float
            Where the decay starts, in the unit of `i`.
        I : float
            Length of the run, above `W`, in the unit of `i`.
        peak : float, default: 1.0
            Learning rate at the end of the warm-up.
        epoch : float, default: 1.0
            Length of an epoch, in the unit of `i`.
        """


@dataclass(frozen=True)
class Polynomial(Decay):
    """``max(peak * ((I-i)/(I-W))**power, floor)`` (LEGW).

    Parameters
    ----------
    power : float
        Exponent, above 0; LEGW uses 2, .5 and 1.
    shifted : bool, default: True
        Measure the decay from the end of the warm-up, so that it starts at the peak. False is the
        global form ``peak * (1-i/I)**power`` that LEGW prints, which jumps where it starts.
    floor : float, default: 0.0
        Lowest learning rate, at least 0.

    Raises
    ------
    TypeError, ValueError
        If an argument is of another type or out of its range.
    """

    power: float
    shifted: bool = True
    floor: float = 0.0

    def __post_init__(self) -> None:
        check_real("power", self.power)
        check_flag("shifted", self.shifted)
        check_real("floor", self.floor, zero=True)

    def __call__(
        self,
        i: float,
        W: float,
        I: float,  # noqa: E741
        peak: float = 1.0,
        epoch: float = 1.0,
    ) -> float:
        """Learning rate at iteration `i`, as in `Decay`."""
        start = W if self.shifted else 0.0
        return max(peak * math.pow((I - i) / (I - start), self.power), self.floor)


@dataclass(frozen=True)
class RollerCoaster(Polynomial):
    """``max(peak * (I-i)/(I-W), floor)``, the decay of DATE (section 3.4, Algorithm 1 line 8).

    It is the shifted polynomial of power 1 with a floor. DATE writes its denominator as
    ``(1 - w/E) * I``, with the warm-up and the run in epochs; that is ``I - W`` for
    ``W = I * w/E``, which is what `Recipe` passes.

    Parameters
    ----------
    floor : float, default: 1e-6
        Lowest learning rate, at least 0.
    paper_printed : bool, default: False
        Make `Recipe` pass the w of the baseline, not of the scaled batch, as the example printed in
        DATE section 3.6 does. The rate then jumps at the end of the warm-up (there, to a half): for
        fidelity only.
    """

    power: float = field(default=1.0, init=False, repr=False)
    shifted: bool = field(default=True, init=False, repr=False)
    floor: float = 1e-6
    paper_printed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("paper_printed", self.paper_printed)


@dataclass(frozen=True)
class Constant(Decay):
    """``peak`` until the end (LEGW, MNIST-LSTM)."""

    def __call__(
        self,
        i: float,
        W: float,
        I: float,  # noqa: E741
        peak: float = 1.0,
        epoch: float = 1.0,
    ) -> float:
        """Return `peak`, at every iteration."""
        return peak


@dataclass(frozen=True)
class MultiStep(Decay):
    """``peak * gamma**(boundaries passed)`` (LEGW, DATE).

    Parameters
    ----------
    boundaries : sequence of float
        Where the rate falls, in epochs from the start of the run, above 0 and increasing. One
        within the warm-up has been passed when the warm-up ends.
    gamma : float, default: 0.1
        Factor of each fall, above 0 and at most 1.
    inclusive : bool, default: True
        A boundary e has been passed at epoch ``E >= e`` (LEGW); if False, at ``E > e`` (DATE 3.6).

    Raises
    ------
    TypeError, ValueError
        If an argument is of another type or out of its range.
    """

    boundaries: Sequence[float]
    gamma: float = 0.1
    inclusive: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.boundaries, list | tuple):
            raise TypeError(
                f"boundaries must be a list or tuple of numbers, got {self.boundaries!r}"
            )
        boundaries = tuple(
            float(check_real(f"boundaries[{index}]", boundary))
            for index, boundary in enumerate(self.boundaries)
        )
        if not boundaries or list(boundaries) != sorted(set(boundaries)):
            raise ValueError(
                f"boundaries must be one number or more that increase, got {self.boundaries!r}"
            )
        object.__setattr__(self, "boundaries", boundaries)
        check_share("gamma", self.gamma)
        check_flag("inclusive", self.inclusive)

    def __call__(
        self,
        i: float,
        W: float,
        I: float,  # noqa: E741
        peak: float = 1.0,
        epoch: float = 1.0,
    ) -> float:
        """Learning rate at iteration `i`, as in `Decay`."""
        passed = (bisect_right if self.inclusive else bisect_left)(self.boundaries, i / epoch)
        return peak * self.gamma**passed


@dataclass(frozen=True)
class Exponential(Decay):
    """``peak * gamma**max(ceil(E) - hold, 0)`` at epoch E (LEGW, PTB).

    The rate falls once an epoch; ``ceil(E)`` is the number of the epoch, counted from 1, to which
    the step that completes it still belongs.

    Parameters
    ----------
    gamma : float
        Factor per epoch, above 0 and at most 1; LEGW's PTB-small has .4.
    hold : int, default: 0
        Epochs at the peak, from the start of the run, at least 0; LEGW's PTB-small has 7. With 0
        the first epoch is at ``peak * gamma`` already.

    Raises
    ------
    TypeError, ValueError
        If an argument is of another type or out of its range.
    """

    gamma: float
    hold: int = 0

    def __post_init__(self) -> None:
        check_share("gamma", self.gamma)
        check_count("hold", self.hold, least=0)

    def __call__(
        self,
        i: float,
        W: float,
        I: float,  # noqa: E741
        peak: float = 1.0,
        epoch: float = 1.0,
    ) -> float:
        """Learning rate at iteration `i`, as in `Decay`."""
        return peak * self.gamma ** max(math.ceil(i / epoch) - self.hold, 0)


@dataclass(frozen=True)
class Cosine(Decay):
    """``peak * (1 + cos(pi*s/T))/2``, `s` after the start of a wave of length `T` (LIMIT).

    Without `period` one wave falls from the peak to 0 at the end of the run. With it each wave
    starts at the peak again (the restarts of Loshchilov and Hutter 2017).

    Parameters
    ----------
    period : float, optional
        Length T of a wave in epochs, above 0. The first one starts where the warm-up ends; the run
        may end within one.

    Raises
    ------
    TypeError, ValueError
        If `period` is of another type or out of its range.
    """

    period: float | None = None

    def __post_init__(self) -> None:
        if self.period is not None:
            check_real("period", self.period)

    def __call__(
        self,
        i: float,
        W: float,
        I: float,  # noqa: E741
        peak: float = 1.0,
        epoch: float = 1.0,
    ) -> float:
        """Learning rate at iteration `i`, as in `Decay`."""
        if self.period is None:
            return peak * cosine_warmup(I - i, I - W)
        period = float(self.period) * epoch
        return peak * cosine_warmup(period - (i - W) % period, period)


@dataclass(frozen=True)
class Cyclical(Decay):
    """Straight lines between ``base * peak`` and the peak, up and down (Smith 2017, triangular).

    Parameters
    ----------
    base : float
        Lowest rate as a fraction of the peak, above 0 and at most 1, so that it scales with it.
    half_period : float
        Length of a rise, and of a fall, in epochs, above 0.
    from_peak : bool, default: False
        Start with a fall from the peak, which goes on where a warm-up ends. Smith's cycle starts
        with a rise from its base: it takes the place of a warm-up, and drops after one.

    Raises
    ------
    TypeError, ValueError
        If an argument is of another type or out of its range.
    """

    base: float
    half_period: float
    from_peak: bool = False

    def __post_init__(self) -> None:
        # A base of 0 would end every cycle at a rate by which no scheduler can multiply itself on.
        check_share("base", self.base)
        check_real("half_period", self.half_period)
        check_flag("from_peak", self.from_peak)

    def __call__(
        self,
        i: float,
        W: float,
        I: float,  # noqa: E741
        peak: float = 1.0,
        epoch: float = 1.0,
    ) -> float:
        """Learning rate at iteration `i`, as in `Decay`."""
        half = float(self.half_period) * epoch
        height = abs((i - W) % (2 * half) / half - 1)
        if not self.from_peak:
            height = 1 - height
        return peak * (height + self.base * (1 - height))
