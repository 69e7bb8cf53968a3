"""From runs to one document, and from the document to sentences, a table and a file.

The document is what the JSON file holds. Everything that is shown is computed from it, so that the
committed file supports the committed picture and text.
"""

from __future__ import annotations

import json
import math
import platform
import re
import subprocess
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.table import Table
from scipy.stats import t as student_t  # type: ignore[import-untyped]

import date_kernels

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .config import Method, Settings
    from .data import DataSet
    from .overhead import HostOverhead
    from .train import Run

SCHEMA = 1

COLLAPSE = 30.0
"""Points behind both others that are called a fall."""


def build_document(
    command: str,
    data: DataSet,
    settings: Settings,
    methods: Iterable[Method],
    runs: Sequence[Run],
    overhead: HostOverhead,
) -> dict[str, Any]:
    """Gather what was run, on what, and what came out.

    Accuracies are in percent, differences in points of accuracy, times in the unit of their key.
    """
    recipe = settings.make_recipe(len(data.train))
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "command": command,
        "commit": find_commit(),
        "versions": describe_versions(),
        "machine": describe_machine(),
        "data": {
            "name": data.name,
            "source": data.source,
            "train": len(data.train),
            "validation": len(data.validation),
            "test": len(data.test),
        },
        "settings": asdict(settings),
        "methods": {
            method.key: {
                "label": method.label,
                "batch_size": method.batch_size,
                "bounds": None
                if method.trust is None
                else [method.trust.lower, method.trust.upper],
                "iterations": recipe.at(method.batch_size).iterations,
                "warmup_epochs": recipe.at(method.batch_size).warmup_epochs,
                "peak": recipe.at(method.batch_size).peak,
                "lr": next(run.lr for run in runs if run.method == method.key),
            }
            for method in methods
        },
        "runs": [{key: value for key, value in asdict(run).items() if key != "lr"} for run in runs],
    }
    document = to_plain(document)
    accuracy = {key: list_accuracies(document, key) for key in document["methods"]}
    document["test_accuracy"] = {
        key: {"mean": mean(values), "range": [min(values), max(values)]}
        for key, values in accuracy.items()
    }
    document["unbounded_behind_both"] = [
        min(plain, bounded) - unbounded
        for plain, unbounded, bounded in zip(
            accuracy["plain"], accuracy["unbounded"], accuracy["bounded"], strict=True
        )
    ]
    document["bounded_minus_plain"] = compare_pairs(accuracy["bounded"], accuracy["plain"])
    document["host_overhead_us"] = asdict(overhead)
    document = to_plain(document)
    document["sentences"] = write_sentences(document)
    return document


def list_accuracies(document: dict[str, Any], method: str) -> list[float]:
    """Return a method's test accuracies in the order of the seeds."""
    runs = sorted(document["runs"], key=lambda run: int(run["seed"]))
    return [run["test"] for run in runs if run["method"] == method]


def compare_pairs(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """Return the differences pair by pair, their mean and its Student-t 95% interval.

    The interval is None for a single pair, which has no spread.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    center, count = mean(differences), len(differences)
    interval = None
    if count > 1:
        half = float(student_t.ppf(0.975, count - 1)) * stdev(differences) / math.sqrt(count)
        interval = [center - half, center + half]
    return {"differences": differences, "mean": center, "interval": interval}


def write_sentences(document: dict[str, Any]) -> list[str]:
    """Say what came out: what the numbers are, and no more."""
    large = document["settings"]["large_batch_size"]
    behind = document["unbounded_behind_both"]
    points = ", ".join(f"{gap:.1f}" for gap in behind)
    seeds = "every seed" if len(behind) > 1 else "the one seed"
    verb = "falls" if min(behind) >= COLLAPSE else "does not fall"
    unbounded = (
        f"At batch {large}, layer-wise without bounds {verb} at least {COLLAPSE:g} points of test "
        f"accuracy behind both others on {seeds}: {points} points behind the lower of the two."
    )
    pairs = document["bounded_minus_plain"]
    differences = ", ".join(f"{difference:+.1f}" for difference in pairs["differences"])
    bounded = f"Bounded minus plain, paired by seed: {pairs['mean']:+.1f} points"
    if pairs["interval"] is None:
        bounded += "; one pair gives no interval."
    else:
        low, high = pairs["interval"]
        verdict = "contains" if low <= 0 <= high else "does not contain"
        bounded += (
            f" on average ({differences}), 95% interval [{low:+.1f}, {high:+.1f}] by Student's t "
            f"over {len(pairs['differences'])} pairs, which {verdict} 0."
        )
    return [unbounded, bounded]


def make_table(document: dict[str, Any]) -> Table:
    """Make the final table: mean and range of the test accuracy over the seeds."""
    data, count = document["data"], len(document["unbounded_behind_both"])
    table = Table(
        title=f"Test accuracy of LeNet-5 on {data['name']}, RMSprop, "
        f"{document['settings']['epochs']} epochs",
        caption=f"mean and range over the seeds ({count}); time of a run",
    )
    table.add_column("batch", justify="right")
    table.add_column("method")
    table.add_column("steps", justify="right")
    table.add_column("peak rate", justify="right")
    table.add_column("mean", justify="right")
    table.add_column("range", justify="right")
    table.add_column("time", justify="right")
    for key, method in document["methods"].items():
        accuracy = document["test_accuracy"][key]
        low, high = accuracy["range"]
        seconds = mean(run["seconds"] for run in document["runs"] if run["method"] == key)
        table.add_row(
            str(method["batch_size"]),
            method["label"],
            str(method["iterations"]),
            f"{method['peak']:.2g}",
            f"{accuracy['mean']:.1f}%",
            f"{low:.1f} - {high:.1f}",
            f"{seconds:.0f} s",
        )
    return table


def describe_overhead(document: dict[str, Any]) -> str:
    """Say what a step costs the host."""
    overhead = document["host_overhead_us"]
    return (
        f"Host time of optimizer.step(): {overhead['per_step']:.1f} us + "
        f"{overhead['per_tensor']:.2f} us a tensor (medians of {overhead['steps']} steps with "
        f"{' and '.join(map(str, overhead['tensors']))} tensors of one element)."
    )


def describe_versions() -> dict[str, str]:
    """Return the versions that the numbers depend on."""
    return {
        "date_kernels": date_kernels.info().version,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def describe_machine() -> dict[str, Any]:
    """Return the processor and how the kernels use it."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    info = date_kernels.info()
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "threads": info.threads,
        "cpu_target": info.cpu_target,
        "shares_torch_openmp": info.shares_torch_openmp,
    }


def find_commit() -> str | None:
    """Return this source tree's commit, if git knows it, with "-dirty" where it was changed."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty"],
            cwd=Path(__file__).parent,
            check=False,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def to_plain(value: Any) -> Any:
    """Make a value fit for JSON: six significant digits, and None for what is not finite."""
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def write_json(document: dict[str, Any], path: Path) -> None:
    """Write a document with each list of numbers on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(to_plain(document), indent=1, allow_nan=False)
    text = re.sub(r"\[\n[^][{}\"]*\]", lambda numbers: " ".join(numbers[0].split()), text)
    path.write_text(text + "\n", encoding="utf-8")
