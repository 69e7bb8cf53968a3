"""NaN and infinities: exactly the stated layers, states and step counts change."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    TRUST,
    VARIANTS,
    Call,
    Options,
    assert_same_bits,
    judged_step,
    make_call,
    optimizer_unchanged,
    random_tensors,
)
from torch import Tensor
from torch.nn import Parameter

import date_kernels
from date_kernels import Telemetry, make_stepper
from date_kernels.plan import LEAF, Plan
from date_optim import SGD, RMSprop, TrustRatio

NAN, INF = math.nan, math.inf
SIZES = [7, 2 * LEAF + 3, 20]
SPOILED, AT = 1, LEAF + 5
"""The layer and the element that are not finite."""

MODES: dict[str, Options] = {
    "plain": {},
    "trust": TRUST,
    "combined": {**TRUST, "trust_weight_decay": "combined"},
    "excluded": {**TRUST, "exclude": (False, True, False)},
    "without decay": {**TRUST, "trust_skip_without_decay": True, "weight_decay": 0.0},
}
MEASURED = ("trust", "combined")

every_form = pytest.mark.parametrize("form", ["nesterov", "rmsprop-centered-momentum"])
every_mode = pytest.mark.parametrize("mode", MODES)
every_value = pytest.mark.parametrize("value", [NAN, -INF])
every_backend = pytest.mark.parametrize("backend", ["cpu", "small chunks", "reference"])


def calls(form: str, mode: str, **group: Any) -> tuple[Call, Call]:
    """Return two equal calls in the middle of a run: one to spoil, one to compare with."""
    rule, options = VARIANTS[form]
    every = {**options, **MODES[mode], **group}
    call = make_call(rule, random_tensors(SIZES, 0), random_tensors(SIZES, 1), every, taken=3)
    return call, call.copy()


def take(call: Call, backend: str, **kwargs: Any) -> Telemetry:
    """Take the step by a backend."""
    small = partial(Plan, chunk=LEAF)
    stepper = small(call.rule) if backend == "small chunks" else make_stepper(call.rule, backend)
    return call.take(stepper.step, **kwargs)


def spoil(call: Call, where: str, value: float) -> None:
    """Put the value into one element of the layer's weight, gradient or one of its states."""
    tensor = {"weight": call.params, "gradient": call.grads}.get(where) or call.states[where]
    chosen = tensor[SPOILED]
    assert chosen is not None
    chosen[AT] = value


def states_of(form: str) -> str:
    return "momentum_buffer" if form == "nesterov" else "square_avg"


def assert_layers_as(call: Call, expected: Call, layers: list[int]) -> None:
    for i in layers:
        assert_same_bits(call.layer(i), expected.layer(i))


def counts(call: Call) -> list[float]:
    return [counter.item() for counter in call.steps if counter is not None]


# --- skip -----------------------------------------------------------------------------------------


@every_form
@every_mode
@every_value
@every_backend
@pytest.mark.parametrize("limit", [None, 1.0])
def test_skip_a_gradient_keeps_everything(
    form: str, mode: str, value: float, backend: str, limit: float | None
) -> None:
    call, _ = calls(form, mode, on_nonfinite="skip", max_grad_norm=limit)
    spoil(call, "gradient", value)
    untouched = call.copy()
    telemetry = take(call, backend)
    assert_layers_as(call, untouched, [0, 1, 2])
    assert telemetry.skipped.all()
    assert np.isnan(telemetry.weight_norm).all()
    np.testing.assert_array_equal(telemetry.ratio, 1.0)
    assert math.isnan(telemetry.total_norm) == (limit is None or math.isnan(value))


@every_form
@every_mode
@every_value
@every_backend
@pytest.mark.parametrize("limit", [None, 1.0])
def test_skip_a_weight_keeps_its_layer_where_it_is_measured(
    form: str, mode: str, value: float, backend: str, limit: float | None
) -> None:
    call, clean = calls(form, mode, on_nonfinite="skip", max_grad_norm=limit)
    spoil(call, "weight", value)
    untouched = call.copy()
    telemetry = take(call, backend)
    take(clean, backend)
    assert_layers_as(call, clean, [0, 2])
    assert telemetry.skipped.tolist() == [False, mode in MEASURED, False]
    if mode in MEASURED:
        assert_layers_as(call, untouched, [SPOILED])
        assert math.isnan(telemetry.ratio[SPOILED])
        assert not math.isfinite(telemetry.weight_norm[SPOILED])
        assert counts(call) == [4, 3, 4]
    else:
        assert_only_element(call, clean)


@every_form
@every_mode
@every_value
@every_backend
@pytest.mark.parametrize("policy", ["skip", "propagate"])
def test_a_state_is_in_no_norm(
    form: str, mode: str, value: float, backend: str, policy: str
) -> None:
    """Of the gradient, the ratio does not see states: their element goes its way alone."""
    call, clean = calls(form, mode, on_nonfinite=policy)
    spoil(call, states_of(form), value)
    telemetry = take(call, backend)
    take(clean, backend)
    assert not telemetry.skipped.any()
    assert_layers_as(call, clean, [0, 2])
    assert_only_element(call, clean)


def others(tensor: Tensor) -> list[Tensor]:
    """Return the elements before and after the one that is not finite."""
    return [tensor[:AT], tensor[AT + 1 :]]


def assert_only_element(call: Call, clean: Call) -> None:
    """Assert that the layer took its step, and differs from the clean one in one element."""
    for tensor, expected in zip(call.layer(SPOILED), clean.layer(SPOILED), strict=True):
        if tensor.ndim == 0:
            assert tensor.item() == expected.item() == 4
            continue
        assert_same_bits(others(tensor), others(expected))
    weight = call.params[SPOILED]
    assert not weight[AT].isfinite() or states_of_infinity(call)


def states_of_infinity(call: Call) -> bool:
    """An infinite square average divides its element's step to nothing: no harm done."""
    state = call.states.get("square_avg", [None] * 3)[SPOILED]
    return state is not None and bool(state[AT].isinf())


# --- propagate ------------------------------------------------------------------------------------


@every_form
@every_mode
@every_value
@every_backend
@pytest.mark.parametrize("where", ["weight", "gradient"])
def test_propagate_as_torch(form: str, mode: str, value: float, backend: str, where: str) -> None:
    """A measured layer becomes NaN as a whole, others keep to the element; none is skipped."""
    call, clean = calls(form, mode)
    spoil(call, where, value)
    telemetry = take(call, backend)
    take(clean, backend)
    assert not telemetry.skipped.any()
    assert_layers_as(call, clean, [0, 2])
    assert counts(call) == [4, 4, 4]
    if mode in MEASURED:
        assert call.params[SPOILED].isnan().all()
        assert math.isnan(telemetry.ratio[SPOILED])
        assert math.isnan(telemetry.raw_ratio[SPOILED])
        assert telemetry.clamp[SPOILED] == 0
    else:
        assert_same_bits(others(call.params[SPOILED]), others(clean.params[SPOILED]))
        assert not call.params[SPOILED][AT].isfinite()


@every_form
@every_mode
@every_backend
def test_propagate_through_the_clip(form: str, mode: str, backend: str) -> None:
    """As torch.nn.utils.clip_grad_norm_: a norm of NaN reaches every layer, one of infinity clips
    every gradient to nothing."""
    call, _ = calls(form, mode, max_grad_norm=1.0)
    spoil(call, "gradient", NAN)
    telemetry = take(call, backend)
    assert math.isnan(telemetry.clip)
    assert not telemetry.skipped.any()
    assert all(param.isnan().all() for param in call.params)
    assert counts(call) == [4, 4, 4]

    call, still = calls(form, mode, max_grad_norm=1.0)
    spoil(call, "gradient", INF)
    still.grads = [torch.zeros_like(grad) for grad in still.grads]
    telemetry = take(call, backend)
    take(still, backend)
    assert (telemetry.total_norm, telemetry.clip) == (INF, 0.0)
    assert_layers_as(call, still, [0, 2])
    assert call.params[SPOILED][AT].isnan()
    assert call.params[SPOILED].isnan().all() == (mode in MEASURED)


@every_form
@every_mode
def test_kernels_put_nan_where_the_reference_does(form: str, mode: str) -> None:
    for where in ("weight", "gradient", states_of(form)):
        for value in (NAN, INF):
            for policy in ("propagate", "skip"):
                call, other = calls(form, mode, on_nonfinite=policy, max_grad_norm=2.0)
                spoil(call, where, value)
                spoil(other, where, value)
                ours, reference = take(call, "cpu"), take(other, "reference")
                np.testing.assert_array_equal(ours.skipped, reference.skipped)
                np.testing.assert_allclose(ours.ratio, reference.ratio, rtol=1e-6)
                np.testing.assert_allclose(ours.total_norm, reference.total_norm, rtol=1e-6)
                for a, b in zip(call.written(), other.written(), strict=True):
                    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                        assert torch.equal(kind(a), kind(b))


# --- a gradient scaler's found_inf ----------------------------------------------------------------


@every_form
@every_mode
@every_backend
@pytest.mark.parametrize("limit", [None, 1.0])
@pytest.mark.parametrize("found", [1.0, torch.tensor([2.0])])
def test_found_inf_keeps_everything(
    form: str, mode: str, backend: str, limit: float | None, found: Tensor | float
) -> None:
    call, _ = calls(form, mode, max_grad_norm=limit)
    spoil(call, "gradient", INF)
    untouched = call.copy()
    telemetry = take(call, backend, found_inf=found, grad_scale=2.0)
    assert telemetry.skipped.all()
    assert_layers_as(call, untouched, [0, 1, 2])


@every_form
@every_mode
@every_backend
@pytest.mark.parametrize("limit", [None, 1.0])
def test_no_found_inf_implies_skip_for_what_else_is_not_finite(
    form: str, mode: str, backend: str, limit: float | None
) -> None:
    call, clean = calls(form, mode, max_grad_norm=limit)
    spoil(call, "weight", NAN)
    untouched = call.copy()
    telemetry = take(call, backend, found_inf=0.0)
    take(clean, backend, found_inf=torch.tensor(0.0))
    assert telemetry.skipped.tolist() == [False, mode in MEASURED, False]
    assert_layers_as(call, clean, [0, 2])
    if mode in MEASURED:
        assert_layers_as(call, untouched, [SPOILED])


@every_form
@every_mode
@every_backend
@pytest.mark.parametrize("limit", [None, 1.0])
@pytest.mark.parametrize("policy", ["skip", "propagate"])
def test_found_inf_of_zero_is_believed(
    form: str, mode: str, backend: str, limit: float | None, policy: str
) -> None:
    """Gradients are not looked at again, unless clipping looks at them anyway."""
    call, clean = calls(form, mode, max_grad_norm=limit, on_nonfinite=policy)
    spoil(call, "gradient", NAN)
    untouched = call.copy()
    telemetry = take(call, backend, found_inf=0.0)
    take(clean, backend, found_inf=0.0)
    if limit is not None:
        assert telemetry.skipped.all()
        assert_layers_as(call, untouched, [0, 1, 2])
        return
    assert telemetry.skipped.tolist() == [False, mode in MEASURED, False]
    assert_layers_as(call, clean, [0, 2])
    assert counts(call) == [4, 3 if mode in MEASURED else 4, 4]


@every_form
def test_a_plan_forgets_what_it_has_skipped(form: str) -> None:
    """One bad gradient stops one step, not those after it."""
    call, _ = calls(form, "trust", on_nonfinite="skip", max_grad_norm=1.0)
    plan = Plan(call.rule)
    sound = call.grads[SPOILED].clone()
    judged_step(call, plan.step)
    spoil(call, "gradient", NAN)
    assert call.take(plan.step).skipped.all()
    call.grads[SPOILED] = sound
    judged_step(call, plan.step)
    assert call.take(plan.step, found_inf=1.0).skipped.all()
    judged_step(call, plan.step)
    assert counts(call) == [6, 6, 6]


# --- through the optimizers -----------------------------------------------------------------------


def two_layers(make: type[SGD] | type[RMSprop], **options: Any) -> tuple[Any, list[Parameter]]:
    params = [Parameter(w) for w in random_tensors([6, 4], 0)]
    groups: Any = [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": 0.2}]
    return make(groups, momentum=0.9, trust=TrustRatio(upper=1.0), **options), params


@pytest.mark.parametrize("make", [SGD, RMSprop])
def test_a_skipped_first_step_leaves_no_state(make: type[SGD] | type[RMSprop]) -> None:
    options: Options = {"on_nonfinite": "skip", **({"dampening": 0.5} if make is SGD else {})}
    (late, params), (prompt, twins) = two_layers(make, **options), two_layers(make, **options)
    grads = random_tensors([6, 4], 1)
    params[0].grad, params[1].grad = grads[0], torch.full((4,), INF)
    with optimizer_unchanged(late):
        late.step()
    assert not late.state
    for ours in (params, twins):
        for param, grad in zip(ours, grads, strict=True):
            param.grad = grad.clone()
    for _ in range(2):
        late.step()
        prompt.step()
    assert_same_bits(params, twins)
    for param, other in zip(params, twins, strict=True):
        assert_same_bits(list(late.state[param].values()), list(prompt.state[other].values()))


@pytest.mark.parametrize("make", [SGD, RMSprop])
def test_an_optimizer_skips_one_layer(make: type[SGD] | type[RMSprop]) -> None:
    optimizer, params = two_layers(make, on_nonfinite="skip")
    for param, grad in zip(params, random_tensors([6, 4], 1), strict=True):
        param.grad = grad
    optimizer.step()
    with torch.no_grad():
        params[0][2] = NAN
    states = [state.clone() for state in optimizer.state[params[0]].values()]
    before = [param.detach().clone() for param in params]
    optimizer.step()
    assert_same_bits([params[0]], [before[0]])
    assert_same_bits(list(optimizer.state[params[0]].values()), states)
    assert not torch.equal(params[1], before[1])
    telemetry = optimizer.read_telemetry()
    assert [telemetry[name].skipped for name in ("0.0", "1.0")] == [True, False]


@pytest.mark.parametrize("make", [SGD, RMSprop])
def test_a_skipped_new_layer_gets_no_state(make: type[SGD] | type[RMSprop]) -> None:
    optimizer, params = two_layers(make, on_nonfinite="skip")
    for param, grad in zip(params, random_tensors([6, 4], 1), strict=True):
        param.grad = grad
    with torch.no_grad():
        params[1][0] = INF
    optimizer.step()
    assert list(optimizer.state) == [params[0]]


def test_dispatch_defaults_to_propagate() -> None:
    w, g = torch.ones(3), torch.tensor([1.0, NAN, 1.0])
    date_kernels.step("sgd", [w], [g], {}, [None], [{"params": [0], "lr": 0.5}])
    np.testing.assert_array_equal(w.numpy(), [0.5, NAN, 0.5])
