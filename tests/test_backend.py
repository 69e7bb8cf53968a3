"""The kernels, on every instruction set of this machine, against the float64 reference."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from helpers import (
    DECAY,
    DTYPES,
    TARGETS,
    TRUST,
    Options,
    assert_same_bits,
    float64,
    judged_step,
    make_call,
    random_tensors,
)
from variants import VARIANTS

import date_kernels
from date_kernels import RULES, native, reference
from date_kernels.items import LEAF
from date_kernels.plan import CHUNK, Plan

SIZES = (1, 17, LEAF + 3, 2 * LEAF + 5)
"""One element, a vector and its tail, two leaves, three leaves: the last two are several chunks of
`small_chunks`, and stay one chunk of a plan's own choice."""

small_chunks = partial(Plan, chunk=LEAF)

TRUST_OPTIONS: dict[str, Options] = {
    "bound-low": {"trust_lower": 4.0, "trust_upper": 8.0},
    "bound-high": {"trust_upper": 0.1},
    "coefficient": {"trust_coefficient": 0.02},
    "added": {"trust_weight_decay": "added"},
    "combined": {"trust_weight_decay": "combined"},
    "adabound": {"trust_bounds": "adabound", "trust_final": 0.1, "trust_gamma": 0.05},
    "clip_by_lr": {"trust_clip_by_lr": True, "trust_coefficient": 0.02},
    "clip_by_lr-cut": {"trust_clip_by_lr": True, "trust_coefficient": 0.9},
    "clip_by_lr-lr0": {"trust_clip_by_lr": True, "lr": 0.0},
    "phi-low": {"trust_weight_norm_bounds": (1e4, 2e4)},
    "phi-high": {"trust_weight_norm_bounds": (0.0, 1e-2)},
    "phi-added": {"trust_weight_norm_bounds": (0.0, 0.5), "trust_weight_decay": "added"},
    "eps": {"trust_eps": 50.0},
    "zero_norm": {"trust_zero_norm": 0.25},
    "zero_norm-bounded": {"trust_zero_norm": 9.0, "trust_upper": 3.0},
    "skip_without_decay": {"trust_skip_without_decay": True, "weight_decay": 0.0},
    "skip_without_decay-decay": {"trust_skip_without_decay": True},
    "exclude": {"exclude": (True, False, False, True, False)},
}

COMMON: dict[str, tuple[Options, float | None]] = {
    "maximize": ({"maximize": True}, None),
    "grad_scale": ({}, 1024.0),
    "grad_scale-rounded": ({}, 3.0),
    "clip": ({"max_grad_norm": 1.5}, None),
    "no-clip": ({"max_grad_norm": 1e6}, None),
    "all": ({"maximize": True, "max_grad_norm": 1.5}, 1024.0),
}


PLACES = ("gradient", "update", "weights")


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


MOMENTUM: Options = {"momentum": 0.9}
NESTEROV: Options = {"momentum": 0.9, "nesterov": True}
INSIDE: Options = {"momentum_scaling": "inside"}
RATIO_INSIDE: Options = {"momentum_scaling": "ratio_inside"}

UPDATE: Options = {**TRUST, "trust_of": "update"}
RATIOS: dict[str, Options] = {"plain": {}, "gradient": TRUST, "update": UPDATE}


def names_of(ratio: Options) -> list[str]:
    """The variants that go with it: the ratio of an update cannot stand inside its buffer."""
    return [
        name
        for name, (_, options) in VARIANTS.items()
        if ratio is not UPDATE or options["momentum_scaling"] == "outside"
    ]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("ratio", "name"), [(ratio, name) for ratio, of in RATIOS.items() for name in names_of(of)]
)
def test_every_variant_of_every_rule(
    name: str, ratio: str, dtypes: tuple[torch.dtype, torch.dtype], target: str
) -> None:
    rule, options = VARIANTS[name]
    plan, (dtype, grad_dtype) = small_chunks(rule, target=target), dtypes
    call = make_call(
        rule,
        random_tensors(SIZES, 0, dtype),
        random_tensors(SIZES, 1, grad_dtype),
        {**options, **RATIOS[ratio]},
        taken=7,
    )
    for seed in (1, 2, 3):
        call.grads = random_tensors(SIZES, seed, grad_dtype)
        judged_step(call, plan.step)
    assert plan.builds == 1


@pytest.mark.parametrize("place", ["gradient", "update", "weights"])
@pytest.mark.parametrize(
    ("ratio", "name"), [(ratio, name) for ratio, of in RATIOS.items() for name in names_of(of)]
)
def test_every_place_of_weight_decay(name: str, ratio: str, place: str, target: str) -> None:
    rule, options = VARIANTS[name]
    group = {**options, **RATIOS[ratio], "weight_decay": 0.3}
    make = partial(make_call, rule, random_tensors(SIZES, 0), random_tensors(SIZES, 1), taken=3)
    call, others = (
        make({**group, "weight_decay_in": place}),
        [make({**group, "weight_decay_in": other}).copy() for other in PLACES if other != place],
    )
    judged_step(call, small_chunks(rule, target=target).step)
    for other in others:
        other.take(Plan(rule, target=target).step)
        # The place must matter; for plain SGD all three are one formula.
        assert not torch.equal(call.params[-1], other.params[-1]) or name == "sgd-plain"


@pytest.mark.parametrize("grad_dtype", [torch.float32, None], ids=["float32", "own"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("ratio", "name"), [(ratio, name) for ratio, of in RATIOS.items() for name in names_of(of)]
)
def test_master_weights(
    name: str, ratio: str, dtype: torch.dtype, grad_dtype: torch.dtype | None, target: str
) -> None:
    """Norms and update are of the master; the parameter is its rounding, bit for bit (`judge`)."""
    rule, options = VARIANTS[name]
    plan = small_chunks(rule, target=target)
    call = make_call(
        rule,
        random_tensors(SIZES, 0, dtype),
        random_tensors(SIZES, 1, grad_dtype or dtype),
        {**options, **RATIOS[ratio], **DECAY, "master_weights": True},
        taken=7,
    )
    masters = [master.clone() for master in call.states["master"] if master is not None]
    assert len(masters) == len(SIZES)
    for seed in (1, 2):
        call.grads = random_tensors(SIZES, seed, grad_dtype or dtype)
        judged_step(call, plan.step)
    # What the masters hold beyond their rounding must have mattered.
    assert any(not torch.equal(m, m.to(dtype).float()) for m in masters)


@pytest.mark.parametrize("name", VARIANTS)
def test_first_steps(name: str, target: str) -> None:
    rule, options = VARIANTS[name]
    plan = Plan(rule, target=target)
    call = make_call(rule, random_tensors(SIZES, 0), random_tensors(SIZES, 1), options)
    for seed in (1, 2):
        call.grads = random_tensors(SIZES, seed)
        judged_step(call, plan.step)


BASES: dict[str, tuple[str, Options]] = {
    "momentum": ("sgd", MOMENTUM),
    "momentum-inside": ("sgd", {**MOMENTUM, **INSIDE}),
    "rmsprop": ("rmsprop", {"alpha": 0.9}),
    "adam": ("adam", {}),
    "lamb": ("adam", {"trust_of": "update"}),
    "adagrad": ("adagrad", {"lr_decay": 0.5}),
}


BASES_AND_OPTIONS = [
    (base, name)
    for base in BASES
    for name, option in TRUST_OPTIONS.items()
    if base != "lamb" or "trust_weight_decay" not in option  # of the gradient alone
]


@pytest.mark.parametrize(("base", "name"), BASES_AND_OPTIONS)
def test_every_option_of_the_ratio(base: str, name: str, target: str) -> None:
    rule, options = BASES[base]
    sizes = (*SIZES, 300)
    weights, grads = random_tensors(sizes, 0), random_tensors(sizes, 1)
    weights[1].zero_()
    grads[-1].zero_()
    common = {**options, **DECAY, "trust": True}
    call = make_call(rule, weights, grads, {**common, **TRUST_OPTIONS[name]}, taken=2)
    plain = make_call(rule, weights, grads, common, taken=2).copy()
    plan = small_chunks(rule, target=target)
    ratio = judged_step(call, plan.step).ratio.copy()
    if name != "skip_without_decay-decay":  # the option must matter, or nothing was tested
        assert not np.array_equal(ratio, judged_step(plain, Plan(rule).step).ratio)
    judged_step(call, plan.step)


@pytest.mark.parametrize("name", COMMON)
@pytest.mark.parametrize("trust", [{}, {"trust": True, "trust_upper": 0.5}], ids=["plain", "trust"])
@pytest.mark.parametrize(
    ("rule", "options"),
    [("sgd", MOMENTUM), ("rmsprop", {"centered": True, "eps": 1e-3}), ("adam", {"eps": 1e-3})],
    ids=["momentum", "rmsprop", "adam"],
)
def test_preparation_of_gradients(
    rule: str, options: Options, trust: Options, name: str, target: str
) -> None:
    common, grad_scale = COMMON[name]
    plan = small_chunks(rule, target=target)
    group = {**options, **DECAY, **trust, **common}
    call = make_call(rule, random_tensors(SIZES, 0), random_tensors(SIZES, 1), group, taken=3)
    for seed in (1, 2):
        call.grads = [g * (grad_scale or 1.0) for g in random_tensors(SIZES, seed)]
        telemetry = judged_step(call, plan.step, grad_scale=grad_scale)
        assert (telemetry.clip < 1) == (common.get("max_grad_norm") == 1.5)


def test_groups_of_all_kinds_in_one_call(target: str) -> None:
    """Layers of the groups interleave; what a group says must reach its layers and no other."""
    sizes = (5, 300, LEAF, LEAF + 1, 17, CHUNK + 1, 64, 33, 1, 3 * LEAF, 7, 40)
    for rule, groups in {
        "sgd": [
            {"lr": 0.1},
            {"lr": 0.2, **MOMENTUM, **TRUST, **DECAY, "exclude": (True, False, False)},
            {"lr": 0.3, **NESTEROV, **RATIO_INSIDE, "trust": True, "trust_upper": 0.7},
            {"lr": 0.4, **MOMENTUM, "dampening": 0.3, "maximize": True},
        ],
        "rmsprop": [
            {"lr": 0.1},
            {"lr": 0.2, **MOMENTUM, **TRUST, **DECAY, "exclude": (True, False, False)},
            {"lr": 0.3, **MOMENTUM, **INSIDE, "trust": True, "trust_upper": 0.7, "alpha": 0.5},
            {"lr": 0.4, "centered": True, "eps": 1e-2, "maximize": True},
        ],
        "adam": [
            {"lr": 0.1, **DECAY, "weight_decay_in": "weights"},
            {"lr": 0.2, **UPDATE, **DECAY, "weight_decay_in": "update"},
            {"lr": 0.3, **TRUST, "amsgrad": True, **DECAY, "exclude": (True, False, False)},
            {"lr": 0.4, "bias_correction": False, "betas": (0.5, 0.7), "maximize": True},
        ],
    }.items():
        for index, group in enumerate(groups):
            group["params"] = list(range(index, len(sizes), len(groups)))
            group["max_grad_norm"] = 100.0
        weights, grads = random_tensors(sizes, 0), random_tensors(sizes, 1)
        call = make_call(rule, weights, grads, *groups, taken=4)
        steps = [counter for counter in call.steps if counter is not None]
        steps[5].fill_(9)  # a layer that joined earlier than its neighbours
        plan = Plan(rule, target=target)
        for seed in (1, 2):
            call.grads = random_tensors(sizes, seed)
            judged_step(call, plan.step)


@pytest.mark.parametrize("size", [1, LEAF + 9])
@pytest.mark.parametrize(
    ("weight", "grad"),
    [(1e30, 1.0), (1.0, 1e30), (3e38, 3e38), (1e-42, 1e-42), (1e30, 1e-42), (1e-42, 1e30)],
)
@pytest.mark.parametrize("decay", ["ignored", "added", "combined"])
def test_norms_neither_overflow_nor_vanish(
    weight: float, grad: float, decay: str, size: int, target: str
) -> None:
    signs = torch.where(torch.arange(size) % 3 == 0, -1.0, 1.0)
    w, g = torch.full((size,), weight) * signs, torch.full((size,), grad)
    expected = [float(np.linalg.norm(x.numpy().astype(np.float64))) for x in (w, g)]
    assert all(0 < x < math.inf for x in expected)
    group = {
        "lr": 1e-3,
        "weight_decay": 0.5,  # a power of two: denormals stay exact
        "trust": True,
        "trust_weight_decay": decay,
        "trust_upper": 1.0,
        "max_grad_norm": 1e35,
    }
    call = make_call("sgd", [w], [g], group)
    telemetry = judged_step(call, Plan("sgd", target=target).step)
    np.testing.assert_allclose(telemetry.weight_norm, expected[0], rtol=1e-6)
    if decay != "combined":
        clip = min(1.0, 1e35 / expected[1])
        np.testing.assert_allclose(telemetry.measured_norm, clip * expected[1], rtol=1e-6)
    np.testing.assert_allclose(telemetry.total_norm, expected[1], rtol=1e-6)


def test_targets_agree_in_every_bit() -> None:
    for rule, options in VARIANTS.values():
        results = []
        for target in TARGETS:
            call = make_call(
                rule,
                random_tensors((*SIZES, CHUNK + 9), 0),
                random_tensors((*SIZES, CHUNK + 9), 1),
                {**options, **TRUST, "max_grad_norm": 9.0},
                taken=7,
            )
            call.take(Plan(rule, target=target).step)
            results.append(call.written())
        for result in results[1:]:
            assert_same_bits(result, results[0])


def test_a_target_asked_for_by_name_is_the_one_that_runs_or_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [name for name, _ in native.module().targets()]
    assert native.find_target("baseline") == (names.index("baseline"), "baseline")
    assert native.find_target()[1] == TARGETS[-1]
    with pytest.raises(RuntimeError, match="'sse9' is not in this build; compiled in: baseline"):
        Plan("sgd", target="sse9")
    monkeypatch.setenv(native.TARGET_VARIABLE, "baseline")
    assert native.find_target()[1] == "baseline"
    monkeypatch.setenv(native.TARGET_VARIABLE, "sse9")
    with pytest.raises(RuntimeError, match="'sse9' is not in this build"):
        Plan("sgd")


@pytest.mark.parametrize("name", VARIANTS)
def test_reference_backend_is_the_reference_rounded(name: str) -> None:
    rule, options = VARIANTS[name]
    group = {**options, **TRUST, "max_grad_norm": 9.0}
    call = make_call(
        rule, random_tensors((1, 17, 300), 0), random_tensors((1, 17, 300), 1), group, taken=7
    )
    params, grads, states, steps, groups = float64(call)
    expected = reference.step(rule, params, grads, states, steps, groups, grad_scale=2.0)
    telemetry = call.take(partial(date_kernels.step, rule, backend="reference"), grad_scale=2.0)
    for key in ("weight_norm", "measured_norm", "raw_ratio", "ratio", "clamp", "skipped"):
        np.testing.assert_array_equal(getattr(telemetry, key), getattr(expected, key), key)
    assert (telemetry.total_norm, telemetry.clip) == (expected.total_norm, expected.clip)
    for i, param in enumerate(call.params):
        np.testing.assert_array_equal(param.numpy(), params[i].astype(np.float32))
        counter = call.steps[i]
        assert counter is not None
        assert counter.item() == 8
        for key in RULES[rule].used(groups[0]):
            state = call.states[key][i]
            assert state is not None
            np.testing.assert_array_equal(state.numpy(), states[key][i].astype(np.float32))


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
def test_step_of_every_backend(backend: str | None) -> None:
    rule, options = VARIANTS["rmsprop-centered-momentum"]
    call = make_call(
        rule, random_tensors(SIZES, 0), random_tensors(SIZES, 1), {**options, **TRUST}, taken=7
    )
    judged_step(call, partial(date_kernels.step, rule, backend=backend), grad_scale=4.0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_scalars_may_be_tensors(backend: str) -> None:
    step = partial(date_kernels.step, "sgd", backend=backend)
    call = make_call("sgd", random_tensors((9,), 0), random_tensors((9,), 1), TRUST)
    other = call.copy()
    other.groups[0]["lr"] = torch.tensor(call.groups[0]["lr"], dtype=torch.float64)
    call.take(step, grad_scale=4.0, found_inf=0.0)
    other.take(step, grad_scale=torch.tensor([4.0]), found_inf=torch.tensor(0.0))
    assert_same_bits(other.params, call.params)


def test_no_layers() -> None:
    for groups in ([], [{"params": [], "lr": 0.1, "trust": True, "max_grad_norm": 1.0}]):
        telemetry = date_kernels.step("sgd", [], [], {}, [], groups)
        assert telemetry.ratio.shape == (0,)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("dtype", "wanted"), [(torch.float32, True), (torch.bfloat16, False)])
def test_states_that_the_options_do_not_use(dtype: torch.dtype, wanted: bool, backend: str) -> None:
    """A master beside float32 weights, or one that the group does not ask for, is left alone."""
    call = make_call("adam", [torch.ones(3, dtype=dtype)], [torch.ones(3, dtype=dtype)], {})
    call.groups[0]["master_weights"] = wanted
    extra = [torch.full((3,), 9.0), torch.full((3,), 7.0)]
    call.states |= {"master": [extra[0]], "max_exp_avg_sq": [extra[1]]}
    call.take(partial(date_kernels.step, "adam", backend=backend))
    assert_same_bits(extra, [torch.full((3,), 9.0), torch.full((3,), 7.0)])
    np.testing.assert_allclose(call.params[0].float().numpy(), 1 - 0.05, rtol=4e-3)


def test_a_gradient_that_cancels_its_decay() -> None:
    """The norm of ``g + decay*w`` is mostly rounding there, and the bound says so."""
    (weight,) = random_tensors((1000,), 0)
    (noise,) = random_tensors((1000,), 1)
    options = {**TRUST, "trust_weight_decay": "combined", "weight_decay": 0.1, "trust_upper": 1e9}
    gradient = -0.1 * weight * (1 + 1e-4 * noise)
    judged_step(make_call("sgd", [weight], [gradient], options), Plan("sgd").step)
