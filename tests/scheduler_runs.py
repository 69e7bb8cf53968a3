"""Optimizers whose rates a scheduler owns, and what the rates were."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler


def optimizer(*scales: float, lr: Any = 0.7) -> torch.optim.Optimizer:
    """One group per scale; a scale of 1 is left to the default."""
    groups = [
        {
            "params": [torch.nn.Parameter(torch.ones(2))],
            **({} if scale == 1.0 else {"lr_scale": scale}),
        }
        for scale in scales or (1.0,)
    ]
    if isinstance(lr, torch.Tensor):
        for group in groups:
            group["lr"] = lr.clone()
    return torch.optim.SGD(groups, lr=lr)


def rates(opt: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in opt.param_groups]


def advance(opt: torch.optim.Optimizer, scheduler: LRScheduler, steps: int) -> list[list[float]]:
    """The rates that each of `steps` optimizer steps used."""
    used = []
    for _ in range(steps):
        used.append(rates(opt))
        opt.step()
        scheduler.step()
    return used
