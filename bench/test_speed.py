"""The command's cases as a suite of pytest-benchmark, to compare commits with its options.

    pytest bench/test_speed.py --benchmark-autosave
    pytest bench/test_speed.py --benchmark-compare

Plain ``pytest`` does not collect it. Contestants do not take turns here: for ratios between them
there is ``python -m date_optim.bench``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from date_optim.bench.check import why_not
from date_optim.bench.clocks import cold_bytes
from date_optim.bench.contestants import contestants
from date_optim.bench.measure import Case, runners_of
from date_optim.bench.models import shapes_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODELS = ("resnet50", "bert-base", "ptb-large")
PEERS = ("torch-fused", "torch-foreach")
NAMES = [
    (rule, each.name) for rule in ("momentum", "adam") for each in contestants(rule, DEVICE, PEERS)
]
ROUNDS = 11


@pytest.mark.parametrize(("rule", "name"), NAMES, ids=lambda word: word.replace(" ", "-"))
@pytest.mark.parametrize("model", MODELS)
def test_step(benchmark: Any, model: str, rule: str, name: str) -> None:
    """A step on cold caches, the device's part of it included."""
    contestant = next(each for each in contestants(rule, DEVICE, PEERS) if each.name == name)
    assert why_not(contestant, DEVICE) is None
    case = Case(DEVICE, rule, model, shapes_of(model), torch.get_num_threads())
    (runner,) = runners_of(case, [contestant])
    rewritten = torch.empty(cold_bytes(DEVICE), dtype=torch.uint8, device=DEVICE)

    def chill() -> None:
        rewritten.fill_(1)
        synchronize()

    def step() -> None:
        runner.step()
        synchronize()

    benchmark.group = f"{model}, {rule}"
    benchmark.pedantic(step, setup=chill, rounds=ROUNDS)


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
