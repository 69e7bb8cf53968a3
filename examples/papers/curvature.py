"""LEGW's section 4: where the loss is curved most along its gradient, by batch size.

Momentum at a constant rate without a warm-up; every so many steps the curvature along the gradient
of the same few images, and the distance from the initial weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from demo.model import make_lenet5
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy

from date_optim.diagnostics import Distance, curvature_along_gradient

from .images import Classification, load_images
from .pictures import COLORS, new_figure
from .study import Case, Result, Size, Study, Table

BATCH_SIZES = (512, 1024, 2048, 4096)
SMALL, LR = 256, 0.01
SEED = 0
IMAGES = 512
"""Whose loss is looked at."""

EPOCHS: Mapping[Size, float] = {"full": 6, "quick": 2, "slice": 0.2}
EVERY_STEP = 50
"""The first ones, since a small batch peaks among them; later ones less often."""
PROBES = 60
"""Among the later ones."""


class Probed(Classification):
    """LeNet-5, looked at as it trains."""

    def __init__(self, settings: Mapping[str, Any], data: Path | None, device: str) -> None:
        super().__init__(make_lenet5, settings, load_images(data, device), device)
        self.distance = Distance(self.model.named_parameters())
        self.every = -(-self.recipe.iterations // PROBES)

    def loss(self) -> Tensor:
        """Loss of the images that are looked at."""
        train = self.data.train
        return cross_entropy(self.model(train.images[:IMAGES]), train.labels[:IMAGES])

    def probe(self, step: int) -> dict[str, float]:
        """Curvature and distance."""
        if step >= EVERY_STEP and (step + 1) % self.every:
            return {}
        found = curvature_along_gradient(self.model.parameters(), self.loss)
        return {
            "curvature": found.value,
            "gradient_norm": found.gradient_norm,
            "distance": self.distance.total(),
        }

    def carried(self) -> dict[str, Any]:
        """The initial weights."""
        return {"start": self.distance.start}

    def carry(self, state: dict[str, Any]) -> None:
        """Take up the initial weights."""
        self.distance = Distance(self.model.named_parameters(), state["start"])


class CurvatureStudy(Study):
    """The study."""

    name = "curvature"
    title = "LEGW, section 4: curvature along the gradient, batch 512 to 4096"

    def cases(self, size: Size) -> list[Case]:
        """List a run for each batch size."""
        sizes = BATCH_SIZES if size != "slice" else BATCH_SIZES[:1]
        return [
            Case(
                str(batch_size),
                {
                    "solver": "momentum",
                    "trust": None,
                    "batch_size": batch_size,
                    "base_batch_size": SMALL,
                    "lr": LR,
                    "warmup_epochs": 0.0,
                    "decay": "constant",
                    "epochs": EPOCHS[size],
                    "seed": SEED,
                    "split": "validation",
                },
            )
            for batch_size in sizes
        ]

    def training(self, settings: Mapping[str, Any], data: Path | None, device: str) -> Probed:
        """Make LeNet-5 and its training."""
        return Probed(settings, data, device)

    def tables(self, results: Sequence[Result]) -> dict[str, Table]:
        """Make a row for each batch size: where the curvature is largest."""
        head = ("batch", "highest L(x, g)", "at step", "at epoch", "distance at the end")
        rows = []
        for each in results:
            probes = each["probes"]
            known = [(x, i) for i, x in enumerate(probes.get("curvature", ())) if x is not None]
            cells = ["-"] * 4
            if known:
                highest, i = max(known)
                step, epoch, end = probes["step"][i], probes["epoch"][i], probes["distance"][-1]
                cells = [f"{highest:.3g}", f"{step:.0f}", f"{epoch:.2f}", f"{end:.2f}"]
            rows.append((str(each["settings"]["batch_size"]), *cells))
        return {"Curvature along the gradient": Table(head, rows)}

    def draw(self, results: Sequence[Result]) -> Figure:
        """Draw curvature and distance over epochs."""
        figure, (curvature, distance) = new_figure(2)
        for k, each in enumerate(results):
            probes, label = each["probes"], str(each["settings"]["batch_size"])
            for axes, name in ((curvature, "curvature"), (distance, "distance")):
                values = [math.nan if x is None else x for x in probes.get(name, ())]
                axes.plot(probes.get("epoch", ()), values, color=COLORS[k], label=label)
        curvature.set(xlabel="epoch", ylabel="L(x, g) = g'Hg/||g||^2", yscale="symlog")
        distance.set(xlabel="epoch", ylabel="distance from the initial weights")
        distance.legend(title="batch size")
        return figure
