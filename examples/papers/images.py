"""Fashion-MNIST, a classifier of it, and its training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from demo.data import (
    PACKAGE_FOLDER,
    DataError,
    DataSet,
    Images,
    install_package,
    load_fashion_mnist,
)
from demo.train import add_gradients, measure_accuracy, sample_stream
from torch import nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from date_optim import Recipe
from date_optim.schedules import Constant, Decay, RollerCoaster

from .solvers import make_optimizer
from .training import Training

DECAYS: Mapping[str, Decay] = {
    "roller coaster": RollerCoaster(),
    "constant": Constant(),
}


@cache
def load_images(folder: Path | None, device: str) -> DataSet:
    """Load Fashion-MNIST: 55,000 + 5,000 + 10,000 images.

    Raises
    ------
    DataError
        If they are not there and Debian's package cannot be installed, or are others.
    """
    if folder is None and not PACKAGE_FOLDER.is_dir():
        try:
            install_package(lambda _: None)
        except DataError as error:
            raise DataError(
                f"{error}. apt-get install dataset-fashion-mnist brings Fashion-MNIST; --data DIR "
                "takes its four idx files"
            ) from error
    data = load_fashion_mnist(folder or PACKAGE_FOLDER)
    parts = (
        Images(each.images.to(device), each.labels.to(device))
        for each in (data.train, data.validation, data.test)
    )
    return DataSet(data.name, data.source, *parts)


class Classification(Training):
    """A classifier under one solver and recipe.

    Parameters
    ----------
    make_model : callable
        Makes the model, whose inputs are images of shape (n, 1, 28, 28).
    settings : mapping
        ``solver``, ``trust``, ``batch_size``, ``seed``; ``lr``, ``warmup_epochs`` and
        ``base_batch_size`` of the recipe's baseline, ``epochs``; where they are others than the
        recipe's default ``decay``, a key of `DECAYS`; ``options`` of the
        optimizer.
    data : DataSet
    device : {"cpu", "cuda"}
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        settings: Mapping[str, Any],
        data: DataSet,
        device: str,
    ) -> None:
        self.data = data
        self.recipe = Recipe(
            batch_size=settings["base_batch_size"],
            lr=settings["lr"],
            warmup_epochs=settings["warmup_epochs"],
            epochs=settings["epochs"],
            samples=len(data.train),
            decay=DECAYS[settings.get("decay", "roller coaster")],
        ).at(settings["batch_size"])
        torch.manual_seed(settings["seed"])
        # Convolutions of so few channels take less time so, on a CPU.
        self.model = make_model().to(device)
        convert_conv2d_weight_memory_format(self.model, torch.channels_last)
        self.optimizer = make_optimizer(
            settings["solver"],
            settings["trust"],
            self.model.named_parameters(),
            lr=self.recipe.peak,
            **settings.get("options", {}),
        )
        count = self.recipe.iterations * self.recipe.batch_size
        generator = torch.Generator().manual_seed(settings["seed"])
        self.stream = sample_stream(len(data.train), count, generator).view(
            self.recipe.iterations, -1
        )

    def add_gradients(self, step: int) -> float:
        """Add the gradient of the mean loss of the step's images."""
        return add_gradients(self.model, self.data.train, self.stream[step])

    def evaluate(self, split: str) -> float:
        """Measure the accuracy in percent."""
        self.model.eval()
        accuracy = measure_accuracy(self.model, getattr(self.data, split))
        self.model.train()
        return accuracy
