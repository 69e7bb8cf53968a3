"""NaN and infinities: exactly the stated layers, states and step counts change.

One call holds a layer to spoil for each pair of dtypes, with and without master weights, and clean
layers at its ends. It is compared with the reference (where NaN and infinities stand), with the
same call unspoiled (every bit that no spoiled element reaches), and with itself before the step
(every bit of what is skipped).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    DTYPES,
    SQUARES,
    Call,
    Options,
    assert_same_bits,
    bits,
    make_call,
    optimizer_unchanged,
    random_tensors,
    unchanged,
)
from torch import Tensor
from torch.nn import Parameter
from variants import FULL, VARIANTS

import date_kernels
from date_kernels import MASTER, RULES, Telemetry, make_stepper
from date_kernels.items import LEAF
from date_kernels.layers import HALF
from date_kernels.plan import Plan
from date_kernels.stepper import Stepper
from date_optim import LAMB, LARS, SGD, Adadelta, Adagrad, Adam, AdamW, RMSprop, TrustRatio

NAN, INF = math.nan, math.inf
VALUES = (NAN, INF, -INF)

SIZE, AT = LEAF + 9, LEAF + 5
"""Elements of a layer to spoil, and the element that is not finite: in the second leaf."""

SPOILED = (*((*pair, False) for pair in DTYPES), *((*p, True) for p in DTYPES if p[0] in HALF))
"""The layers to spoil: dtype, gradient's dtype, and whether there are master weights."""

CLEAN = (5, torch.float32), (7, torch.float16)
"""Elements and dtype of the first and of the last layer, which has a master."""

LAYERS = range(1, 1 + len(SPOILED))
COUNT = len(SPOILED) + len(CLEAN)

PINNED: Options = {"trust": True, "trust_lower": 0.25, "trust_upper": 0.25}
"""Every finite ratio is 0.25, in every bit; the raw ratio tells one norm from another."""

UPDATE: Options = {**PINNED, "trust_of": "update"}
MODES: dict[str, Options] = {
    "off": {"weight_decay": 0.03, "weight_decay_in": "weights"},
    "gradient": PINNED,
    "decayed update": {**UPDATE, "weight_decay": 0.03, "weight_decay_in": "update"},
    "added": {**PINNED, "trust_weight_decay": "added", "weight_decay": 0.03},
    "combined": {**PINNED, "trust_weight_decay": "combined", "weight_decay": 0.03},
    "update": UPDATE,
    "excluded": {**UPDATE, "weight_decay": 0.03, "exclude": True},
    "without decay": {**UPDATE, "trust_skip_without_decay": True},
}
SHORT = ("off", "gradient", "decayed update")
MEASURED = ("gradient", "decayed update", "added", "combined", "update")

POLICIES: dict[str, tuple[Options, Options]] = {
    "propagate": ({}, {}),
    "skip": ({"on_nonfinite": "skip"}, {}),
    # Believed: gradients are not looked at again, though the group would skip for one.
    "scaler": ({"on_nonfinite": "skip"}, {"found_inf": torch.tensor(0.0)}),
}
"""By name: options of the groups, and arguments of the step."""

CHUNKS = {"one chunk": 4 * LEAF, "two chunks": LEAF}


def _cases(variants: Iterable[str]) -> Iterator[tuple[str, str]]:
    for variant in variants:
        for mode in MODES if variant in FULL.values() else SHORT:
            outside = VARIANTS[variant][1]["momentum_scaling"] == "outside"
            if outside or "trust_of" not in MODES[mode]:  # of the update it would be circular
                yield variant, mode


CASES, FULL_CASES = [*_cases(VARIANTS)], [*_cases(FULL.values())]
every_case = pytest.mark.parametrize(("variant", "mode"), CASES, ids=map("-".join, CASES))
full_case = pytest.mark.parametrize(("variant", "mode"), FULL_CASES, ids=map("-".join, FULL_CASES))
every_backend = pytest.mark.parametrize("backend", [*CHUNKS, "reference"])


@cache
def _drawn() -> tuple[list[Tensor], list[Tensor]]:
    kinds = [(CLEAN[0][0], CLEAN[0][1], CLEAN[0][1])]
    kinds += [(SIZE, dtype, grad_dtype) for dtype, grad_dtype, _ in SPOILED]
    kinds += [(CLEAN[1][0], CLEAN[1][1], CLEAN[1][1])]
    params = [random_tensors([size], i, dtype)[0] for i, (size, dtype, _) in enumerate(kinds)]
    grads = [random_tensors([size], 99 - i, dtype)[0] for i, (size, _, dtype) in enumerate(kinds)]
    return params, grads


def make(variant: str, mode: str, **shared: Any) -> Call:
    """Return a call in the middle of a run: clean layers at its ends, layers to spoil between."""
    rule, options = VARIANTS[variant]
    of_master = [False, *(master for _, _, master in SPOILED), True]
    groups = []
    for master in (False, True):
        members = [i for i, is_master in enumerate(of_master) if is_master == master]
        group = {**options, **MODES[mode], **shared, "params": members, "master_weights": master}
        if "exclude" in group:
            group["exclude"] = (True,) * len(members)
        groups.append(group)
    call = make_call(rule, *_drawn(), *groups, taken=3).copy()
    for mean in call.states.get("grad_avg", []):
        if mean is not None:
            mean.clamp_(-0.5, 0.5)  # a variance near 0 would magnify every rounding
    return call


def stepper(rule: str, backend: str) -> Stepper:
    """Return the kernels with their items of some size, or the reference."""
    return (
        make_stepper(rule, backend) if backend == "reference" else Plan(rule, chunk=CHUNKS[backend])
    )


def take(call: Call, backend: str, **kwargs: Any) -> Telemetry:
    """Take the step by a backend."""
    return call.take(stepper(call.rule, backend).step, **kwargs)


def restore(call: Call, saved: Call) -> None:
    """Give the call's tensors the other's values, where they stand: a plan for them still fits."""
    for tensor, value in zip(
        [*call.written(), *call.grads], [*saved.written(), *saved.grads], strict=True
    ):
        tensor.copy_(value)


def places(call: Call, layers: Iterable[int] = LAYERS) -> list[str]:
    """Return where a value that is not finite may sit in these layers, beside the gradient."""
    keys = [key for key, of in call.states.items() if any(of[i] is not None for i in layers)]
    return ["weight", *keys]


def spoil(call: Call, where: str, value: float, layers: Iterable[int] = LAYERS) -> list[int]:
    """Put the value into one element of each of the layers that has such a tensor; say which."""
    column = {"weight": call.params, "gradient": call.grads}.get(where) or call.states[where]
    of = []
    for i in layers:
        tensor = column[i]
        if tensor is not None:
            tensor[AT] = value
            of.append(i)
    assert of
    return of


def spoilings(call: Call, policy: str) -> Iterator[tuple[str, float]]:
    """Every place with every value that is tried there."""
    for where in ("gradient", *places(call)):
        if where == "gradient" and policy == "skip":
            continue  # nothing at all happens then: a test of its own
        for value in VALUES[: 3 if where in ("gradient", "weight", MASTER) else 2]:
            yield where, value


def counts(call: Call) -> list[float]:
    return [counter.item() for counter in call.steps if counter is not None]


# --- what is expected -----------------------------------------------------------------------------


def is_in_norm(call: Call, layer: int, mode: str, where: str, value: float) -> bool:
    """Whether a norm of the layer is not finite, by the policy's words."""
    if mode not in MEASURED:
        return False
    if where == "weight":  # of a layer with a master the norm is the master's
        return call.states[MASTER][layer] is None
    if where == MASTER:
        return True
    if call.rule == "lion" and "update" in mode:  # a sign, infinity's too
        return math.isnan(value)
    if where == "gradient":
        return True
    # A state enters the update's norm alone, and to divide by an infinite average gives 0.
    harmless = value == INF and where in SQUARES and where != "acc_delta"
    return "update" in mode and not harmless


def kinds(tensor: Tensor) -> bytes:
    """Return for each element whether it is finite, NaN or which infinity."""
    odd = torch.where(tensor.isfinite(), 0, tensor)
    return bits(odd.nan_to_num(nan=2.0, posinf=1.0, neginf=-1.0).to(torch.int8))


def assert_same_places(call: Call, expected: Call) -> None:
    """Assert NaN and infinities where the other call has them, and the spoiled element alike."""
    for i in LAYERS:
        for tensor, other in zip(call.layer(i), expected.layer(i), strict=True):
            assert kinds(tensor) == kinds(other), f"layer {i}"
            if tensor.ndim and tensor[AT].isfinite():
                # Sums of a few terms of size 1, and a rounding to 16 bits.
                arithmetic = torch.float64 if tensor.dtype == torch.float64 else torch.float32
                eps = 16 * torch.finfo(arithmetic).eps + torch.finfo(tensor.dtype).eps
                a, b = tensor[AT].item(), other[AT].item()
                assert abs(a - b) <= eps * (1 + abs(b)), f"layer {i}: {a}, expected {b}"


def assert_elsewhere_as(call: Call, clean: Call, layer: int) -> None:
    """Assert that every element but `AT` is as in the other call, or NaN by the layer's ratio."""
    for tensor, expected in zip(call.layer(layer), clean.layer(layer), strict=True):
        if tensor.ndim == 0:
            assert tensor.item() == expected.item() == 4
            continue
        a, b = (torch.cat([x[:AT], x[AT + 1 :]]) for x in (tensor, expected))
        assert a.isnan().all() or bits(a) == bits(b), f"layer {layer}"


def assert_telemetry(telemetry: Telemetry, expected: Telemetry) -> None:
    for key in ("weight_norm", "measured_norm", "raw_ratio", "ratio", "clamp", "skipped"):
        ours, theirs = getattr(telemetry, key), getattr(expected, key)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, err_msg=key)
    for key in ("total_norm", "clip"):
        np.testing.assert_allclose(getattr(telemetry, key), getattr(expected, key), rtol=1e-6)


# --- one layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "mode", "policy"),
    [
        (*case, policy)
        for policy in POLICIES
        for case in (FULL_CASES if policy == "scaler" else CASES)
    ],
)
def test_a_layer_that_is_not_finite(variant: str, mode: str, policy: str) -> None:
    """Under "propagate" a layer is as the reference's: NaN as a whole by its norm, else in the
    element alone. Under "skip" a layer whose norm is not finite keeps every bit, and any other is
    as under "propagate". No other layer is touched."""
    options, arguments = POLICIES[policy]
    start = make(variant, mode, **options)
    clean, call = start.copy(), start.copy()
    clean_telemetry = take(clean, "one chunk", **arguments)
    assert not clean_telemetry.skipped.any()
    plans = [stepper(call.rule, chunks) for chunks in CHUNKS]
    for where, value in spoilings(start, policy):
        before = start.copy()
        spoiled = spoil(before, where, value)
        truth = before.copy()
        true_telemetry = take(truth, "reference", **arguments)
        nan = [i in spoiled and is_in_norm(before, i, mode, where, value) for i in range(COUNT)]
        for plan in plans:
            restore(call, before)
            telemetry = call.take(plan.step, **arguments)
            assert telemetry.skipped.tolist() == [policy != "propagate" and i for i in nan]
            assert np.isnan(telemetry.ratio).tolist() == nan
            assert_telemetry(telemetry, true_telemetry)
            assert_same_places(call, truth)
            for i in range(COUNT):
                if telemetry.skipped[i]:
                    assert_same_bits(call.layer(i), before.layer(i))
                elif i in spoiled:
                    weight = call.params[i]
                    assert bool(weight.isnan().all()) == nan[i], f"layer {i}: {where} {value}"
                    assert_elsewhere_as(call, clean, i)
                else:
                    assert_same_bits(call.layer(i), clean.layer(i))
                    assert telemetry.ratio[i] == clean_telemetry.ratio[i]


# --- gradients ------------------------------------------------------------------------------------


@full_case
@every_backend
@pytest.mark.parametrize("limit", [None, 1.0])
def test_skip_keeps_everything_for_one_gradient_of_any_layer(
    variant: str, mode: str, backend: str, limit: float | None
) -> None:
    call = make(variant, mode, on_nonfinite="skip", max_grad_norm=limit)
    before, taker = call.copy(), stepper(call.rule, backend)
    for at, layer in enumerate(LAYERS):
        value = VALUES[at % len(VALUES)]
        spoil(call, "gradient", value, [layer])
        telemetry = call.take(taker.step)
        assert_same_bits(call.written(), before.written())
        assert telemetry.skipped.all()
        for key in ("weight_norm", "measured_norm", "raw_ratio"):
            assert np.isnan(getattr(telemetry, key)).all()
        np.testing.assert_array_equal(telemetry.ratio, 1.0)
        np.testing.assert_array_equal(telemetry.clamp, 0.0)
        norm = NAN if limit is None or math.isnan(value) else INF
        np.testing.assert_equal(telemetry.total_norm, norm)
        restore(call, before)


@full_case
@every_backend
def test_skip_for_a_gradient_of_another_group(variant: str, mode: str, backend: str) -> None:
    """Of one without trust, an empty layer between."""
    rule, options = VARIANTS[variant]
    weights, grads = random_tensors([3, 0, 4], 0), random_tensors([3, 0, 4], 1)
    grads[2][3] = INF
    groups: list[Options] = [
        {**options, **MODES[mode], "params": [0, 1], "on_nonfinite": "skip"},
        {**options, "params": [2], "on_nonfinite": "skip"},
    ]
    if "exclude" in groups[0]:
        groups[0]["exclude"] = (True, True)
    call = make_call(rule, weights, grads, *groups, taken=3)
    before = call.copy()
    assert take(call, backend).skipped.all()
    assert_same_bits(call.written(), before.written())


@full_case
@every_backend
def test_propagate_through_the_clip(variant: str, mode: str, backend: str) -> None:
    """As torch.nn.utils.clip_grad_norm_: a norm of NaN reaches every layer, one of infinity clips
    every gradient to nothing."""
    call = make(variant, mode, max_grad_norm=1.0)
    spoil(call, "gradient", NAN)
    telemetry = take(call, backend)
    assert math.isnan(telemetry.clip)
    assert not telemetry.skipped.any()
    assert all(param.isnan().all() for param in call.params)
    assert counts(call) == [4.0] * COUNT

    call = make(variant, mode, max_grad_norm=1.0)
    still = call.copy()
    still.grads = [torch.zeros_like(grad) for grad in still.grads]
    spoiled = spoil(call, "gradient", INF)
    telemetry = take(call, backend)
    take(still, backend)
    assert (telemetry.total_norm, telemetry.clip) == (INF, 0.0)
    for i, param in enumerate(call.params):
        if i in spoiled:
            assert param[AT].isnan()
            assert bool(param.isnan().all()) == (mode in MEASURED)
        else:
            assert_same_bits(call.layer(i), still.layer(i))


@full_case
def test_clip_and_policy_as_the_reference(variant: str, mode: str) -> None:
    for policy in ("propagate", "skip"):
        start = make(variant, mode, on_nonfinite=policy, max_grad_norm=2.0)
        for where in ("gradient", *places(start)):
            for value in VALUES[:2]:
                call = start.copy()
                spoil(call, where, value, [1, LAYERS[-1]])
                truth = call.copy()
                ours, expected = take(call, "two chunks"), take(truth, "reference")
                assert_telemetry(ours, expected)
                assert_same_places(call, truth)


# --- a gradient scaler's found_inf ----------------------------------------------------------------


@full_case
@every_backend
@pytest.mark.parametrize("limit", [None, 1.0])
@pytest.mark.parametrize("policy", ["skip", "propagate"])
def test_found_inf_keeps_everything(
    variant: str, mode: str, backend: str, limit: float | None, policy: str
) -> None:
    call = make(variant, mode, max_grad_norm=limit, on_nonfinite=policy)
    before, taker = call.copy(), stepper(call.rule, backend)
    for found in (1.0, torch.tensor([2.0]), NAN):
        telemetry = call.take(taker.step, found_inf=found, grad_scale=2.0)
        assert telemetry.skipped.all()
        assert np.isnan(telemetry.weight_norm).all()
        assert_same_bits(call.written(), before.written())


@full_case
@every_backend
@pytest.mark.parametrize("policy", ["skip", "propagate"])
def test_clipping_looks_at_gradients_that_a_scaler_found_finite(
    variant: str, mode: str, backend: str, policy: str
) -> None:
    call = make(variant, mode, max_grad_norm=1.0, on_nonfinite=policy)
    spoil(call, "gradient", NAN, LAYERS[::2])
    before = call.copy()
    telemetry = take(call, backend, found_inf=0.0)
    assert telemetry.skipped.all()
    assert_same_bits(call.written(), before.written())


@full_case
@pytest.mark.parametrize("limit", [None, 1.0])
def test_a_scaler_that_found_nothing_implies_skip(
    variant: str, mode: str, limit: float | None
) -> None:
    """Also where the group says "propagate", and where a scan looks at gradients once more."""
    call = make(variant, mode, max_grad_norm=limit)
    spoiled = spoil(call, "weight", NAN)
    before = call.copy()
    telemetry = take(call, "two chunks", found_inf=0.0)
    for i in range(COUNT):
        nan = i in spoiled and is_in_norm(before, i, mode, "weight", NAN)
        assert bool(telemetry.skipped[i]) == nan
        assert (call.steps[i] == 3) == nan
        if nan:
            assert_same_bits(call.layer(i), before.layer(i))


@full_case
def test_a_plan_forgets_what_it_has_skipped(variant: str, mode: str) -> None:
    """One bad gradient, weight or state stops one step, not those after it."""
    call = make(variant, mode, on_nonfinite="skip", max_grad_norm=1.0)
    twin = call.copy()  # nothing ever happens to it
    plan, other, layer = Plan(call.rule, chunk=LEAF), Plan(call.rule), LAYERS[0]

    def assert_steps_on() -> None:
        call.take(plan.step)
        twin.take(other.step)
        assert_same_bits(call.written(), twin.written())

    assert_steps_on()
    for where in ("gradient", *places(call, [layer])):
        sound = call.copy()
        spoil(call, where, NAN, [layer])
        skips = [i == layer and is_in_norm(call, i, mode, where, NAN) for i in range(COUNT)]
        if where == "gradient":
            skips = [True] * COUNT
        assert call.take(plan.step).skipped.tolist() == skips
        restore(call, sound)
        assert_steps_on()
    assert call.take(plan.step, found_inf=1.0).skipped.all()
    assert_steps_on()
    assert counts(call) == [6.0 + len(places(call, [layer]))] * COUNT
    assert plan.builds == 3  # with a scaler it is another plan


# --- 16 bits --------------------------------------------------------------------------------------


def at_the_edge(dtype: torch.dtype, master: bool, policy: str) -> Call:
    """Return a call that takes one element of layer 1 beyond what its dtype holds."""
    sizes = [5, SIZE, 6]
    params, grads = random_tensors(sizes, 0, dtype), random_tensors(sizes, 1, torch.float32)
    params[1][AT] = torch.finfo(dtype).max
    below = torch.nextafter(params[1][AT], torch.zeros((), dtype=dtype))
    grads[1][AT] = 3 * (below.float() - params[1][AT].float())  # three units in the last place
    group = {"lr": 1.0, **PINNED, "master_weights": master, "on_nonfinite": policy}
    return make_call("sgd", params, grads, group)


@every_backend
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("policy", ["propagate", "skip"])
def test_a_rounded_weight_that_overflows(backend: str, dtype: torch.dtype, policy: str) -> None:
    """As torch: the step is sound and its result is not. The next one sees it in the norm."""
    call = at_the_edge(dtype, False, policy)
    twin = call.params[1].float() - 0.25 * call.grads[1]
    telemetry = take(call, backend)
    assert not telemetry.skipped.any()
    assert telemetry.ratio[1] == 0.25
    assert call.params[1][AT] == INF == twin.to(dtype)[AT]
    assert_same_bits([call.params[1]], [twin.to(dtype)])
    assert counts(call) == [1.0, 1.0, 1.0]
    before = call.copy()
    telemetry = take(call, backend)
    assert telemetry.skipped.tolist() == [False, policy == "skip", False]
    if policy == "skip":
        assert_same_bits(call.layer(1), before.layer(1))
        assert counts(call) == [2.0, 1.0, 2.0]
    else:
        assert call.params[1].isnan().all()


@every_backend
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("policy", ["propagate", "skip"])
def test_a_master_outlives_its_roundings_overflow(
    backend: str, dtype: torch.dtype, policy: str
) -> None:
    call = at_the_edge(dtype, True, policy)
    start = call.params[1].clone()
    assert not take(call, backend).skipped.any()
    assert call.params[1][AT] == INF
    master = call.states[MASTER][1]
    assert master is not None
    assert master.isfinite().all()
    call.grads[1].neg_()
    assert not take(call, backend).skipped.any()
    assert call.params[1][AT] == start[AT]
    assert call.params[1].isfinite().all()


@pytest.mark.parametrize("backend", CHUNKS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_skipped_layer_keeps_the_bits_of_its_nans(backend: str, dtype: torch.dtype) -> None:
    """Their signs and payloads, too: nothing is written."""
    params = random_tensors([3, SIZE], 0, dtype)
    word = torch.int32 if dtype == torch.float32 else torch.int16
    for at, bit in ((0, 0), (AT, 1)):  # a negative NaN with something in it
        params[1].view(word)[at] = (params[1] * NAN).abs().view(word)[at].bitwise_not() ^ (1 << bit)
        params[1].view(word)[at] = ~params[1].view(word)[at] | torch.iinfo(word).min
    assert params[1].isnan().sum() == 2
    call = make_call(
        "sgd", params, random_tensors([3, SIZE], 1, dtype), {**PINNED, "on_nonfinite": "skip"}
    )
    before = call.copy()
    assert take(call, backend).skipped.tolist() == [False, True]
    assert_same_bits(call.layer(1), before.layer(1))


# --- through the optimizers -----------------------------------------------------------------------

TRUSTED: Options = {"trust": TrustRatio(upper=1.0)}
MAKERS: dict[str, Any] = {
    "SGD": partial(SGD, **TRUSTED),
    "dampened": partial(SGD, momentum=0.9, dampening=0.5, **TRUSTED),
    "RMSprop": partial(RMSprop, momentum=0.9, **TRUSTED),
    "Adagrad": partial(Adagrad, lr_decay=0.1, **TRUSTED),
    "Adam": partial(Adam, amsgrad=True, **TRUSTED),
    "AdamW": partial(AdamW, trust=TrustRatio(of="update")),
    "Adadelta": partial(Adadelta, trust=TrustRatio(of="update")),
    "LARS": partial(LARS, exclude=None),
    "LAMB": partial(LAMB, exclude=None, weight_decay=0.1),
}
every_maker = pytest.mark.parametrize("name", MAKERS)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, *HALF], ids=lambda dtype: str(dtype)[6:]
)


def two_layers(name: str, dtype: torch.dtype, **options: Any) -> tuple[Any, list[Parameter]]:
    """Return an optimizer of two groups of a layer each, with masters where the dtype has them."""
    params = [Parameter(w) for w in random_tensors([6, 4], 0, dtype)]
    groups: Any = [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": 0.2}]
    return MAKERS[name](groups, master_weights=True, **options), params


def give(params: list[Parameter], seed: int = 1) -> None:
    for param, grad in zip(params, random_tensors([6, 4], seed, params[0].dtype), strict=True):
        param.grad = grad


@every_maker
@every_dtype
def test_a_skipped_first_step_leaves_no_state(name: str, dtype: torch.dtype) -> None:
    late, params = two_layers(name, dtype, on_nonfinite="skip")
    prompt, twins = two_layers(name, dtype, on_nonfinite="skip")
    give(params)
    params[1].grad = torch.full_like(params[1], INF)
    with optimizer_unchanged(late):
        late.step()
    assert not late.state
    assert all(layer.skipped for layer in late.read_telemetry().values())
    for seed in (1, 2):
        give(params, seed)
        give(twins, seed)
        late.step()
        prompt.step()
    assert_same_bits(params, twins)
    for param, other in zip(params, twins, strict=True):
        assert (MASTER in late.state[param]) == (dtype in HALF)
        assert_same_bits(list(late.state[param].values()), list(prompt.state[other].values()))


@every_maker
@every_dtype
def test_an_optimizer_skips_one_layer(name: str, dtype: torch.dtype) -> None:
    optimizer, params = two_layers(name, dtype, on_nonfinite="skip")
    give(params)
    optimizer.step()
    state = optimizer.state[params[0]]
    with torch.no_grad():
        (state[MASTER] if dtype in HALF else params[0])[2] = NAN
    kept = [params[0], *state.values()]
    other = optimizer.state[params[1]].get(MASTER, params[1])  # a small step may round to nothing
    before = other.detach().clone()
    with unchanged(kept):
        optimizer.step()
    assert not torch.equal(other, before)
    telemetry = optimizer.read_telemetry()
    assert [telemetry[key].skipped for key in ("0.0", "1.0")] == [True, False]


@every_maker
@every_dtype
def test_a_skipped_new_layer_gets_no_state(name: str, dtype: torch.dtype) -> None:
    optimizer, params = two_layers(name, dtype, on_nonfinite="skip")
    give(params)
    with torch.no_grad():
        params[1][0] = INF
    optimizer.step()
    assert optimizer.read_telemetry()["1.0"].skipped
    assert list(optimizer.state) == [
        param for param, new in zip(params, (True, False), strict=True) if new and used(name, dtype)
    ]


def used(name: str, dtype: torch.dtype) -> bool:
    """Whether a layer of this optimizer has any state at all."""
    return name != "SGD" or dtype in HALF


def test_dispatch_defaults_to_propagate() -> None:
    w, g = torch.ones(3), torch.tensor([1.0, NAN, 1.0])
    date_kernels.step("sgd", [w], [g], {}, [None], [{"params": [0], "lr": 0.5}])
    np.testing.assert_array_equal(w.numpy(), [0.5, NAN, 0.5])


def test_every_state_is_spoilt() -> None:
    for name, variant in FULL.items():
        rule, group = RULES[name], {"lr": 0.1, **VARIANTS[variant][1]}
        assert rule.used(rule.complete(group)) == rule.states
