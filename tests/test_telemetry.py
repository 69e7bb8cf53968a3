"""What a step tells about its layers."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_call, random_tensors
from torch.nn import Parameter

import date_kernels
from date_kernels.plan import Plan
from date_optim import LARS, SGD, LayerTelemetry, RMSprop, TrustRatio

NAN = math.nan


def stepped(make: Any = SGD, *, named: bool = False, **options: Any) -> Any:
    """Return an optimizer after a step of w = (3, 4) and g = (0, 2), in two groups."""
    params = [Parameter(torch.tensor([3.0, 4.0])) for _ in range(3)]
    for param in params:
        param.grad = torch.tensor([0.0, 2.0])
    pairs = list(zip(("a.weight", "b.weight", "b.bias"), params, strict=True))
    members: Any = pairs if named else params
    optimizer = make([{"params": members[:1]}, {"params": members[1:]}], lr=0.1, **options)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("make", [SGD, RMSprop])
def test_numbers_of_a_layer(make: Any) -> None:
    optimizer = stepped(make, trust=TrustRatio(upper=1.0), weight_decay=0.5)
    assert optimizer.read_telemetry()["1.0"] == LayerTelemetry(
        weight_norm=5.0, measured_norm=2.0, raw_ratio=2.5, ratio=1.0, clamp=1, skipped=False
    )


@pytest.mark.parametrize(
    ("trust", "measured", "raw", "ratio", "clamp"),
    [
        (TrustRatio(), 2.0, 2.5, 2.5, 0),
        (TrustRatio(upper=2.5), 2.0, 2.5, 2.5, 0),
        (TrustRatio(lower=4.0), 2.0, 2.5, 4.0, -1),
        (TrustRatio(weight_decay="added"), 2.0, 5 / 4.5, 5 / 4.5, 0),  # without decay*||w||
        (TrustRatio(weight_decay="combined"), math.hypot(1.5, 4), 5 / math.hypot(1.5, 4), None, 0),
        (TrustRatio(eps=0.5), 2.0, 2.0, 2.0, 0),
        (TrustRatio(weight_norm_bounds=(0.0, 1.0)), 2.0, 0.5, 0.5, 0),
        (TrustRatio(0.001, clip_by_lr=True), 2.0, 0.025, 0.025, 0),
    ],
    ids=["raw", "at the bound", "lower", "added", "combined", "eps", "phi", "clip_by_lr"],
)
def test_ratio_and_bounds(
    trust: TrustRatio, measured: float, raw: float, ratio: float | None, clamp: int
) -> None:
    (layer, *_) = stepped(trust=trust, weight_decay=0.5).read_telemetry().values()
    assert layer.weight_norm == 5.0  # of the weights before the step
    np.testing.assert_allclose(layer.measured_norm, measured, rtol=1e-6)
    np.testing.assert_allclose(layer.raw_ratio, raw, rtol=1e-6)
    np.testing.assert_allclose(layer.ratio, raw if ratio is None else ratio, rtol=1e-6)
    assert layer.clamp == clamp


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"trust": TrustRatio(), "exclude": "1d"},
        {"trust": TrustRatio(skip_without_decay=True)},
    ],
    ids=["plain", "excluded", "without decay"],
)
def test_a_layer_that_is_not_measured(options: dict[str, Any]) -> None:
    for layer in stepped(**options).read_telemetry().values():
        assert np.isnan([layer.weight_norm, layer.measured_norm, layer.raw_ratio]).all()
        assert (layer.ratio, layer.clamp, layer.skipped) == (1.0, 0, False)


def test_names_are_the_parameters_or_their_places() -> None:
    assert list(stepped().read_telemetry()) == ["0.0", "1.0", "1.1"]
    assert list(stepped(named=True).read_telemetry()) == ["a.weight", "b.weight", "b.bias"]


def test_types_are_plain() -> None:
    (layer, *_) = stepped(LARS).read_telemetry().values()
    for key in ("weight_norm", "measured_norm", "raw_ratio", "ratio"):
        assert type(getattr(layer, key)) is float
    assert (type(layer.clamp), type(layer.skipped)) == (int, bool)


def test_only_layers_of_the_last_step() -> None:
    optimizer = stepped(trust=TrustRatio())
    first, second, third = (p for group in optimizer.param_groups for p in group["params"])
    second.grad = None
    third.grad = torch.tensor([0.0, 4.0])
    optimizer.step()
    telemetry = optimizer.read_telemetry()
    assert list(telemetry) == ["0.0", "1.1"]
    assert telemetry["1.1"].measured_norm == 4.0
    first.grad = third.grad = None
    optimizer.step()
    assert optimizer.read_telemetry() == {}


def test_before_the_first_step_there_is_none() -> None:
    param = Parameter(torch.ones(2))
    assert SGD([param]).read_telemetry() == {}


def test_it_is_no_part_of_the_state() -> None:
    optimizer = stepped(RMSprop, trust=TrustRatio())
    saved = optimizer.state_dict()
    assert set(saved) == {"state", "param_groups"}
    assert all(set(values) == {"step", "square_avg"} for values in saved["state"].values())


def test_it_outlives_the_next_steps_memory() -> None:
    optimizer = stepped(trust=TrustRatio())
    before = optimizer.read_telemetry()
    optimizer.step()
    after = optimizer.read_telemetry()
    assert before["0.0"].weight_norm == 5.0
    assert after["0.0"].weight_norm != 5.0


def test_a_skipped_layer_is_flagged() -> None:
    optimizer = stepped(trust=TrustRatio(), on_nonfinite="skip")
    param = optimizer.param_groups[0]["params"][0]
    with torch.no_grad():
        param[0] = math.inf
    optimizer.step()
    telemetry = optimizer.read_telemetry()
    assert [layer.skipped for layer in telemetry.values()] == [True, False, False]
    assert telemetry["0.0"].weight_norm == math.inf
    assert math.isnan(telemetry["0.0"].ratio)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_clip_and_total_norm(backend: str) -> None:
    step = partial(date_kernels.step, "sgd", backend=backend)
    grads = [torch.tensor([0.0, 3.0]), torch.tensor([4.0])]
    for options, total_norm, clip in (
        ({}, NAN, 1.0),
        ({"on_nonfinite": "skip"}, NAN, 1.0),
        ({"max_grad_norm": 2.5}, 5.0, 0.5),
        ({"max_grad_norm": 10.0}, 5.0, 1.0),
        ({"max_grad_norm": 2.5, "trust": True, "exclude": (True, False)}, 5.0, 0.5),
    ):
        call = make_call("sgd", random_tensors([2, 1], 0), grads, options)
        telemetry = call.take(step)
        np.testing.assert_equal((telemetry.total_norm, telemetry.clip), (total_norm, clip))
        if "trust" in options:
            np.testing.assert_array_equal(telemetry.measured_norm, [NAN, 2.0])  # clipped
    call = make_call("sgd", random_tensors([2, 1], 0), grads, {"max_grad_norm": 2.5})
    telemetry = call.take(step, grad_scale=4.0)
    assert (telemetry.total_norm, telemetry.clip) == (1.25, 1.0)


def test_a_step_with_found_inf_tells_nothing_of_the_one_before() -> None:
    call = make_call("sgd", random_tensors([2], 0), [torch.tensor([0.0, 3.0])], {})
    call.groups[0].update(max_grad_norm=1.0, trust=True)
    plan = Plan("sgd")
    assert call.take(plan.step).clip == pytest.approx(1 / 3)
    telemetry = call.take(plan.step, found_inf=1.0)
    np.testing.assert_equal(telemetry.total_norm, NAN)
    assert telemetry.clip == 1.0
    for key in ("weight_norm", "measured_norm", "raw_ratio"):
        np.testing.assert_array_equal(getattr(telemetry, key), [NAN])
    np.testing.assert_array_equal(telemetry.ratio, [1.0])


def test_names_that_two_layers_share_give_way_to_their_places() -> None:
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    groups = [{"params": [("w", params[0]), ("v", params[1])]}, {"params": [("w", params[2])]}]
    optimizer = SGD(groups, lr=0.1)
    for param in params:
        param.grad = torch.ones(2)
    optimizer.step()
    assert list(optimizer.read_telemetry()) == ["0.0", "v", "1.0"]
