"""The learning-rate curves: what a warm-up and a decay are, as numbers alone.

Everything here is a pure function of a real iteration ``i``, the real length ``W`` of the warm-up
and the real length ``I`` of the run. No unit is assumed: epochs serve as well as iterations, as
long as all three agree. `date_optim.recipe.Recipe` makes these numbers from a baseline.

A new decay is one frozen dataclass derived from `Decay`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from numbers import Integral, Real

__all__ = [
    "WARMUPS",
    "Constant",
    "Decay",
    "Polynomial",
    "RollerCoaster",
    "linear_warmup",
    "quadratic_warmup",
]


def check_count(name: str, value: object) -> int:
    """Return `value` as an int of at least 1, or raise an error that names the argument."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")
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


WARMUPS: dict[str, Callable[[float, float], float]] = {
    "linear": linear_warmup,
    "quadratic": quadratic_warmup,
}
"""The warm-ups by the name that `Recipe` knows them by."""


class Decay(ABC):
    """A curve from the peak at ``i = W`` to the end of the run at ``i = I``."""

    @abstractmethod
    def __call__(self, i: float, W: float, I: float, peak: float = 1.0) -> float:  # noqa: E741
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

    def __call__(self, i: float, W: float, I: float, peak: float = 1.0) -> float:  # noqa: E741
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

    def __call__(self, i: float, W: float, I: float, peak: float = 1.0) -> float:  # noqa: E741
        """Return `peak`, at every iteration."""
        return peak
