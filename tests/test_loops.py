"""Training loops of every kind beside torch's optimizer in the same loop, both with plain rules.

The yardstick is torch itself, as in torch_runs: at most twice as far from the same loop in float64
as torch's own float32 run is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import date_optim

Class = Callable[..., Optimizer]
Loop = Callable[[Class, nn.Sequential, "list[tuple[Tensor, Tensor]]"], "list[Tensor]"]

STEPS = 12


def backward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    loss = nn.functional.mse_loss(model(batch[0]), batch[1])
    loss.backward()  # type: ignore[no-untyped-call]


def accumulation(
    make: Class, model: nn.Sequential, batches: list[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """Three backward passes a step."""
    optimizer = make(model.parameters())
    for number, batch in enumerate(batches, 1):
        backward(model, batch)
        if number % 3 == 0:
            optimizer.step()
            optimizer.zero_grad(set_to_none=number % 2 == 0)
    return [*model.parameters()]


def averages(
    make: Class, model: nn.Sequential, batches: list[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """Exponential and equal averages, which read the weights after every step."""
    optimizer = make(model.parameters())
    moving: Any = get_ema_multi_avg_fn(0.9)  # type: ignore[no-untyped-call]
    copies = [AveragedModel(model, multi_avg_fn=moving), AveragedModel(model)]
    for batch in batches:
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()
        for copy in copies:
            copy.update_parameters(model)
    return [parameter for each in (model, *copies) for parameter in each.parameters()]


def freezing(
    make: Class, model: nn.Sequential, batches: list[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """A layer that is frozen from the start, for a while, and one that is frozen later."""
    optimizer = make(model.parameters())
    model[0].requires_grad_(False)
    for number, batch in enumerate(batches):
        if number == STEPS // 3:
            model[0].requires_grad_(True)
        if number == 2 * STEPS // 3:
            model[2].requires_grad_(False)
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()
    return [*model.parameters()]


def two_optimizers(
    make: Class, model: nn.Sequential, batches: list[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """One for the matrices, one for all else, the second every other step."""
    matrices = make([p for p in model.parameters() if p.ndim > 1])
    others = make([p for p in model.parameters() if p.ndim == 1])
    for number, batch in enumerate(batches):
        model.zero_grad()
        backward(model, batch)
        matrices.step()
        if number % 2:
            others.step()
    return [*model.parameters()]


def a_group_added(
    make: Class, model: nn.Sequential, batches: list[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """The first layer comes later."""
    optimizer = make(model[2].parameters())
    for number, batch in enumerate(batches):
        if number == STEPS // 2:
            optimizer.add_param_group({"params": [*model[0].parameters()]})
        model.zero_grad()
        backward(model, batch)
        optimizer.step()
    return [*model.parameters()]


def clipping(
    make: Class, model: nn.Sequential, batches: list[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """By torch's own function, between the backward pass and the step."""
    optimizer = make(model.parameters())
    for batch in batches:
        optimizer.zero_grad()
        backward(model, batch)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return [*model.parameters()]


LOOPS: list[Loop] = [accumulation, averages, freezing, two_optimizers, a_group_added, clipping]

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "RMSprop": {"lr": 0.01, "eps": 1e-3, "momentum": 0.5},
    "Adagrad": {"lr": 0.05, "eps": 1e-3},
    "Adam": {"lr": 0.01, "eps": 1e-3, "amsgrad": True},
    "AdamW": {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.1},
    "Adadelta": {"lr": 0.5, "eps": 1e-3},
}


def run(loop: Loop, cls: Class, options: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """All weights that the loop leaves, in float64."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        # Drawn in float32: both dtypes begin with the same numbers.
        return torch.randn(shape, generator=generator).to(dtype)

    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(random(*parameter.shape) / 3)
    batches = [(random(6, 5), random(6, 3)) for _ in range(STEPS)]
    found = loop(lambda params: cls(params, **options), model, batches)
    return torch.cat([x.detach().double().flatten() for x in found])


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_ends_where_torchs_ends(loop: Loop, name: str) -> None:
    ours, torchs = getattr(date_optim, name), getattr(torch.optim, name)
    options = OPTIMIZERS[name]
    exact = run(loop, torchs, {**options, "foreach": False}, torch.float64)
    single = run(loop, torchs, {**options, "foreach": False}, torch.float32)
    own = run(loop, ours, options, torch.float32)
    assert (own - exact).norm() <= 2 * (single - exact).norm()
    assert (own - exact).norm() > 0
