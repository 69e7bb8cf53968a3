"""Optimizers of every class and kind of option, each with two groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import TF1, Options, random_tensors
from torch.nn import Parameter
from torch.optim import Optimizer
from torch_runs import give

from date_optim import (
    DATE,
    LAMB,
    LARS,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    AdamW,
    Lion,
    RMSprop,
    TrustRatio,
)
from date_optim.optimizer import LayerwiseOptimizer

CLASSES = (SGD, RMSprop, Adagrad, Adam, AdamW, Adadelta, Lion, LARS, LAMB)

TRUST = TrustRatio(lower=0.1, upper=2.0)
OF_UPDATE = TrustRatio(lower=0.1, upper=2.0, of="update")
SETUPS: dict[str, tuple[Any, Options]] = {
    "SGD": (SGD, {}),
    "momentum": (SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "dampening": (SGD, {"momentum": 0.9, "dampening": 0.5, "trust": TRUST}),
    "nesterov": (SGD, {"momentum": 0.9, "nesterov": True, "trust": TRUST, "exclude": "1d"}),
    "RMSprop": (RMSprop, {}),
    "RMSprop-all": (
        RMSprop,
        {"momentum": 0.9, "centered": True, "eps": 1e-2, "trust": TRUST, "max_grad_norm": 1.0},
    ),
    "RMSprop-TF1": (RMSprop, {**TF1, "trust": TRUST}),
    "Adagrad": (Adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.1, "trust": TRUST}),
    "Adam": (Adam, {}),
    "Adam-all": (Adam, {"amsgrad": True, "weight_decay": 0.1, "trust": OF_UPDATE}),
    "AdamW": (AdamW, {"trust": TRUST}),
    "Adadelta": (Adadelta, {"trust": OF_UPDATE}),
    "Lion": (Lion, {"weight_decay": 0.1, "trust": OF_UPDATE}),
    "adabound": (SGD, {"trust": TrustRatio(bounds="adabound", final=0.1, gamma=0.1)}),
    "phi": (SGD, {"trust": TrustRatio(weight_norm_bounds=(0.0, 10.0))}),
    "LARS": (LARS, {"weight_decay": 0.01, "coefficient": 0.1}),
    "LAMB": (LAMB, {"weight_decay": 0.01}),
    "DATE": (DATE, {}),
}
setups = pytest.mark.parametrize("name", SETUPS)

SHAPES = [(5, 4), (4,), ()]


def make(
    name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **group: Any
) -> tuple[LayerwiseOptimizer, list[Parameter]]:
    """Return an optimizer with two groups, and its parameters."""
    cls, options = SETUPS[name]
    params = [Parameter(weight) for weight in random_tensors(SHAPES, seed, dtype)]
    groups: Any = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]
    optimizer: LayerwiseOptimizer = cls(groups, lr=0.05, **{**options, **group})
    return optimizer, params


def give_gradients(params: list[Parameter], seed: int) -> None:
    """Give each parameter a gradient of its dtype."""
    give(params, random_tensors(SHAPES, seed, params[0].dtype))


def take_steps(optimizer: Optimizer, params: list[Parameter], *seeds: int) -> None:
    """Take a step on the gradients of each seed."""
    for seed in seeds:
        give_gradients(params, seed)
        optimizer.step()
