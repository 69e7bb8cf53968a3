"""Times the host's side of a step, its launches stubbed out, against torch's fused optimizers.

    python bench/host.py --output bench/results

What is left is what a training loop waits for on a GPU: gathering gradients and states, checking
that the tables still hold, and the words of the launch. torch's optimizers step over as many
parameters of as many dimensions, but without elements, so that their operators have nothing to
launch; counting AdamW's steps is left out. Without a GPU the Triton backend plans for tensors in
the CPU's memory. Contestants take turns, each with new gradients, for five steps: the first finds
other things in the processor's caches, as a step behind a backward pass does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from gpu import save

from date_kernels.triton_plan import TritonPlan
from date_optim import LAMB, LARS
from date_optim.bench.machine import processor
from date_optim.bench.models import shapes_of
from date_optim.bench.statistics import quantiles
from date_optim.optimizer import LayerwiseOptimizer

MODELS = ("resnet50", "bert-large", "many-tiny")
REPEATS = 101
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

CASES: dict[str, dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]]] = {
    "momentum": {
        "LARS": lambda p: LARS(p, lr=1e-3),
        "torch fused": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, fused=True),
    },
    "adam": {
        "LAMB": lambda p: LAMB(p, lr=1e-3),
        "torch fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    },
}
"""By base rule, what steps over the same parameters."""


@contextmanager
def no_launches() -> Iterator[None]:
    """Neither our kernel nor the count of AdamW's steps reaches a device."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        pass

    with (
        mock.patch.object(TritonPlan, "_launch", nothing),
        mock.patch.object(torch, "_foreach_add_", nothing),
    ):
        yield


def give_gradients(params: list[Tensor]) -> None:
    """New ones, as a backward pass leaves them: no Python object has seen them yet."""
    for param in params:
        param.grad = None
    torch.autograd.backward(params, [torch.empty_like(param) for param in params])


def make(name: str, params: list[Tensor], rule: str) -> torch.optim.Optimizer:
    """A contestant, past the steps in which it makes its states and tables."""
    optimizer = CASES[rule][name](params)
    if isinstance(optimizer, LayerwiseOptimizer):
        optimizer._stepper = TritonPlan(optimizer.rule)
    for _ in range(3):
        give_gradients(params)
        optimizer.step()
    return optimizer


def measure(model: str, rule: str, repeats: int) -> list[dict[str, Any]]:
    """A row for each contestant, and for its first and its later steps with the same gradients."""
    params: dict[str, list[Tensor]] = {}
    for name in CASES[rule]:
        shapes = shapes_of(model)
        if name == "torch fused":
            shapes = [[0, *shape[1:]] for shape in shapes]
        params[name] = [torch.nn.Parameter(torch.empty(x, device=DEVICE)) for x in shapes]
    optimizers = {name: make(name, params[name], rule) for name in CASES[rule]}
    times: dict[tuple[str, str], list[float]] = {
        (name, when): [] for when in ("first", "later") for name in optimizers
    }
    for _ in range(repeats):
        for name, optimizer in optimizers.items():
            give_gradients(params[name])
            for when in ("first", *["later"] * 4):
                begin = time.perf_counter_ns()
                optimizer.step()
                times[name, when].append((time.perf_counter_ns() - begin) / 1e3)
    return [
        {
            "model": model,
            "rule": rule,
            "contestant": name,
            "step": when,
            "tensors": len(params[name]),
            **dict(zip(("us_p20", "us_p50", "us_p80"), quantiles(of), strict=True)),
            "bar_us": 30 + 0.8 * len(params[name]),
            "of_torch_fused": statistics.median(of) / statistics.median(times["torch fused", when]),
        }
        for (name, when), of in times.items()
    ]


def main() -> None:
    """Measure, print a table and leave a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--output", type=Path, help="folder of the results")
    arguments = parser.parse_args()
    print(f"{'':38} {'us':>8} {'p20':>8} {'p80':>8} {'bar':>8} {'fused':>6}")
    rows = []
    with no_launches():
        for model in arguments.models:
            for rule in CASES:
                for row in measure(model, rule, arguments.repeats):
                    rows.append(row)
                    print(
                        f"{model:11} {rule:8} {row['contestant']:11} {row['step']:5} "
                        f"{row['us_p50']:8.1f} "
                        f"{row['us_p20']:8.1f} {row['us_p80']:8.1f} {row['bar_us']:8.1f} "
                        f"{row['of_torch_fused']:6.2f}",
                        flush=True,
                    )
    if arguments.output is not None:
        where = {"processor": processor(), "tensors_on": DEVICE}
        command = f"python bench/host.py --models {' '.join(arguments.models)}"
        save(arguments.output / "host.json", where, command, rows)


if __name__ == "__main__":
    main()
