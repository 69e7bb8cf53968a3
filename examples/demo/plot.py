"""The document as one picture; colours of Okabe and Ito, told apart by colour-blind eyes too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

METHOD_COLORS = {
    "small": "#000000",
    "plain": "#0072B2",
    "unbounded": "#D55E00",
    "bounded": "#009E73",
}
LAYER_COLORS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7")
KIND_STYLES: dict[str, Literal["-", ":"]] = {"weight": "-", "bias": ":"}

STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
}

MOSAIC = """
vvvttt
rrbbuu
"""
"""Where each panel stands: validation, test, rate, bounded, unbounded."""


def draw(document: dict[str, Any], path: Path) -> None:
    """Draw accuracies, learning rates and trust ratios of `document` into the PNG file `path`."""
    settings = document["settings"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplot_mosaic(MOSAIC, figsize=(11, 7), layout="constrained")
        _draw_validation(axes["v"], document)
        _draw_test(axes["t"], document)
        _draw_rates(axes["r"], document)
        _draw_ratios(axes["b"], document, "bounded")
        _draw_ratios(axes["u"], document, "unbounded")
        axes["u"].legend(handles=_layer_handles(document), ncols=2, loc="best")
        figure.suptitle(
            f"LeNet-5 on {document['data']['name']}, RMSprop, {settings['epochs']} epochs: "
            f"one recipe for batch {settings['batch_size']}, "
            f"scaled to {settings['large_batch_size']}",
            fontsize=12,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _draw_validation(axes: Axes, document: dict[str, Any]) -> None:
    for key, method in document["methods"].items():
        runs = [run for run in document["runs"] if run["method"] == key]
        epochs, curves = runs[0]["epochs"], np.array([run["validation"] for run in runs])
        color = METHOD_COLORS[key]
        label = f"{method['batch_size']} {method['label']}"
        axes.plot(epochs, curves.mean(axis=0), color=color, label=label)
        axes.fill_between(
            epochs, curves.min(axis=0), curves.max(axis=0), color=color, alpha=0.18, linewidth=0
        )
    axes.set_title("Validation accuracy, %: mean and range over the seeds", pad=20)
    axes.set(xlabel="epoch", xlim=(0, None), ylim=(0, 100))
    axes.legend(  # between title and axes: inside, no corner is free on every data set
        loc="lower left",
        bbox_to_anchor=(-0.01, 0.99),
        ncols=4,
        handlelength=1.2,
        columnspacing=1.2,
        borderaxespad=0,
    )


def _draw_test(axes: Axes, document: dict[str, Any]) -> None:
    for row, (key, method) in enumerate(document["methods"].items()):
        runs = [run for run in document["runs"] if run["method"] == key]
        accuracy, color = document["test_accuracy"][key], METHOD_COLORS[key]
        axes.barh(row, accuracy["mean"], height=0.42, color=color, alpha=0.25)
        axes.plot([run["test"] for run in runs], [row] * len(runs), "o", color=color, markersize=4)
        axes.text(0.5, row - 0.28, f"batch {method['batch_size']}, {method['label']}", va="bottom")
        axes.annotate(
            f"{accuracy['mean']:.1f}",
            (accuracy["range"][1], row),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontweight="bold",
        )
    axes.set(
        title="Test accuracy at the end, %: mean (bar) and each seed",
        xlim=(0, 110),
        ylim=(len(document["methods"]) - 0.7, -0.6),
        xticks=range(0, 101, 20),
        yticks=[],
    )
    axes.spines["left"].set_visible(False)


def _draw_rates(axes: Axes, document: dict[str, Any]) -> None:
    for key in ("small", "plain"):
        method = document["methods"][key]
        samples = np.arange(1, len(method["lr"]) + 1) * method["batch_size"]
        axes.plot(
            samples / document["data"]["train"],
            np.array(method["lr"]) * 1e3,
            color=METHOD_COLORS[key],
            label=f"batch {method['batch_size']}" + (", all three" if key == "plain" else ""),
        )
    axes.set(title="Learning rate, in thousandths", xlabel="epoch", xlim=(0, None), ylim=(0, None))
    axes.legend(loc="best")


def _draw_ratios(axes: Axes, document: dict[str, Any], key: str) -> None:
    method = document["methods"][key]
    run = next(run for run in document["runs"] if run["method"] == key)
    for name, ratios in run["raw_ratio"].items():
        layer, kind = name.split(".")
        axes.plot(
            range(1, len(ratios) + 1),
            np.array(ratios, dtype=float),
            color=_layer_colors(document)[layer],
            linestyle=KIND_STYLES[kind],
        )
    title = f"Trust ratio, unbounded, seed {run['seed']}"
    if key == "bounded":
        title = f"Trust ratio before its bounds (shaded), seed {run['seed']}"
        axes.axhspan(*method["bounds"], color="#000000", alpha=0.09, linewidth=0)
        for bound in method["bounds"]:
            axes.axhline(bound, color="#000000", linewidth=0.8)
    axes.set(title=title, xlabel=f"step at batch {method['batch_size']}", yscale="log")


def _layer_colors(document: dict[str, Any]) -> dict[str, str]:
    run = next(run for run in document["runs"] if run["raw_ratio"])
    layers = dict.fromkeys(name.split(".")[0] for name in run["raw_ratio"])
    return dict(zip(layers, LAYER_COLORS, strict=True))


def _layer_handles(document: dict[str, Any]) -> list[Line2D]:
    return [
        *(
            Line2D([], [], color=color, label=layer)
            for layer, color in _layer_colors(document).items()
        ),
        *(
            Line2D([], [], color="#555555", linestyle=style, label=kind)
            for kind, style in KIND_STYLES.items()
        ),
    ]
