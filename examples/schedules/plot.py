"""Draw every warm-up, every decay, and the papers' recipes scaled to other batch sizes.

    .venv/bin/python examples/schedules/plot.py [--out docs]

writes schedules.png and schedules_recipes.png, the pictures of docs/schedules.md.
"""

from __future__ import annotations

import argparse
import sys
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo.plot import STYLE
from matplotlib import pyplot as plt
from matplotlib.layout_engine import ConstrainedLayoutEngine

from date_optim.recipe import Recipe
from date_optim.schedules import (
    Constant,
    ConstantWarmup,
    Cosine,
    Cyclical,
    Decay,
    Exponential,
    MultiStep,
    Polynomial,
    RollerCoaster,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#000000")
"""Of Okabe and Ito, told apart by colour-blind eyes too."""

BATCH_COLORS = ("#6BAED6", "#3182BD", "#08519C", "#FD8D3C", "#E6550D", "#A63603")
"""From small to large."""

BASELINE: dict[str, Any] = {
    "batch_size": 30,
    "lr": 0.1**0.5,
    "warmup_epochs": 1,
    "epochs": 90,
    "samples": 90_000,
}
BATCH = 300
"""What the curves are drawn on: 90 epochs of 300 iterations at this batch, 10 warm up to peak 1."""

WARMUPS: dict[str, Any] = {
    "linear": "linear",
    "quadratic": "quadratic",
    "cosine": "cosine",
    "constant": "constant",
    "ConstantWarmup(0.5)": ConstantWarmup(0.5),
}

FALLING: dict[str, Decay] = {
    "RollerCoaster()": RollerCoaster(),
    "Polynomial(2)": Polynomial(2),
    "Polynomial(2, shifted=False)": Polynomial(2, shifted=False),
    "Polynomial(0.5)": Polynomial(0.5),
    "Cosine()": Cosine(),
    "Constant()": Constant(),
    "RollerCoaster(paper_printed=True)": RollerCoaster(paper_printed=True),
}
STEPPING: dict[str, Decay] = {
    "MultiStep([30, 60, 80])": MultiStep([30, 60, 80]),
    "MultiStep([40, 65], gamma=0.5)": MultiStep([40, 65], gamma=0.5),
    "Exponential(0.9, hold=20)": Exponential(0.9, hold=20),
    "MultiStep([30, 60, 80], inclusive=False)": MultiStep([30, 60, 80], inclusive=False),
}
CYCLING: dict[str, Decay] = {
    "Cosine(period=20)": Cosine(period=20),
    "Cyclical(0.1, 20)": Cyclical(0.1, 20),
    "Cyclical(0.1, 20, from_peak=True)": Cyclical(0.1, 20, from_peak=True),
}

DASHED = ("RollerCoaster(paper_printed=True)", "MultiStep([30, 60, 80], inclusive=False)")
"""The second lies on another line: it falls one iteration later."""

LENET = Recipe(
    batch_size=1024, lr=1.25e-3, warmup_epochs=2, epochs=30, samples=60_000, iterations=1755
)
"""DATE 3.6."""


def resnet(decay: Decay) -> Recipe:
    """LEGW's ResNet-50 on ImageNet."""
    return Recipe(1024, 2**2.5, warmup_epochs=10 / 2**5, epochs=90, samples=1_281_167, decay=decay)


def draw_curves() -> Figure:
    """Every warm-up and every decay on one baseline."""
    figure, panels = plt.subplots(
        2, 2, figsize=(11, 9.2), layout=ConstrainedLayoutEngine(h_pad=0.12), sharey=True
    )
    (warmups, falling), (stepping, cycling) = panels
    for (label, warmup), color in zip(WARMUPS.items(), COLORS, strict=False):
        recipe = Recipe(**BASELINE, warmup=warmup, decay=Constant()).at(BATCH)
        draw_run(warmups, recipe, until=15, color=color, label=label)
    warmups.set(title="Warm-ups: Recipe(..., warmup=...)", xlim=(0, 15))
    for axes, decays in ((falling, FALLING), (stepping, STEPPING), (cycling, CYCLING)):
        for (label, decay), color in zip(decays.items(), cycle(COLORS)):
            recipe = Recipe(**BASELINE, decay=decay).at(BATCH)
            style = "--" if label in DASHED else "-"
            draw_run(axes, recipe, color=color, label=label, linestyle=style)
        axes.set(xlim=(0, BASELINE["epochs"]))
    falling.set(title="Decays: Recipe(..., decay=...)")
    stepping.set(title="Decays in steps")
    cycling.set(title="Cycles")
    for axes in panels.flat:
        axes.set(xlabel="epoch", ylim=(0, 1.05))
        axes.axvline(recipe.warmup_epochs, color="#000000", linewidth=0.8, linestyle=":")
        axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.14), ncols=2)  # none fits inside
    for axes in panels[:, 0]:
        axes.set_ylabel("learning rate / peak")
    return figure


def draw_recipes() -> Figure:
    """The papers' baselines at other batch sizes."""
    figure, ((lenet, start), (polynomial, steps)) = plt.subplots(
        2, 2, figsize=(11, 7.4), layout="constrained"
    )
    for B, color in zip((256, 512, 1024, 2048, 4096, 8192), BATCH_COLORS, strict=True):
        draw_run(lenet, LENET.at(B), scale=1e3, color=color, label=f"{B}")
    lenet.set(title="DATE, LeNet on MNIST: the roller coaster", xlabel="epoch", xlim=(0, 30))
    lenet.set_ylabel("learning rate, in thousandths")

    batches = [1024 * 2**power for power in range(6)]
    for B, color in zip(batches, BATCH_COLORS, strict=True):
        label = f"{B // 1024}K"
        squared, stepped = resnet(Polynomial(2)).at(B), resnet(MultiStep([30, 60, 80])).at(B)
        start.plot(range(1, 801), [squared.lr(i) for i in range(1, 801)], color=color, label=label)
        draw_run(polynomial, squared, color=color, label=label)
        draw_run(steps, stepped, color=color, label=label)
    start.set(
        title="LEGW, ResNet-50, excerpt: 391 warm-up iterations at any batch",
        xlabel="iteration",
        ylabel="learning rate",
        xlim=(0, 800),
    )
    polynomial.set(title="The same run in epochs, Polynomial(2)", xlabel="epoch", xlim=(0, 90))
    steps.set(title="The same baseline, MultiStep([30, 60, 80])", xlabel="epoch", xlim=(0, 90))
    polynomial.set_ylabel("learning rate")
    for axes in (lenet, start, polynomial, steps):
        axes.set_ylim(0, None)
        place = "upper left" if axes is start else "upper right"
        axes.legend(title="batch size", loc=place, alignment="left")
    return figure


def draw_run(
    axes: Axes, recipe: Recipe, until: float | None = None, scale: float = 1.0, **line: Any
) -> None:
    """Plot the rate of each iteration against the epoch at which it ends."""
    per_epoch = recipe.baseline.samples / recipe.batch_size
    steps = range(1, (recipe.iterations if until is None else int(until * per_epoch)) + 1)
    axes.plot([i / per_epoch for i in steps], [scale * recipe.lr(i) for i in steps], **line)


PICTURES: dict[str, Callable[[], Figure]] = {
    "schedules.png": draw_curves,
    "schedules_recipes.png": draw_recipes,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=Path("docs"), help="default: %(default)s")
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for name, draw in PICTURES.items():
            figure = draw()
            figure.savefig(out / name, dpi=130)
            plt.close(figure)
            print(out / name)


if __name__ == "__main__":
    main()
