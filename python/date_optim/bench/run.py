"""Cases, and those of sweeps: check, measure, show, save."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from rich.console import Console

from .field import INTERRUPTED, Field, Request, interrupted, threads_of
from .measure import Case, Row, absent, measure
from .memory import available_bytes
from .models import shapes_of, sizes_of
from .plots import save_plots
from .results import results_name, save
from .sweeps import ALONE, cases_of, measure_alone, needs_bytes
from .table import progress, scaling_table, table_of


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
    name = results_name(False, sweep)
    try:
        for device in request.devices:
            field = Field(request, device, lambda said: console.print(said, highlight=False))
            for title, cases in _titled_cases(request, sweep, device):
                first = len(rows)
                try:
                    for case in cases:
                        rows += _measure_case(request, field, case, console)
                        save(request.output, name, request.about, rows)
                        if device == "cuda":
                            torch.cuda.empty_cache()
                finally:
                    if len(rows) > first:
                        console.print(table_of(title, rows[first:]))
                if sweep == "threads":
                    console.print(scaling_table(rows[first:]))
    except KeyboardInterrupt:
        console.print(interrupted(len(rows), "row", request.output), highlight=False)
        return INTERRUPTED
    finally:
        if rows:
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
    with threads_of(case.threads), progress(console) as shown:
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
