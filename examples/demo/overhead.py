"""What a step costs before any element is touched: Python, the plan, the call."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import torch

from date_optim import RMSprop, TrustRatio


@dataclass(frozen=True)
class HostOverhead:
    """Microseconds of ``optimizer.step()``, as a line through two measured medians.

    Attributes
    ----------
    per_step, per_tensor : float
        The line: ``per_step + per_tensor * tensors``.
    tensors : tuple of int
        Where it was measured.
    medians : tuple of float
        What was measured there.
    steps : int
        Of how many steps each median is.
    """

    per_step: float
    per_tensor: float
    tensors: tuple[int, int]
    medians: tuple[float, float]
    steps: int


def host_overhead(tensors: tuple[int, int] = (10, 200), steps: int = 400) -> HostOverhead:
    """Measure RMSprop with a bounded ratio on tensors of one element: next to no arithmetic.

    Parameters
    ----------
    tensors : (int, int)
        Two different numbers of tensors.
    steps : int
        Timed steps with each.
    """
    few, many = tensors
    medians = (_median_step(few, steps), _median_step(many, steps))
    per_tensor = (medians[1] - medians[0]) / (many - few)
    return HostOverhead(medians[0] - few * per_tensor, per_tensor, tensors, medians, steps)


def _median_step(count: int, steps: int) -> float:
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(count)]
    for param in params:
        param.grad = torch.ones(1)
    optimizer = RMSprop(params, lr=1e-6, trust=TrustRatio(lower=0.1, upper=1.0))
    for _ in range(10):  # the first builds the plan
        optimizer.step()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return 1e6 * median(times)
