"""timm: docs/trainers.md's recipe, and the registry."""

from __future__ import annotations

import copy
import doctest
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_bits, random_tensors
from integrations.recipes import assert_resumes

import date_optim
from date_optim import TrustRatio
from date_optim.optimizer import LayerwiseOptimizer

timm = pytest.importorskip("timm")
pytest.importorskip("timm.scheduler")

import date_optim.integrations.timm as registry  # noqa: E402 - it imports timm

GIVEN: dict[str, Any] = {
    "lr": 0.1,
    "weight_decay": 0.02,
    "momentum": 0.8,
    "eps": 1e-3,
    "betas": (0.7, 0.8),
    "foreach": False,
}
"""All of timm's arguments that it passes on."""

CLASSES = {
    f"date{name.lower()}": getattr(date_optim, name)
    for name in date_optim.__all__
    if isinstance(getattr(date_optim, name), type)
    and issubclass(getattr(date_optim, name), LayerwiseOptimizer)
}


@pytest.fixture(autouse=True)
def _registered() -> None:
    registry.register()


def create(name: str, model: torch.nn.Module | None = None, **options: Any) -> Any:
    return timm.optim.create_optimizer_v2(model or torch.nn.Linear(3, 2), name, **options)


def test_the_recipe_resumes(tmp_path: Path) -> None:
    seen = assert_resumes("timm", tmp_path, "checkpoint-0.pth.tar")
    assert len(set(seen["scale"][0])) > 2  # the layers'


def test_the_example_runs() -> None:
    results = doctest.testmod(registry)
    assert (results.failed, results.attempted) == (0, 5)


def test_date_optim_alone_imports_no_timm() -> None:
    code = "import sys, date_optim, date_optim.integrations; assert 'timm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_all_are_registered(caplog: pytest.LogCaptureFixture) -> None:
    """And no name is given twice, which timm would log."""
    assert set(timm.optim.list_optimizers("date*")) == {*CLASSES, "date"}
    assert len(CLASSES) == 9
    with caplog.at_level(logging.WARNING):
        registry.register()
    assert not caplog.records


@pytest.mark.parametrize(("name", "cls"), CLASSES.items(), ids=CLASSES)
def test_timms_arguments_arrive(name: str, cls: Any) -> None:
    """Weight decay not at the bias, timm's habit, nor what a class does not have."""
    optimizer = create(name, **GIVEN)
    assert type(optimizer) is cls
    defaults = cls([torch.nn.Parameter(torch.ones(1))]).param_groups[0]
    decayed = {group["weight_decay"]: group for group in optimizer.param_groups}
    assert set(decayed) == {0.0, 0.02}
    assert [tuple(param.shape) for param in decayed[0.02]["params"]] == [(2, 3)]
    for group in optimizer.param_groups:
        expected = {**defaults, **{key: GIVEN[key] for key in GIVEN.keys() & defaults.keys()}}
        skipped = {"params", "exclude", "weight_decay"}
        for key in expected.keys() - skipped:
            assert group[key] == expected[key], key


def test_the_classes_own_defaults() -> None:
    (group,) = create("datelamb", weight_decay=0.0).param_groups
    assert (group["lr"], group["eps"], group["betas"]) == (1e-3, 1e-6, (0.9, 0.999))
    assert [create(name).param_groups[0]["momentum"] for name in ("datesgd", "datelars")] == [
        *(0.9, 0.9)
    ]


def test_our_arguments_arrive() -> None:
    (group,) = create("datesgd", trust=TrustRatio(upper=2.0), nesterov=True).param_groups
    assert (group["trust"], group["trust_upper"], group["nesterov"]) == (True, 2.0, True)
    assert create("datelars", upper=1.0).param_groups[0]["trust_upper"] == 1.0


@pytest.mark.parametrize(
    ("rule", "cls", "options"),
    [
        ("sgd", "SGD", {}),
        ("nesterov", "SGD", {}),
        ("rmsprop", "RMSprop", {"eps": 1e-3}),
        ("adam", "Adam", {"eps": 1e-3, "betas": (0.7, 0.8)}),
    ],
)
def test_date(rule: str, cls: str, options: dict[str, Any]) -> None:
    optimizer = create("date", rule=rule, upper=0.5, **options)
    assert type(optimizer) is getattr(date_optim, cls)
    (group,) = optimizer.param_groups
    expected = {"trust_lower": 0.1, "trust_upper": 0.5, **options}
    assert {key: group[key] for key in expected} == expected
    assert group.get("momentum", 0) == (0.9 if rule == "nesterov" else 0)


def test_date_refuses_what_its_rule_does_not_take() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'betas'"):
        create("date", betas=(0.7, 0.8))


def test_a_scheduler_of_timm() -> None:
    optimizer = create("datelamb", lr=0.1)
    scheduler = timm.scheduler.CosineLRScheduler(optimizer, t_initial=10)
    scheduler.step(5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05])


def train(optimizer: Any, model: torch.nn.Module, seeds: range) -> None:
    params = list(model.parameters())
    for seed in seeds:
        grads = random_tensors([tuple(p.shape) for p in params], seed)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()


def test_lookahead_trains() -> None:
    model, twin = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    train(create("lookahead_datesgd", model, lr=0.1), model, range(12))
    train(create("lookahead_momentum", twin, lr=0.1), twin, range(12))
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_lookahead_resumes() -> None:
    model, twin = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    optimizer, other = (create("lookahead_datelamb", of, lr=0.1) for of in (model, twin))
    train(optimizer, model, range(8))
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch, too, keeps its tensors
    train(optimizer, model, range(8, 14))
    train(other, twin, range(8, 14))
    assert_same_bits(list(twin.parameters()), list(model.parameters()))
