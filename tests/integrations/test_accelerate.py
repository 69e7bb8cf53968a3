"""Accelerate: docs/trainers.md's recipe, and what its wrapper does to an optimizer."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers import assert_same_bits
from integrations.recipes import assert_resumes

from date_optim import LAMB

accelerate = pytest.importorskip("accelerate")


def test_the_recipe_resumes(tmp_path: Path) -> None:
    assert_resumes("Accelerate", tmp_path, "0")


def test_a_prepared_optimizer_takes_the_same_steps() -> None:
    """It loads an empty state where it is wrapped, and accumulates gradients before a step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    twin = copy.deepcopy(model)
    pairs = torch.randn(3, 2, 5, 4)

    optimizer = LAMB(twin.named_parameters(), lr=0.1, weight_decay=0.01)
    for pair in pairs:
        for batch in pair:
            (twin(batch).square().sum() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    ours = LAMB(model.named_parameters(), lr=0.1, weight_decay=0.01)
    before = ours.state_dict()
    prepared, wrapped = accelerator.prepare(model, ours)
    assert wrapped.optimizer is ours
    assert ours.state_dict() == before
    assert not ours.state
    for batch in pairs.flatten(0, 1):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(batch).square().sum())
            wrapped.step()
            wrapped.zero_grad()
    assert_same_bits(list(model.parameters()), list(twin.parameters()))
