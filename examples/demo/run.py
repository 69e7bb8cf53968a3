"""LIMIT's table 3, live: RMSprop at a small batch; at a large one plain, layer-wise, bounded.

    make demo
    .venv/bin/python examples/demo/run.py --help

Four methods on one recipe, three seeds each. The recipe and the bounds were chosen before, on
validation images (tune.py); the test images are looked at once, at the end of each run.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as ProgressBars

import date_kernels
from demo.config import SETTINGS
from demo.data import DataError, load
from demo.overhead import host_overhead
from demo.plot import draw
from demo.report import build_document, describe_overhead, make_table, write_json
from demo.train import Progress, train


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST's four idx files")
    parser.add_argument("--digits", action="store_true", help="take scikit-learn's digits")
    parser.add_argument("--seeds", type=_count, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--epochs", type=_count, metavar="N", help="default: as tuned")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="default: %(default)s")
    return parser.parse_args()


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError(text)
    return value


def main() -> None:
    """Train, show, and write demo.json and demo.png."""
    start = time.perf_counter()
    arguments = parse_arguments()
    console = Console(markup=False, highlight=False)
    if (why := date_kernels.info().backends["cpu"]) is not None:
        sys.exit(f"The demo trains through the native backend, which is not there: {why}")
    try:
        data = load(arguments.data, arguments.digits, console.print)
    except DataError as error:
        sys.exit(
            f"{error}. Debian's package dataset-fashion-mnist has the files; --digits needs none."
        )
    settings = SETTINGS[data.name]
    if arguments.epochs is not None:
        settings = settings.shorten(arguments.epochs)
    methods, recipe = settings.make_methods(), settings.make_recipe(len(data.train))
    console.print(
        f"Data: {data.name} ({data.source}): {len(data.train)} images to train on, "
        f"{len(data.validation)} to validate, {len(data.test)} to test."
    )
    console.print(str(date_kernels.info()))

    with ProgressBars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        TextColumn("{task.fields[live]}"),
        console=console,
        refresh_per_second=4,
        disable=not console.is_terminal,
    ) as bars:
        plan = [(method, seed) for method in methods for seed in range(arguments.seeds)]
        tasks = [
            bars.add_task(
                f"{method.batch_size:>4} {method.label}, seed {seed}",
                total=recipe.at(method.batch_size).iterations,
                live="",
            )
            for method, seed in plan
        ]
        runs = []
        for task, (method, seed) in zip(tasks, plan, strict=True):

            def show(now: Progress, task: TaskID = task) -> None:
                live = f"loss {now.loss:<8.3g} val {now.accuracy:4.1f}% lr {now.lr:.1e}"
                bars.update(task, completed=now.iteration, live=live)

            runs.append(train(method, recipe, data, seed, show))
            result = f"test {runs[-1].test:.1f}%, {runs[-1].seconds:.0f} s"
            bars.update(task, live=result)
            if bars.disable:
                print(f"{bars.tasks[task].description}: {result}", flush=True)

    command = shlex.join(["python", os.path.relpath(__file__), *sys.argv[1:]])
    document = build_document(command, data, settings, methods, runs, host_overhead())
    write_json(document, arguments.out / "demo.json")
    draw(document, arguments.out / "demo.png")
    console.print(make_table(document))
    for sentence in (*document["sentences"], describe_overhead(document)):
        console.print(sentence)
    console.print(
        f"{time.perf_counter() - start:.0f} s in all; curves, learning rates and trust ratios: "
        f"{arguments.out}/demo.png, {arguments.out}/demo.json"
    )


if __name__ == "__main__":
    main()
