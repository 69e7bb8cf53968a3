"""One case: contestants that take turns over the same parameters, and a row for each."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .clocks import Clock, Step
from .contestants import BASELINES, Contestant, Params
from .machine import cache_bytes, own_cache_bytes
from .memory import peak_bytes
from .models import Shape, parameters, sizes_of
from .statistics import paired_ratio, quantiles
from .traffic import Streams, floor_bytes, model_bytes

Row = dict[str, Any]

LEAST_TURNS = 3
"""However long they take."""


@dataclass(frozen=True)
class Case:
    """Parameters to step over by one base rule.

    Attributes
    ----------
    device : {"cpu", "cuda"}
    rule : str
    model : str
        The name of the shapes.
    shapes : sequence of shapes
    threads : int
        torch's, during the case.
    sweep : str
        Which sweep it belongs to; "" for none.
    """

    device: str
    rule: str
    model: str
    shapes: Sequence[Shape]
    threads: int
    sweep: str = ""


@dataclass(frozen=True)
class Effort:
    """How long a case goes on.

    Attributes
    ----------
    turns : int
        At most.
    seconds : float
        No further turn after them.
    """

    turns: int
    seconds: float


@dataclass
class Times:
    """Microseconds of a contestant's steps, one entry a turn."""

    cold: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)


class Runner:
    """A contestant at work on a case's parameters.

    What a peer raises is its failure, of which its row tells; ours raise.
    """

    def __init__(self, contestant: Contestant, params: Params, saved: list[Tensor]) -> None:
        self.contestant = contestant
        self.step: Step = _not_made
        self.times = Times()
        self.failure = ""
        self._params = params
        self._saved = saved if contestant.writes_gradients else []

    def restore(self) -> None:
        """Give the gradients back what a step wrote over; the next contestant steps on them."""
        for param, gradient in zip(self._params, self._saved, strict=False):
            assert param.grad is not None
            param.grad.copy_(gradient)

    def warm_up(self) -> None:
        """Make the optimizer, states, plans and compiled code."""
        with self.excused():
            if self.step is _not_made:
                self.step = self.contestant.make(self._params).step
            for _ in range(2):
                self.step()
                self.restore()

    def take_turn(self, clock: Clock, warm: bool) -> None:
        """Time a step on cold caches, one that follows it, and the host's part of another."""
        with self.excused():
            self.times.cold.append(clock.cold(self.step))
            self.restore()
            if warm:
                self.times.warm.append(clock.warm(self.step))
                self.restore()
            host = clock.host(self.step)
            if host is not None:
                self.times.host.append(host)
                self.restore()

    @contextmanager
    def excused(self) -> Iterator[None]:
        """Note what a peer raises."""
        try:
            yield
        except Exception as raised:  # whatever another package raises is a row of the table
            if self.contestant.is_ours:
                raise
            self.failure = failure(raised)
            self.restore()


def _not_made() -> None:
    raise AssertionError("a contestant steps before it is made")


def failure(raised: BaseException) -> str:
    """Return what a row says of what its contestant raised."""
    lines = str(raised).strip().splitlines()
    return f"fails: {type(raised).__name__}: {lines[0] if lines else ''}"


def runners_of(case: Case, contestants: Sequence[Contestant]) -> list[Runner]:
    """Return contestants that step over the same parameters, past their first steps."""
    torch.compiler.reset()
    params = parameters(case.shapes, case.device)
    saved: list[Tensor] = []
    if any(each.writes_gradients for each in contestants):
        saved = [param.grad.clone() for param in params if param.grad is not None]
    runners = [Runner(each, params, saved) for each in contestants]
    for runner in runners:
        runner.warm_up()
    return runners


def take_turns(runners: Sequence[Runner], clock: Clock, *, warm: bool = True) -> Iterator[int]:
    """Let all take a turn, again and again, in an order drawn anew; yield the turns taken.

    Those that failed take none.
    """
    order, generator = list(runners), random.Random(0)
    for turn in count(1):
        generator.shuffle(order)
        for runner in order:
            if not runner.failure:
                runner.take_turn(clock, warm)
        yield turn


def measure(
    case: Case,
    contestants: Sequence[Contestant],
    clock: Clock,
    streams: Streams,
    effort: Effort,
    progress: Callable[[float], None] = lambda share: None,
) -> list[Row]:
    """Time a case and return a row for each contestant.

    Parameters
    ----------
    case : Case
    contestants : sequence of Contestant
        Those that were found right.
    clock : Clock
    streams : Streams
        What takes turns beside them.
    effort : Effort
    progress : callable
        Told which share of the turns is done.
    """
    begin = time.monotonic()
    runners = runners_of(case, contestants)
    copy, five = [], []
    for turn in take_turns(runners, clock):
        copy.append(streams.copy_rate(clock))
        five.append(streams.five_stream_rate(clock))
        spent = (time.monotonic() - begin) / effort.seconds
        progress(max(turn / effort.turns, spent))
        if turn >= effort.turns or (turn >= LEAST_TURNS and spent > 1):
            break
    of = {runner.contestant.name: runner for runner in runners if not runner.failure}
    baseline = next((of[name] for name in BASELINES if name in of), None)
    rates = {"copy": median(copy), "five_streams": median(five)}
    return [_row(case, runner, baseline, rates) for runner in runners]


def _row(case: Case, runner: Runner, baseline: Runner | None, rates: Mapping[str, float]) -> Row:
    contestant, times, sizes = runner.contestant, runner.times, sizes_of(case.shapes)
    sent, peak = None, 0
    if not runner.failure:
        with runner.excused():
            sent = launches(runner.step) if case.device == "cuda" else None
            runner.restore()
            peak = peak_bytes(runner.step, case.device)
            runner.restore()
    if runner.failure:
        return absent(case, contestant, runner.failure)
    floor = floor_bytes(case.rule, sizes)
    moved = model_bytes(case.rule, contestant.trust, sizes, cache_bytes(case.device))
    p20, p50, p80 = quantiles(times.cold)
    row = {
        **head(case, contestant),
        "status": "measured",
        "turns": len(times.cold),
        "cold_us_p20": p20,
        "cold_us_p50": p50,
        "cold_us_p80": p80,
        **dict(
            zip(("warm_us_p20", "warm_us_p50", "warm_us_p80"), quantiles(times.warm), strict=True)
        ),
        "host_us_p50": quantiles(times.host)[1] if times.host else None,
        "launches": sent,
        "peak_bytes": peak,
        "floor_bytes": floor,
        "model_bytes": moved,
        "model_bytes_own_cache": model_bytes(
            case.rule, contestant.trust, sizes, own_cache_bytes(case.device)
        ),
        "floor_gb_per_s": floor / p50 / 1e3,
        "gb_per_s": moved / p50 / 1e3,
        "copy_gb_per_s": rates["copy"],
        "of_copy": moved / p50 / 1e3 / rates["copy"],
        "five_streams_gb_per_s": rates["five_streams"],
        "of_five_streams": moved / p50 / 1e3 / rates["five_streams"],
        "baseline": baseline.contestant.name if baseline else None,
        "of_baseline": None,
        "of_baseline_low": None,
        "of_baseline_high": None,
        "cold_us": times.cold,
        "warm_us": times.warm,
        "host_us": times.host,
    }
    if baseline is not None:
        ratio = paired_ratio(times.cold, baseline.times.cold)
        row |= {
            "of_baseline": ratio.median,
            "of_baseline_low": ratio.low,
            "of_baseline_high": ratio.high,
        }
    return row


def head(case: Case, contestant: Contestant) -> Row:
    """Return what a row says before anything is measured."""
    sizes = sizes_of(case.shapes)
    return {
        "device": case.device,
        "sweep": case.sweep,
        "model": case.model,
        "rule": case.rule,
        "contestant": contestant.name,
        "ours": contestant.is_ours,
        "note": contestant.note,
        "tensors": len(sizes),
        "parameters": sum(sizes),
        "threads": case.threads,
    }


def absent(case: Case, contestant: Contestant, why: str) -> Row:
    """Return the row of a contestant that is not timed."""
    return {**head(case, contestant), "status": why}


def launches(step: Step) -> int:
    """Count the kernels, copies and fills that a step sends to a GPU."""
    activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        step()
        torch.cuda.synchronize()
    # The step's own name, as torch's optimizers note it, has a span on the device, too.
    on_device = (event for event in profile.events() if event.device_type.name == "CUDA")
    return sum(not event.is_user_annotation for event in on_device)
