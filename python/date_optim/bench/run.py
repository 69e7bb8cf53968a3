"""What the command does once its words are understood: check, measure, show, save."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .bars import Bar, Verdict, cpu_bars, cuda_bars, decide
from .check import why_not
from .clocks import CLOCKS, Clock
from .contestants import Contestant, contestants
from .machine import cores_share_a_cache
from .measure import Case, Effort, Row, absent, measure
from .memory import available_bytes
from .models import shapes_of, sizes_of
from .peers import installed_version
from .plots import save_plots
from .results import save
from .sweeps import ALONE, cases_of, measure_alone, needs_bytes
from .table import progress, scaling_table, table_of, verdicts_table
from .traffic import Streams

INTERRUPTED = 130
"""The exit code of a command that was interrupted, as a shell has it."""


@dataclass(frozen=True)
class Request:
    """The command line, understood.

    Attributes
    ----------
    devices, rules, models, peers : list of str
    threads : int
    quick : bool
    effort : Effort
        Of a case.
    output : Path or None
        Folder of the results.
    about : dict
        What a results file says beside its rows.
    """

    devices: list[str]
    rules: list[str]
    models: list[str]
    peers: list[str]
    threads: int
    quick: bool
    effort: Effort
    output: Path | None
    about: dict[str, Any]


class WrongResultError(Exception):
    """One of ours differs from the reference: nothing is timed."""


class Field:
    """Those who take part on a device, found right or not before anything is timed."""

    def __init__(self, request: Request, device: str, console: Console) -> None:
        self.clock: Clock = CLOCKS[device]()
        self.streams = Streams(device)
        self.fit: dict[str, list[Contestant]] = {}
        self.unfit: dict[str, list[tuple[Contestant, str]]] = {}
        for rule in request.rules:
            self.fit[rule], self.unfit[rule] = [], []
            for each in contestants(rule, device, request.peers):
                why = _why_absent(each) or why_not(each, device)
                if why is None:
                    self.fit[rule].append(each)
                elif each.is_ours:
                    raise WrongResultError(f"{rule}, {each.name} on {device}: {why}")
                else:
                    self.unfit[rule].append((each, why))
            names = ", ".join(each.name for each in self.fit[rule])
            console.print(
                f"{device}, {rule}: right against the reference: {names}", highlight=False
            )


def _why_absent(contestant: Contestant) -> str | None:
    if contestant.is_ours or installed_version(contestant.peer) is not None:
        return None
    return "not installed"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_cases(request: Request, sweep: str, console: Console) -> int:
    """Time cases, or a sweep's, show a table of each and save after each.

    Returns
    -------
    int
        The exit code: 0, or `INTERRUPTED`, which keeps the rows so far.

    Raises
    ------
    WrongResultError
    """
    rows: list[Row] = []
    name = f"bench-{sweep}" if sweep else "bench"
    try:
        for device in request.devices:
            field = Field(request, device, console)
            for title, cases in _titled_cases(request, sweep, device):
                first = len(rows)
                for case in cases:
                    rows += _measure_case(request, field, case, console)
                    if request.output is not None:
                        save(request.output, name, request.about, rows)
                console.print(table_of(title, rows[first:]))
                if sweep == "threads":
                    console.print(scaling_table(rows[first:]))
    except KeyboardInterrupt:
        console.print(f"interrupted: {len(rows)} rows are kept")
        return INTERRUPTED
    finally:
        if request.output is not None and rows:
            for path in save_plots(request.output, name, rows):
                console.print(f"{path}", highlight=False)
    return 0


def _titled_cases(request: Request, sweep: str, device: str) -> Iterator[tuple[str, list[Case]]]:
    """A table each: a model and rule, or all of a sweep by one rule."""
    if sweep:
        cases = cases_of(sweep, device, request.rules, request.threads, request.quick)
        for rule, of in groupby(cases, lambda case: case.rule):
            yield f"{device}, {sweep}, {rule}", list(of)
        return
    for model in request.models:
        shapes = shapes_of(model)
        size = f"{len(shapes)} tensors, {sum(sizes_of(shapes)) / 1e6:.3g} M parameters"
        for rule in request.rules:
            title = f"{device}, {model} ({size}), {rule}"
            yield title, [Case(device, rule, model, shapes, request.threads)]


def _measure_case(request: Request, field: Field, case: Case, console: Console) -> list[Row]:
    fit = field.fit[case.rule]
    with _threads(case.threads), progress(console) as shown:
        task = shown.add_task(f"{case.model}, {case.rule}", total=1.0)
        needed, there = needs_bytes(case, len(fit)), available_bytes(case.device)
        if sum(sizes_of(case.shapes)) < ALONE and needed <= there:
            rows = measure(
                case,
                fit,
                field.clock,
                field.streams,
                request.effort,
                lambda share: shown.update(task, completed=share),
            )
        else:
            rows = []
            for i, each in enumerate(fit):
                rows.append(measure_alone(case, each, request.effort))
                shown.update(task, completed=(i + 1) / len(fit))
    return [*rows, *(absent(case, each, why) for each, why in field.unfit[case.rule])]


def run_bars(request: Request, seconds: float, console: Console) -> int:
    """Measure the bars of the request's devices, models and rules.

    Parameters
    ----------
    request : Request
    seconds : float
        The time limit of those that are measured together.
    console : Console

    Returns
    -------
    int
        The exit code: 0 where all are met, 1 where one is not, or `INTERRUPTED`.

    Raises
    ------
    WrongResultError
    """
    verdicts: list[Verdict] = []
    code = 0
    try:
        for device in request.devices:
            bars = cuda_bars() if device == "cuda" else cpu_bars(cores_share_a_cache())
            bars = [
                bar for bar in bars if bar.rule in request.rules and bar.model in request.models
            ]
            field = Field(request, device, console)
            for group in _groups(bars):
                first = group[0]
                with _threads(request.threads), progress(console) as shown:
                    shown.add_task(f"{first.model}, {first.rule}", total=None)
                    found = decide(
                        group,
                        field.fit[first.rule],
                        field.clock,
                        field.streams,
                        request.threads,
                        seconds,
                    )
                verdicts += found
                console.print(verdicts_table(found))
                if request.output is not None:
                    save(request.output, "bars", request.about, [_flat(v) for v in verdicts])
    except KeyboardInterrupt:
        console.print(f"interrupted: {len(verdicts)} bars are kept")
        code = INTERRUPTED
    met = sum(verdict.word == "met" for verdict in verdicts)
    console.print(f"{met} of {len(verdicts)} bars are met")
    return code or int(met < len(verdicts) or not verdicts)


def _groups(bars: Sequence[Bar]) -> list[list[Bar]]:
    """Bars that are measured together; packages that take long do so among themselves."""
    found: dict[tuple[str, str, bool], list[Bar]] = {}
    for bar in bars:
        found.setdefault((bar.model, bar.rule, bar.at_least), []).append(bar)
    return list(found.values())


def _flat(verdict: Verdict) -> Row:
    ratio = {} if verdict.ratio is None else verdict.ratio._asdict()
    bar = asdict(verdict.bar)
    kept = {key: bar[key] for key in ("device", "model", "rule", "at_least", "limit")}
    return {
        **kept,
        "ratio": verdict.text,
        "word": verdict.word,
        **ratio,
        "turns": verdict.turns,
        "reason": verdict.reason,
    }
