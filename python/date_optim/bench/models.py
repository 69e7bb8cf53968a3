"""Shapes of real models' parameters, and parameters of those shapes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files

import torch
from torch import Tensor

Shape = Sequence[int]

_FOLDER = files(__package__).joinpath("shapes")
MODELS = tuple(sorted(file.name.removesuffix(".json") for file in _FOLDER.iterdir()))
"""Names of all models."""


def shapes_of(model: str) -> list[list[int]]:
    """Return the shapes of a model's parameters.

    Parameters
    ----------
    model : str
        One of `MODELS`.
    """
    text = _FOLDER.joinpath(f"{model}.json").read_text(encoding="utf-8")
    shapes: list[list[int]] = json.loads(text)["shapes"]
    return shapes


def sizes_of(shapes: Sequence[Shape]) -> list[int]:
    """Return the number of elements of each shape."""
    return [torch.Size(shape).numel() for shape in shapes]


def parameters(shapes: Sequence[Shape], device: str) -> list[Tensor]:
    """Make float32 parameters with gradients: the same numbers on every device.

    Weights have a deviation of 0.02 and gradients of 0.01. A large tensor repeats 2^20 drawn
    numbers, since drawing takes longer than timing.
    """
    generator = torch.Generator().manual_seed(0)
    params: list[Tensor] = []
    for shape in shapes:
        size = torch.Size(shape).numel()
        drawn = torch.randn(2, min(size, 1 << 20), generator=generator)
        repeats = -(-size // drawn.shape[1])
        weight, gradient = (
            (scale * x).to(device).repeat(repeats)[:size].reshape(torch.Size(shape))
            for scale, x in zip((0.02, 0.01), drawn, strict=True)
        )
        param = torch.nn.Parameter(weight)
        param.grad = gradient
        params.append(param)
    return params
