"""LEGW's MNIST-LSTM: one tuned batch size, scaled 64 times at a constant rate.

At each batch size LEGW is held against what the paper holds it against: linear scaling, linear
scaling with a quadratic decay, the same with a warm-up of a fifth of the run; at the largest one
also against momentum, Adam and Adadelta, each at the rate of `TUNED` that was best there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .images import Classification, load_images
from .models import ImageLstm
from .pictures import COLORS, new_figure
from .study import Case, Result, Size, Study, Table
from .table3 import accuracy_or_zero, cell

SMALL, LARGE = 128, 8192
BATCH_SIZES = tuple(SMALL * 2**i for i in range(7))
TUNING_SEED, SEED = 100, 0

EPOCHS: Mapping[Size, int] = {"full": 8, "quick": 2, "slice": 1}
"""The paper takes 25."""

LR = 0.1
"""Of momentum at the small batch; chosen by `LstmRates`."""

WARMUP = 1 / 320
"""Of a run's epochs at the small batch: a fifth of them at the largest one, by LEGW."""

TUNED: Mapping[str, tuple[float, ...]] = {
    "momentum": (0.1, 0.2, 0.4, 0.8, 1.6),
    "adam": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    "adadelta": (0.5, 1.0, 2.0),
}
"""Rates that are tried at the largest batch, on validation images."""


def settings(batch_size: int, seed: int, epochs: int, **others: Any) -> dict[str, Any]:
    """Settings of one run, LEGW's but for those of `others`."""
    return {
        "solver": "momentum",
        "trust": None,
        "batch_size": batch_size,
        "base_batch_size": SMALL,
        "lr": LR,
        "scaling": "sqrt",
        "warmup_epochs": WARMUP * epochs,
        "decay": "constant",
        "epochs": epochs,
        "seed": seed,
        "split": "test",
        "options": {"max_grad_norm": 1.0},
        **others,
    }


def rivals(batch_size: int, epochs: int) -> dict[str, dict[str, Any]]:
    """What the paper holds LEGW against at every batch size: linear scaling, three ways."""
    linear = {"scaling": "linear", "warmup_epochs": 0.0}
    warm = {**linear, "decay": "poly 2", "warmup_epochs": epochs / 5 * SMALL / batch_size}
    return {
        "linear": linear,
        "linear, poly 2": {**linear, "decay": "poly 2"},
        "linear, poly 2, warm-up": warm,
    }


class _Lstm(Study):
    """What the two have in common."""

    def training(
        self, settings: Mapping[str, Any], data: Path | None, device: str
    ) -> Classification:
        """Make the LSTM and its training."""
        return Classification(ImageLstm, settings, load_images(data, device), device)


class Lstm(_Lstm):
    """The study."""

    name = "lstm"
    title = "LEGW, MNIST-LSTM: batch 128 to 8192 at a constant rate"

    def cases(self, size: Size) -> list[Case]:
        """List LEGW's run at each batch size, and the others' from eight times the smallest on."""
        epochs = EPOCHS[size]
        batch_sizes = {"full": BATCH_SIZES, "quick": (SMALL, 1024, LARGE), "slice": (LARGE,)}[size]
        found = []
        for batch_size in batch_sizes:
            ways: dict[str, dict[str, Any]] = {"LEGW": {}}
            if batch_size >= 1024:
                ways |= rivals(batch_size, epochs)
            found += [
                Case(
                    f"{way.replace(', ', '-').replace(' ', '')}-{batch_size}",
                    {**settings(batch_size, SEED, epochs, **others), "way": way},
                )
                for way, others in ways.items()
            ]
        return found

    def tables(self, results: Sequence[Result]) -> dict[str, Table]:
        """Make a row for each way, a column for each batch size."""
        batch_sizes = sorted({each["settings"]["batch_size"] for each in results})
        ways = list(dict.fromkeys(each["settings"]["way"] for each in results))

        def at(way: str, batch_size: int) -> list[Result]:
            return [
                each
                for each in results
                if (each["settings"]["way"], each["settings"]["batch_size"]) == (way, batch_size)
            ]

        head = ("way", *map(str, batch_sizes))
        rows = [(way, *(cell(at(way, each)) for each in batch_sizes)) for way in ways]
        return {"Test accuracy in percent by batch size": Table(head, rows)}

    def draw(self, results: Sequence[Result]) -> Figure:
        """Draw accuracy by batch size, and LEGW's curves."""
        figure, (accuracy, curves) = new_figure(2)
        for k, way in enumerate(dict.fromkeys(each["settings"]["way"] for each in results)):
            mine = [each for each in results if each["settings"]["way"] == way]
            accuracy.plot(
                [each["settings"]["batch_size"] for each in mine],
                [accuracy_or_zero(each) for each in mine],
                marker="o",
                color=COLORS[k],
                label=way,
            )
            if way == "LEGW":
                for each in mine:
                    label = str(each["settings"]["batch_size"])
                    curves.plot(each["epochs"], each["validation"], label=label)
        accuracy.set(xlabel="batch size", ylabel="test accuracy, percent; 0: diverged")
        accuracy.set_xscale("log", base=2)
        accuracy.legend()
        curves.set(xlabel="epoch", ylabel="validation accuracy", title="LEGW by batch size")
        curves.legend()
        return figure


class LstmRates(_Lstm):
    """Rates at the smallest batch and of what is tuned at the largest, on validation images."""

    name = "lstm-rates"
    title = "Tuning for MNIST-LSTM: LEGW at batch 128; momentum, Adam and Adadelta at 8192"
    grid = (0.02, 0.05, 0.1, 0.2)

    def cases(self, size: Size) -> list[Case]:
        """List a run for each rate."""
        if size != "full":
            return []
        epochs = EPOCHS[size]
        small = [
            Case(f"legw-{lr:g}", settings(SMALL, TUNING_SEED, epochs, lr=lr, split="validation"))
            for lr in self.grid
        ]
        large = [
            Case(
                f"{solver}-{lr:g}",
                settings(
                    LARGE,
                    TUNING_SEED,
                    epochs,
                    solver=solver,
                    lr=lr,
                    base_batch_size=LARGE,
                    warmup_epochs=0.0,
                    split="validation",
                ),
            )
            for solver, rates in TUNED.items()
            for lr in rates
        ]
        return small + large

    def tables(self, results: Sequence[Result]) -> dict[str, Table]:
        """Make a row a run."""
        rows = [
            (
                str(each["settings"]["batch_size"]),
                each["settings"]["solver"],
                f"{each['settings']['lr']:g}",
                cell([each]),
            )
            for each in results
        ]
        return {"Validation accuracy": Table(("batch", "solver", "rate", "percent"), rows)}

    def draw(self, results: Sequence[Result]) -> Figure:
        """Draw accuracy by rate."""
        figure, (axes,) = new_figure(1)
        kinds = dict.fromkeys(
            (each["settings"]["solver"], each["settings"]["batch_size"]) for each in results
        )
        for k, kind in enumerate(kinds):
            mine = [
                each
                for each in results
                if (each["settings"]["solver"], each["settings"]["batch_size"]) == kind
            ]
            axes.plot(
                [each["settings"]["lr"] for each in mine],
                [accuracy_or_zero(each) for each in mine],
                marker="o",
                color=COLORS[k],
                label=f"{kind[0]} at {kind[1]}",
            )
        axes.set(xscale="log", xlabel="rate", ylabel="validation accuracy; 0: diverged")
        axes.legend()
        return figure
