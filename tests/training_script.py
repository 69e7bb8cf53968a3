"""A user's training script: LeNet, mixed precision, LEGW's schedule, a checkpoint in the middle.

    python tests/training_script.py OPTIMIZER PRECISION FILE [--until STEP] [--resume FILE]

It leaves model, optimizer, scheduler and scaler in FILE.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from date_optim import DATE, LAMB, LARS, Recipe

STEPS = 10

SCALES = {"bfloat16": 2.0**16, "float16": 2.0**20}
"""In float16 the first gradients overflow, and others whenever the scale has grown back."""

OPTIMIZERS: dict[str, Any] = {
    "LARS": LARS,
    "LAMB": LAMB,
    "DATE": partial(DATE, rule="rmsprop"),
}


def lenet() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(16, 1, 28, 28, generator=generator)
    return images, torch.randint(10, (16,), generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("optimizer", choices=OPTIMIZERS)
    parser.add_argument("precision", choices=["bfloat16", "float16"])
    parser.add_argument("file")
    parser.add_argument("--until", type=int, default=STEPS)
    parser.add_argument("--resume")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = lenet()
    optimizer = OPTIMIZERS[arguments.optimizer](model.named_parameters(), lr=0.01, fused=True)
    recipe = Recipe(batch_size=4, lr=0.01, warmup_epochs=0.5, epochs=4, samples=40)
    scheduler = recipe.at(batch_size=16).scheduler(optimizer)
    scale = SCALES[arguments.precision]
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    parts: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "scaler": scaler,
    }
    first = 0
    if arguments.resume:
        saved = torch.load(arguments.resume, weights_only=True)
        first = saved.pop("step")
        for key, of in saved.items():
            parts[key].load_state_dict(of)
    for number in range(first, arguments.until):
        images, targets = batch(number)
        optimizer.zero_grad()
        with torch.autocast("cpu", getattr(torch, arguments.precision)):
            loss = nn.functional.cross_entropy(model(images), targets)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
    states = {key: part.state_dict() for key, part in parts.items()}
    torch.save({"step": arguments.until, **states}, arguments.file)


if __name__ == "__main__":
    main()
