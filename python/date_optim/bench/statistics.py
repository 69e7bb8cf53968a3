"""Quantiles of times, and the interval of a ratio of paired times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 2000


class Ratio(NamedTuple):
    """A median of paired ratios.

    Attributes
    ----------
    median : float
    low, high : float
        Ends of its 95% bootstrap interval.
    """

    median: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """The interval's width as a share of the ratio."""
        return (self.high - self.low) / self.median


def quantiles(times: Sequence[float]) -> tuple[float, float, float]:
    """Return p20, p50 and p80."""
    p20, p50, p80 = np.quantile(np.asarray(times), (0.2, 0.5, 0.8)).tolist()
    return p20, p50, p80


def three_digits(x: float) -> str:
    """Return a number as a table shows it, without an exponent."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def paired_ratio(over: ArrayLike, under: ArrayLike) -> Ratio:
    """Return the median of ``over[i] / under[i]`` with its 95% bootstrap interval.

    Times of one turn are neighbours: what slows the machine for a while slows both. The resamples
    are of whole turns, by a generator with a fixed seed.

    Parameters
    ----------
    over, under : array_like, shape (turns,)
        Times of the same turns.

    References
    ----------
    Efron, Tibshirani 1993, "An Introduction to the Bootstrap", 13.3 (the percentile interval).
    """
    ratios = np.asarray(over, dtype=np.float64) / np.asarray(under, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[drawn], axis=1), (0.025, 0.975)).tolist()
    return Ratio(float(np.median(ratios)), low, high)
