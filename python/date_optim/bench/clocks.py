"""How long a step takes, on the CPU and on a GPU, with cold caches and with warm ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from .machine import cache_bytes

Step = Callable[[], Any]

COLD = 256 << 20
"""Bytes that are rewritten before a timed step, at least, as by a forward and a backward pass.

The project's bars ask for these 256 MB. A larger cache would keep a part of a step's arrays beside
them, so that twice the last level is rewritten where that is more: stricter than the bars ask.
"""

_SLEEP = 5_000  # us: longer than the host needs for most steps
_TRIALS = 4  # of a step that the host issues too late


def cold_bytes(device: str) -> int:
    """Return how many bytes are rewritten before a timed step on a device."""
    return max(COLD, 2 * cache_bytes(device))


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
        self._rewritten = torch.empty(cold_bytes("cpu"), dtype=torch.uint8)

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
    """Events around the step; the device sleeps until the host has issued it.

    Where the first event is over before that, the device has waited for the host: the step is timed
    again after a sleep of twice the host's time. One that still is late, as it waits for the device
    itself, has the host's part in its time.
    """

    device = "cuda"

    def __init__(self) -> None:
        self._rewritten = torch.empty(cold_bytes("cuda"), dtype=torch.uint8, device="cuda")
        ticks = 10_000_000
        for _ in range(2):  # the first one wakes the device
            begin, end = _events()
            begin.record()
            torch.cuda._sleep(ticks)  # type: ignore[no-untyped-call]
            end.record()
            torch.cuda.synchronize()
        self._ticks_per_us = ticks / (1e3 * float(begin.elapsed_time(end)))

    def cold(self, step: Step) -> float:
        """See `Clock`."""
        return self._time(step, lambda: self._rewritten.fill_(1))

    def warm(self, step: Step) -> float:
        """See `Clock`."""
        return self._time(step, lambda: None)

    def _time(self, step: Step, prepare: Step) -> float:
        sleep = float(_SLEEP)
        for _ in range(_TRIALS):
            prepare()
            torch.cuda._sleep(int(sleep * self._ticks_per_us))  # type: ignore[no-untyped-call]
            begin, end = _events()
            begin.record()
            issued_from = time.perf_counter_ns()
            step()
            end.record()
            host = (time.perf_counter_ns() - issued_from) / 1e3
            is_late = begin.query()  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            if not is_late:
                break
            sleep = max(sleep, 2 * host)
        return 1e3 * float(begin.elapsed_time(end))

    def host(self, step: Step) -> float:
        """See `Clock`."""
        torch.cuda.synchronize()
        begin = time.perf_counter_ns()
        step()
        taken = time.perf_counter_ns() - begin
        torch.cuda.synchronize()
        return taken / 1e3


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    return begin, end


CLOCKS: dict[str, type[CpuClock | CudaClock]] = {"cpu": CpuClock, "cuda": CudaClock}
