"""How long a step takes, on the CPU and on a GPU, with cold caches and with warm ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

Step = Callable[[], Any]

COLD = 256 << 20
"""Bytes that are rewritten before a timed step, as a forward and a backward pass would do."""

_SLEEP = 10_000_000  # clock ticks, some 5 ms: longer than the host needs for most steps


class Clock(Protocol):
    """Microseconds of a step.

    Attributes
    ----------
    device : str
        Where the steps are: "cpu" or "cuda".
    """

    device: str

    def cold(self, step: Step) -> float:
        """Time a step after the caches were rewritten."""
        ...

    def warm(self, step: Step) -> float:
        """Time a step as it follows another."""
        ...

    def host(self, step: Step) -> float | None:
        """Time until the host is free again; None where the host is the device."""
        ...


class CpuClock:
    """Wall-clock time."""

    device = "cpu"

    def __init__(self) -> None:
        self._rewritten = torch.empty(COLD, dtype=torch.uint8)

    def cold(self, step: Step) -> float:
        """See `Clock`."""
        self._rewritten.fill_(1)
        return self.warm(step)

    def warm(self, step: Step) -> float:
        """See `Clock`."""
        begin = time.perf_counter_ns()
        step()
        return (time.perf_counter_ns() - begin) / 1e3

    def host(self, step: Step) -> None:
        """See `Clock`."""


class CudaClock:
    """Events around the step; the device sleeps until the host has issued it."""

    device = "cuda"

    def __init__(self) -> None:
        self._rewritten = torch.empty(COLD, dtype=torch.uint8, device="cuda")

    def cold(self, step: Step) -> float:
        """See `Clock`."""
        self._rewritten.fill_(1)
        return self.warm(step)

    def warm(self, step: Step) -> float:
        """See `Clock`."""
        torch.cuda._sleep(_SLEEP)  # type: ignore[no-untyped-call]
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return 1e3 * float(begin.elapsed_time(end))

    def host(self, step: Step) -> float:
        """See `Clock`."""
        torch.cuda.synchronize()
        begin = time.perf_counter_ns()
        step()
        taken = time.perf_counter_ns() - begin
        torch.cuda.synchronize()
        return taken / 1e3


CLOCKS: dict[str, type[CpuClock | CudaClock]] = {"cpu": CpuClock, "cuda": CudaClock}
