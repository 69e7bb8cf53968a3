"""What a step tells about its layers."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Options, make_call, random_tensors
from torch.nn import Parameter
from variants import VARIANTS

import date_kernels
from date_kernels import MASTER, Telemetry, make_stepper
from date_kernels.items import LEAF
from date_kernels.layers import HALF
from date_kernels.plan import Plan
from date_optim import (
    LAMB,
    LARS,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    AdamW,
    LayerTelemetry,
    RMSprop,
    TrustRatio,
)

NAN = math.nan
CLASSES = [SGD, RMSprop, Adagrad, Adam, AdamW, Adadelta]


def stepped(
    make: Any = SGD, *, named: bool = False, dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    """Return an optimizer after a step of w = (3, 4) and g = (0, 2), in two groups."""
    params = [Parameter(torch.tensor([3.0, 4.0], dtype=dtype)) for _ in range(3)]
    for param in params:
        param.grad = torch.tensor([0.0, 2.0], dtype=dtype)
    pairs = list(zip(("a.weight", "b.weight", "b.bias"), params, strict=True))
    members: Any = pairs if named else params
    optimizer = make([{"params": members[:1]}, {"params": members[1:]}], lr=0.1, **options)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("make", CLASSES)
def test_numbers_of_a_layer(make: Any, dtype: torch.dtype) -> None:
    trust = TrustRatio(upper=1.0)
    optimizer = stepped(make, trust=trust, weight_decay=0.5, dtype=dtype, master_weights=True)
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
        {"trust": TrustRatio(of="update"), "exclude": "1d"},
        {"trust": TrustRatio(skip_without_decay=True), "weight_decay": 0.0},
        {"trust": TrustRatio(of="update", skip_without_decay=True), "weight_decay": 0.0},
    ],
    ids=["plain", "excluded", "excluded update", "without decay", "update without decay"],
)
@pytest.mark.parametrize("make", CLASSES)
def test_a_layer_that_is_not_measured(make: Any, options: Options) -> None:
    for layer in stepped(make, **options).read_telemetry().values():
        assert np.isnan([layer.weight_norm, layer.measured_norm, layer.raw_ratio]).all()
        assert (layer.ratio, layer.clamp, layer.skipped) == (1.0, 0, False)


def test_excluded_layers_beside_measured_ones() -> None:
    matrix, bias = Parameter(torch.full((2, 2), 2.0)), Parameter(torch.ones(2))
    optimizer = LAMB([("weight", matrix), ("bias", bias)], lr=0.1, weight_decay=0.5)
    matrix.grad, bias.grad = torch.ones(2, 2), torch.ones(2)
    optimizer.step()
    telemetry = optimizer.read_telemetry()
    assert telemetry["weight"].weight_norm == 4.0
    assert math.isnan(telemetry["bias"].weight_norm)
    assert telemetry["bias"].ratio == 1.0


# --- of the update --------------------------------------------------------------------------------

PLACES = ("gradient", "update", "weights")
UPDATES = [
    name for name, (_, options) in VARIANTS.items() if options["momentum_scaling"] == "outside"
]


def updates(
    variant: str,
    place: str,
    dtype: torch.dtype = torch.float64,
    *,
    master: bool = False,
    **options: Any,
) -> tuple[Telemetry, float, float]:
    """Return the telemetry of a step of one layer of two chunks in the middle of a run, the norm of
    its weights before it, and that of what was then taken off them by rate and ratio.
    """
    rule, chosen = VARIANTS[variant]
    group = {
        **chosen,
        "lr": 0.5,
        "weight_decay": 0.25,
        "weight_decay_in": place,
        "trust": True,
        "trust_of": "update",
        "master_weights": master,
        **options,
    }
    params = random_tensors([LEAF + 5], 0, dtype)
    call = make_call(rule, params, random_tensors([LEAF + 5], 1, dtype), group, taken=3)
    for mean in call.states.get("grad_avg", []):
        if mean is not None:
            mean.clamp_(-0.5, 0.5)  # no variance near 0
    kept = call.states[MASTER][0] if master else params[0]
    assert kept is not None
    before = kept.double().clone()
    telemetry = call.take(Plan(rule, chunk=LEAF).step)
    rate = 0.5 / (1 + 3 * group.get("lr_decay", 0.0))
    start = before * (1 - 0.25 * rate) if place == "weights" else before
    update = (start - kept.double()) / (rate * telemetry.ratio[0])
    return telemetry, float(before.norm()), float(update.norm())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("variant", UPDATES)
def test_the_measured_norm_is_that_of_what_is_taken_off(variant: str, place: str) -> None:
    """Its decay included where it is in the gradient or the update, and not where it is in the
    weights."""
    telemetry, weight_norm, update_norm = updates(variant, place)
    np.testing.assert_allclose(telemetry.weight_norm, [weight_norm], rtol=1e-12)
    np.testing.assert_allclose(telemetry.measured_norm, [update_norm], rtol=1e-12)
    np.testing.assert_allclose(telemetry.raw_ratio, [weight_norm / update_norm], rtol=1e-12)
    np.testing.assert_array_equal(telemetry.ratio, telemetry.raw_ratio)
    assert telemetry.clamp.tolist() == [0.0]


@pytest.mark.parametrize("variant", UPDATES)
def test_decay_is_part_of_the_measured_norm(variant: str) -> None:
    """SGD's update without a buffer is the gradient: its norm can be told without the kernels."""
    (plain, *_), (inside, *_) = updates(variant, "weights"), updates(variant, "update")
    assert inside.measured_norm != plain.measured_norm
    if variant == "sgd-plain":
        w, g = random_tensors([LEAF + 5], 0)[0].double(), random_tensors([LEAF + 5], 1)[0].double()
        np.testing.assert_allclose(plain.measured_norm, [g.norm()], rtol=1e-12)
        np.testing.assert_allclose(inside.measured_norm, [(g + 0.25 * w).norm()], rtol=1e-12)


@pytest.mark.parametrize("variant", UPDATES)
def test_hits_of_the_bounds(variant: str) -> None:
    raw = float(updates(variant, "update")[0].raw_ratio[0])
    for lower, upper, ratio, clamp in (
        (0.0, raw, raw, 0),
        (raw, math.inf, raw, 0),
        (0.0, raw / 2, raw / 2, 1),
        (raw * 2, raw * 3, raw * 2, -1),
    ):
        telemetry, _, update = updates(variant, "update", trust_lower=lower, trust_upper=upper)
        assert telemetry.raw_ratio[0] == raw
        assert telemetry.ratio[0] == ratio
        assert telemetry.clamp[0] == clamp
        np.testing.assert_allclose(telemetry.measured_norm, [update], rtol=1e-12)


# --- 16 bits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("variant", UPDATES)
def test_norms_of_layers_of_16_bits(variant: str, dtype: torch.dtype) -> None:
    """Of the parameter's own values; sums are of float32 values in float64."""
    rounded = random_tensors([LEAF + 5], 0, dtype)[0].double()
    telemetry, *_ = updates(variant, "update", dtype)
    np.testing.assert_allclose(telemetry.weight_norm, [rounded.norm()], rtol=1e-12)


@pytest.mark.parametrize("of", ["gradient", "update"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("variant", UPDATES)
def test_norms_of_masters(variant: str, dtype: torch.dtype, of: str) -> None:
    """Of the master, not of the parameter that rounds it, and the update is what it loses."""
    telemetry, weight_norm, update_norm = updates(
        variant, "update", dtype, master=True, trust_of=of
    )
    rounded = random_tensors([LEAF + 5], 0, dtype)[0].double()
    assert abs(weight_norm / float(rounded.norm()) - 1) > 1e-10
    np.testing.assert_allclose(telemetry.weight_norm, [weight_norm], rtol=1e-12)
    if of == "update":  # the difference of two float32 numbers, each with half an eps of error
        eps = torch.finfo(torch.float32).eps
        lost = 0.5 * telemetry.ratio[0] * update_norm
        allowed = eps * (2 * weight_norm + lost) / lost + 8 * eps
        np.testing.assert_allclose(telemetry.measured_norm, [update_norm], rtol=allowed)
    else:
        g = random_tensors([LEAF + 5], 1, dtype)[0].double()
        np.testing.assert_allclose(telemetry.measured_norm, [g.norm()], rtol=1e-12)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", HALF)
def test_a_master_beside_a_spoiled_parameter(dtype: torch.dtype, backend: str) -> None:
    call = make_call(
        "sgd",
        [torch.tensor([3.0, 4.0], dtype=dtype)],
        [torch.tensor([0.0, 2.0])],
        {"trust": True, "master_weights": True, "on_nonfinite": "skip"},
    )
    call.params[0].fill_(NAN)  # nothing reads it
    telemetry = call.take(make_stepper("sgd", backend).step)
    assert telemetry.weight_norm.tolist() == [5.0]
    assert not telemetry.skipped.any()
    assert call.params[0].isfinite().all()


# --- through the optimizers -----------------------------------------------------------------------


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
