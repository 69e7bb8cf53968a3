"""Cases along one quantity: size, number of tensors, threads."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from .clocks import CLOCKS
from .contestants import Contestant, contestants
from .machine import cores
from .measure import Case, Effort, Row, absent, failure, measure
from .memory import available_bytes
from .models import shapes_of, sizes_of
from .traffic import STATES, Streams

SWEEPS = ("size", "tensors", "threads")

TENSORS = 10
"""Of each size: some work for the scheduling of layers, little for the host."""

TOTAL = 10_000_000
"""Parameters of all tensors together, where their number varies."""

ALONE = 1_000_000_000
"""From so many parameters on a contestant has a process of its own."""

_SPARE = 1.25
"""Of the memory that parameters, gradients and states take: what a step, or the reserve, needs."""


def cases_of(
    sweep: str, device: str, rules: Sequence[str], threads: int, quick: bool
) -> list[Case]:
    """Return a sweep's cases.

    Parameters
    ----------
    sweep : str
        One of `SWEEPS`.
    device : {"cpu", "cuda"}
    rules : sequence of str
    threads : int
        Of cases that do not vary them.
    quick : bool
        Leave the largest out.
    """
    cases = []
    for rule in rules:
        if sweep == "size":
            cases += [
                Case(device, rule, f"10^{n}", [[10**n // TENSORS]] * TENSORS, threads, sweep)
                for n in range(4, 8 if quick else 10)
            ]
        elif sweep == "tensors":
            cases += [
                Case(
                    device,
                    rule,
                    f"{n:,} tensor{'s' if n > 1 else ''}",
                    [[TOTAL // n]] * n,
                    threads,
                    sweep,
                )
                for n in (1, 10, 100, 1000, 10_000)
            ]
        else:
            shapes = shapes_of("resnet50")
            most = len(cores())
            counts = sorted({*(1 << i for i in range(most.bit_length())), most})
            cases += [Case(device, rule, "resnet50", shapes, n, sweep) for n in counts]
    return cases


def needs_bytes(case: Case, contestants: int) -> int:
    """Bytes of a case: weights, gradients, and states of each contestant."""
    arrays = 2 + contestants * STATES[case.rule]
    return int(_SPARE * 4 * arrays * sum(sizes_of(case.shapes)))


def measure_alone(case: Case, contestant: Contestant, effort: Effort) -> Row:
    """Return a contestant's row from a process of its own, or the row that says why not.

    Parameters
    ----------
    case : Case
    contestant : Contestant
        One that was found right.
    effort : Effort
    """
    needed, there = needs_bytes(case, 1), available_bytes(case.device)
    if needed > there:
        left_out = f"left out: needs {needed / 1e9:.0f} GB, {there / 1e9:.0f} GB are available"
        return absent(case, contestant, left_out)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        try:
            name, peer = contestant.name, contestant.peer
            return pool.submit(_measure_named, case, name, peer, effort).result()
        except BrokenProcessPool:
            return absent(case, contestant, "fails: its process was ended, as for want of memory")
        except Exception as raised:  # as the package that its process called
            if contestant.is_ours:
                raise
            return absent(case, contestant, failure(raised))


def _measure_named(case: Case, name: str, peer: str, effort: Effort) -> Row:
    torch.set_num_threads(case.threads)
    every = contestants(case.rule, case.device, [peer])
    contestant = next(each for each in every if each.name == name)
    clock, streams = CLOCKS[case.device](), Streams(case.device)
    return measure(case, [contestant], clock, streams, effort)[0]
