"""The papers' studies.

    make papers-quick
    .venv/bin/python examples/papers/run.py --help

Each case is one training run in a process of its own, on one thread, so that its bits depend on
neither the machine's cores nor its neighbours. What is done is kept: after an interruption the same
command goes on, at most an epoch back.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from demo.data import DataError
from demo.report import describe_machine, find_commit
from rich import table as rich_table
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from papers.images import load_images
from papers.solvers import backend_for
from papers.store import Store, document, write_whole
from papers.studies import STUDIES
from papers.study import SIZES, Case, Table
from papers.table3 import MODELS
from papers.training import train


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument(
        "studies", nargs="*", metavar="STUDY", help=f"default: all of {', '.join(STUDIES)}"
    )
    parser.add_argument("--size", choices=SIZES, default="full", help="default: %(default)s")
    parser.add_argument(
        "--model", choices=MODELS, default="lenet5", help="of table3 and its tuning: %(default)s"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="default: %(default)s")
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST's four idx files")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    parser.add_argument("--out", type=Path, default=Path("out/papers"), help="default: %(default)s")
    found = parser.parse_args(arguments)
    if unknown := [name for name in found.studies if name not in STUDIES]:
        parser.error(f"unknown study {unknown[0]!r}: there are {', '.join(STUDIES)}")
    if found.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {found.jobs}")
    return found


def run_case(study: str, case: Case, arguments: argparse.Namespace, store: Store) -> None:
    """Run one case in a process of its own, and keep its result."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends without a word; what is kept is whole
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    device = arguments.device
    try:
        training = STUDIES[study].training(case.settings, arguments.data, device)
        result = train(case, training, store.checkpoint(case))
    except DataError as error:
        sys.exit(str(error))
    made_by = {
        "backend": backend_for(device),
        "device": name_of(device),
        "torch": torch.__version__,
        "commit": find_commit(),
    }
    store.save(case, {"settings": dict(case.settings), **made_by, **result})


def name_of(device: str) -> str:
    """Name the processor or GPU."""
    return torch.cuda.get_device_name() if device == "cuda" else str(describe_machine()["cpu"])


class CaseError(Exception):
    """A case's process ended without a result; it has said why."""


def run_cases(
    name: str, cases: Sequence[Case], store: Store, arguments: argparse.Namespace, console: Console
) -> None:
    """Run what is left of a study, `arguments.jobs` cases at a time."""
    left = [case for case in reversed(cases) if store.load(case) is None]
    context = multiprocessing.get_context("spawn")
    running: dict[SpawnProcess, Case] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(name, total=len(cases), completed=len(cases) - len(left))
        try:
            while left or running:
                while left and len(running) < arguments.jobs:
                    case = left.pop()
                    process = context.Process(target=run_case, args=(name, case, arguments, store))
                    process.start()
                    running[process] = case
                wait([process.sentinel for process in running])
                for process in [each for each in running if each.exitcode is not None]:
                    case = running.pop(process)
                    if process.exitcode != 0:
                        raise CaseError(f"{name} {case.name} ended with {process.exitcode}")
                    result = store.require(case)
                    final = result["final"]
                    outcome = "diverged" if final is None else f"{final:.2f}"
                    bar.advance(task)
                    console.print(f"{name} {case.name}: {outcome}, {result['seconds']:.0f} s")
        finally:
            for process in running:
                process.terminate()
                process.join()


def with_model(case: Case, model: str) -> Case:
    """The same case with another model, if it leaves a choice."""
    chosen = {"model": model} if "model" in case.settings else {}
    return Case(case.name, {**case.settings, **chosen})


def run_study(name: str, arguments: argparse.Namespace, console: Console) -> None:
    """Run a study, write its document and picture, print its tables."""
    study, size, model = STUDIES[name], arguments.size, arguments.model
    cases = [with_model(case, model) for case in study.cases(size)]
    if not cases:
        return
    stem = name if model == "lenet5" else f"{name}-{model}"
    store = Store(arguments.out / size / stem)
    console.print(study.title, style="bold")
    run_cases(name, cases, store, arguments, console)
    command = ["python", "examples/papers/run.py", name, "--size", size, "--model", model]
    results = [store.require(case) for case in cases]
    written = document(study, size, shlex.join(command), results)
    write_whole(arguments.out / size / f"{stem}.json", written)
    study.draw(written["results"]).savefig(arguments.out / size / f"{stem}.png", dpi=120)
    for title, table in study.tables(written["results"]).items():
        console.print(show(title, table))


def show(title: str, table: Table) -> rich_table.Table:
    """A table for the terminal."""
    shown = rich_table.Table(*table.head, title=title)
    for row in table.rows:
        shown.add_row(*row)
    return shown


def main() -> None:
    """Run the studies in order."""
    arguments = parse_arguments()
    console = Console(markup=False, highlight=False)
    if arguments.device is None:
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.device == "cuda":
        arguments.jobs = 1  # which one process keeps busy
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        backend_for(arguments.device)
    except RuntimeError as error:
        sys.exit(str(error))
    try:
        load_images(arguments.data, "cpu")  # or every process would look for them
        for name in arguments.studies or STUDIES:
            run_study(name, arguments, console)
    except (DataError, CaseError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; the same command goes on from here.")


if __name__ == "__main__":
    main()
