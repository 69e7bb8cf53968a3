"""Runs a recipe of docs/trainers.md in a process of its own.

``python -m integrations.worker HEADING NUMBER FOLDER [RESUME]`` leaves the model's parameters and
what the steps found in ``FOLDER/result.pt``, or in ``resumed.pt`` if it went on from a checkpoint.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from integrations.recipes import DOCUMENT, blocks, declare_operators_of_torchvision
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.data import DataLoader, TensorDataset

from date_optim.optimizer import LayerwiseOptimizer

SAMPLES, CLASSES = 80, 10

OF_OTHERS = (
    "'pin_memory' argument is set as true but no accelerator is found",  # transformers
    # Lightning
    "Starting from v1.9.0, `tensorboardX` has been removed",
    "Checkpoint directory .* exists and is not empty",
    "Precision bf16-mixed is not supported by the model summary",
    "The .* does not have many workers",
    "The number of training batches .* is smaller than the logging interval",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)
"""Warnings of the tools about themselves or the machine."""


def mlp(dropout: float) -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(16, 32),
        torch.nn.LayerNorm(32),
        torch.nn.ReLU(),
        torch.nn.Dropout(dropout),
        torch.nn.Linear(32, CLASSES),
    )


def loader(*shape: int, batch_size: int = 8, shuffle: bool = False) -> Any:
    labels = torch.arange(SAMPLES) % CLASSES
    data = TensorDataset(torch.randn(SAMPLES, *shape), labels)
    return DataLoader(data, batch_size=batch_size, shuffle=shuffle)


def timm() -> dict[str, Any]:
    return {"loader": loader(3, 32, 32)}


def trainer() -> dict[str, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415 (where it is installed)

    config = GPT2Config(
        vocab_size=32,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    tokens = torch.randint(32, (SAMPLES, 16))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    return {"model": GPT2LMHeadModel(config), "data": data}


def accelerate() -> dict[str, Any]:
    return {"model": mlp(dropout=0.1), "loader": loader(16, batch_size=4, shuffle=True)}


def lightning() -> dict[str, Any]:
    from lightning import LightningModule  # noqa: PLC0415 (likewise)

    model = mlp(dropout=0.0)  # Lightning's checkpoints hold no state of random numbers

    class Module(LightningModule):  # type: ignore[misc] # of no type where it is not installed
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
            inputs, labels = batch
            return cross_entropy(self.model(inputs), labels)

    return {"model": model, "Module": Module, "loader": loader(16)}


NAMES: dict[str, Callable[[], dict[str, Any]]] = {
    "timm": timm,
    "Hugging Face Trainer": trainer,
    "Accelerate": accelerate,
    "Lightning": lightning,
}
"""What the recipes below each heading find there."""


def watch() -> dict[str, list[Any]]:
    """Note what each step of an optimizer of ours is given."""
    seen: dict[str, list[Any]] = {"lr": [], "scale": [], "closure": [], "norm": []}

    def before(optimizer: Any, args: Any, kwargs: Any) -> None:
        if isinstance(optimizer, LayerwiseOptimizer):
            groups = optimizer.param_groups
            seen["lr"].append([group["lr"] for group in groups])
            seen["scale"].append([group.get("lr_scale", 1.0) for group in groups])
            seen["closure"].append(any(map(callable, (*args, *kwargs.values()))))

    def after(optimizer: Any, *_: Any) -> None:
        if isinstance(optimizer, LayerwiseOptimizer):
            params = [param for group in optimizer.param_groups for param in group["params"]]
            grads = [param.grad for param in params if param.grad is not None]
            seen["norm"].append(torch.nn.utils.get_total_norm(grads).item())

    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)
    return seen


def main(heading: str, number: str, folder: str, resume: str | None = None) -> None:
    warnings.simplefilter("error")
    for message in OF_OTHERS:
        warnings.filterwarnings("ignore", message)
    declare_operators_of_torchvision()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    names: dict[str, Any] = {"folder": folder, "resume": resume, "loss": cross_entropy}
    names |= NAMES[heading]()
    seen = watch()
    for text in (*blocks(""), blocks(heading)[int(number)]):
        exec(compile(text, DOCUMENT, "exec"), names)
    params = [param.detach() for param in names["model"].parameters()]
    torch.save((params, seen), Path(folder) / ("resumed.pt" if resume else "result.pt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
