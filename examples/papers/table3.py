"""LIMIT's table 3 and DATE's section 3.5: five solvers at a batch 32 times larger.

At each batch size: plain; at the large one also layer-wise, and layer-wise with bounds. Rates were
chosen at the small batch alone (`Rates`), on validation images and with a seed that the table does
not use; nothing is tuned at the large batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from demo.model import make_lenet5
from demo.report import compare_pairs
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .images import Classification, load_images
from .models import make_lenet
from .pictures import COLORS, new_figure
from .study import Case, Result, Size, Study, Table

SMALL, LARGE = 256, 8192
SEEDS = (0, 1)
TUNING_SEED = 100

WARMUP = 1 / 60
"""Of a run's epochs at the small batch, and 32 times as many at the large one, by LEGW: DATE's two
of 30 epochs at batch 1024."""

EPOCHS: Mapping[Size, int] = {"full": 10, "quick": 6, "slice": 1}
"""The paper takes 30."""

RATE_EPOCHS = 5

SOLVERS = ("momentum", "adagrad", "rmsprop", "adam")

MODELS = {"lenet5": make_lenet5, "lenet": make_lenet}

OPTIONS: Mapping[str, Mapping[str, Any]] = {"lars": {"exclude": None}}
"""LeNet has no norm layers, whose weights LARS leaves out, and its biases need ratios, too: what
suits a ratio's rate throws them far off."""

RATES = {"momentum": 0.02, "adagrad": 0.08, "rmsprop": 4e-3, "adam": 0.016, "lars": 8.0}
"""Chosen by `Rates`."""

BOUNDS = [0.1, 1.0]
"""`date_optim.DATE`'s."""

PAPER: Mapping[str, tuple[str, str, str, str]] = {
    "momentum": ("99.2", "diverges", "99.2", "99.2"),
    "adagrad": ("99.2", "98.3", "99.3", "99.3"),
    "rmsprop": ("99.2", "98.6", "diverges", "99.0"),
    "adam": ("99.3", "99.1", "unstable", "99.4"),
    "lars": ("99.3", "99.4", "-", "-"),
}
"""Accuracy in percent on MNIST's test images: LIMIT, table 3."""


def settings(
    solver: str, batch_size: int, trust: Any, seed: int, epochs: int, **others: Any
) -> dict[str, Any]:
    """Settings of one run; those of `others` replace the chosen ones."""
    return {
        "solver": solver,
        "trust": trust,
        "batch_size": batch_size,
        "seed": seed,
        "epochs": epochs,
        "lr": RATES[solver],
        "warmup_epochs": WARMUP * epochs,
        "base_batch_size": SMALL,
        "model": "lenet5",
        "options": dict(OPTIONS.get(solver, {})),
        "split": "test",
        **others,
    }


class _Images(Study):
    """What the three have in common."""

    def training(
        self, settings: Mapping[str, Any], data: Path | None, device: str
    ) -> Classification:
        """Make LeNet and its training."""
        model = MODELS[settings["model"]]
        return Classification(model, settings, load_images(data, device), device)


class Table3(_Images):
    """The table itself."""

    name = "table3"
    title = "LIMIT, table 3, on LeNet-5: plain, layer-wise, bounded at batch 256 and 8192"

    def cases(self, size: Size) -> list[Case]:
        """List each row's runs: two seeds, of the quick subset one and RMSprop alone."""
        epochs = EPOCHS[size]
        solvers = (*SOLVERS, "lars") if size == "full" else ("rmsprop",)
        seeds = SEEDS if size == "full" else SEEDS[:1]
        found = []
        for solver, seed in product(solvers, seeds):
            for column, batch_size, trust in columns(solver):
                telemetry = seed == SEEDS[0] and column in ("layer-wise", "bounded")
                each = settings(solver, batch_size, trust, seed, epochs, telemetry=telemetry)
                found.append(Case(f"{solver}-{column}-{seed}", {**each, "column": column}))
        return found

    def tables(self, results: Sequence[Result]) -> dict[str, Table]:
        """Make the table: ours, with the paper's in brackets."""
        head = ("solver", "batch 256", "8192", "+ layer-wise", "+ layer-wise and bounded")
        rows = []
        for solver in dict.fromkeys(each["settings"]["solver"] for each in results):
            cells = [
                cell([e for e in of(results, solver) if e["settings"]["column"] == column])
                for column in ("small", "large", "layer-wise", "bounded")
            ]
            paper = PAPER[solver]
            rows.append((solver, *(f"{a} ({b})" for a, b in zip(cells, paper, strict=True))))
        return {
            "Test accuracy in percent (in brackets the paper's, on MNIST)": Table(head, rows),
            "Bounded minus plain at 8192, in points, paired by seed": paired(results),
        }

    def draw(self, results: Sequence[Result]) -> Figure:
        """Draw the accuracies, and the ratios of RMSprop's layers over time."""
        figure, (accuracy, unbounded, bounded) = new_figure(3)
        labels = {"small": "256", "large": "8192", "layer-wise": "layer-wise", "bounded": "bounded"}
        solvers = list(dict.fromkeys(each["settings"]["solver"] for each in results))
        for k, column in enumerate(labels):
            points = [
                (i + 0.16 * (k - 1.5), accuracy_or_zero(each))
                for i, solver in enumerate(solvers)
                for each in of(results, solver)
                if each["settings"]["column"] == column
            ]
            x, y = zip(*points, strict=True)
            accuracy.scatter(x, y, 18, color=COLORS[k], label=labels[column])
        accuracy.set_xticks(range(len(solvers)), solvers)
        accuracy.set_ylabel("test accuracy, percent; 0: diverged")
        accuracy.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=4)
        for axes, column in ((unbounded, "layer-wise"), (bounded, "bounded")):
            for each in of(results, "rmsprop"):
                if each["settings"]["column"] == column:
                    draw_ratios(axes, each)
            axes.set(yscale="log", xlabel="step", title=f"||w||/||g||, RMSprop, {column}")
        if bounded.lines:
            bounded.legend(fontsize=7)
        low, high = BOUNDS
        bounded.axhspan(low, high, color="black", alpha=0.08)
        return figure


def draw_ratios(axes: Axes, result: Result) -> None:
    """Draw each layer's ratio by step: a colour a layer, dotted for its bias."""
    for k, (name, values) in enumerate(result["raw_ratio"].items()):
        layer, _, kind = name.partition(".")
        known = [math.nan if value is None else value for value in values]
        axes.plot(
            range(1, len(known) + 1),
            known,
            color=COLORS[k // 2],
            linestyle="-" if kind == "weight" else ":",
            label=layer if kind == "weight" else None,
        )


def paired(results: Sequence[Result]) -> Table:
    """Make the table of bounded minus plain, a run that diverged counting as 0 percent."""
    rows = []
    for solver in dict.fromkeys(each["settings"]["solver"] for each in results):
        bounded, plain = (
            [accuracy_or_zero(e) for e in of(results, solver) if e["settings"]["column"] == column]
            for column in ("bounded", "large")
        )
        if bounded:
            found = compare_pairs(bounded, plain)
            interval = "-"
            if len(found["differences"]) > 2:  # of two pairs it says nothing
                interval = "{:+.1f} to {:+.1f}".format(*found["interval"])
            each = ", ".join(f"{difference:+.1f}" for difference in found["differences"])
            rows.append((solver, each, f"{found['mean']:+.1f}", interval))
    return Table(("solver", "by seed", "mean", "95% interval"), rows)


class Rates(_Images):
    """Rates at the small batch, on validation images; no other is tuned."""

    name = "table3-rates"
    title = "Tuning for LIMIT's table 3: rates at batch 256"
    grid: Mapping[str, tuple[float, ...]] = {
        "momentum": (0.01, 0.02, 0.05),
        "adagrad": (0.04, 0.08, 0.16),
        "rmsprop": (2e-3, 4e-3, 8e-3),
        "adam": (8e-3, 16e-3, 32e-3),
        "lars": (4.0, 8.0, 16.0),
    }

    def cases(self, size: Size) -> list[Case]:
        """List a run for each rate, of half the table's epochs."""
        if size != "full":
            return []
        return [
            Case(
                f"{solver}-{lr:g}",
                settings(solver, SMALL, None, TUNING_SEED, RATE_EPOCHS, lr=lr, split="validation"),
            )
            for solver, rates in self.grid.items()
            for lr in rates
        ]

    def tables(self, results: Sequence[Result]) -> dict[str, Table]:
        """Make a row a solver."""
        rows = [
            (
                solver,
                *(f"{each['settings']['lr']:g}: {cell([each])}" for each in of(results, solver)),
            )
            for solver in self.grid
        ]
        return {"Validation accuracy by rate": Table(("solver", *3 * ("rate: accuracy",)), rows)}

    def draw(self, results: Sequence[Result]) -> Figure:
        """Draw accuracy by rate."""
        figure, (axes,) = new_figure(1)
        for k, solver in enumerate(self.grid):
            mine = of(results, solver)
            axes.plot(
                [each["settings"]["lr"] / self.grid[solver][0] for each in mine],
                [accuracy_or_zero(each) for each in mine],
                marker="o",
                color=COLORS[k],
                label=f"{solver}, from {self.grid[solver][0]:g}",
            )
        axes.set(xscale="log", xlabel="rate, of the smallest", ylabel="validation accuracy")
        axes.legend()
        return figure


def columns(solver: str) -> Iterable[tuple[str, int, Any]]:
    """List a row's columns: name, batch size, trust."""
    yield "small", SMALL, None
    yield "large", LARGE, None
    if solver in SOLVERS:
        yield "layer-wise", LARGE, "layer-wise"
        yield "bounded", LARGE, BOUNDS


def of(results: Sequence[Result], solver: str) -> list[Result]:
    """Results of one solver."""
    return [each for each in results if each["settings"]["solver"] == solver]


def accuracy_or_zero(result: Result) -> float:
    """Accuracy at the end, 0 of a run that diverged."""
    return 0.0 if result["final"] is None else float(result["final"])


def cell(results: Sequence[Result]) -> str:
    """Mean, and the seeds' range where there are several; how many diverged."""
    finals = [each["final"] for each in results if each["diverged"] is None]
    if not results:
        return "-"
    if not finals:
        return "diverges"
    text = f"{mean(finals):.1f}"
    if len(finals) > 1:
        text += f", {min(finals):.1f} to {max(finals):.1f}"
    if len(finals) < len(results):
        text += f"; {len(results) - len(finals)} of {len(results)} diverge"
    return text
