"""The tolerances that backends are held to: a kernel's float32 step keeps them, a wrong one does
not.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from reference_run import (
    ADAGRAD_TF1,
    DEFAULTS,
    FORMS,
    INF,
    INSIDE,
    NAN,
    PLACES,
    RMSPROP,
    Array,
    Options,
    Run,
    each_form,
    fresh_states,
)

from date_kernels import RULES, reference
from date_kernels.reference import Layer
from date_kernels.rules import row_of
from date_kernels.testing import BOUNDS, Rounding, Term, assert_close, tolerance
from date_kernels.testing import exact as exact_term

SINGLE = st.floats(-8, 8, width=32).map(lambda x: 0.0 if abs(x) < 2.0**-20 else x)


def single(x: Array) -> Array:
    """Return the values that float32 has of these."""
    return x.astype(np.float32).astype(np.float64)


def exact(layer: Layer, scale: float = 1.0) -> Layer:
    """Return a float64 copy with its gradient scaled."""
    state = {key: x.copy() for key, x in layer.state.items()}
    return replace(layer, weight=layer.weight.copy(), gradient=scale * layer.gradient, state=state)


def at_step(layer: Layer) -> dict[str, float]:
    """Return the layer's row, and what its step adds to it."""
    row, k = row_of(RULES[layer.rule], layer.group, False), layer.k
    row["lr"] /= 1 + (k - 1) * row["lr_decay"]
    row["weight_scale"] = 1 - row["lr"] * row["weights_decay"]
    if layer.rule == "sgd" and k == 1:
        row["one_minus_dampening"] = 1.0
    if layer.rule == "adam":
        corrected = row["bias_correction"] != 0
        row["mean_scale"] = 1 / (1 - row["beta1"] ** k) if corrected else 1.0
        row["root_scale"] = (1 - row["beta2"] ** k) ** -0.5 if corrected else 1.0
    return row


def kernel_step(layer: Layer, ratio: float, scale: float = 1.0) -> Layer:
    """Return the layer after the step of ``csrc/rules``, transcribed, in float32.

    Parameters
    ----------
    scale : float
        What the kernel multiplies the gradient by.
    """
    f: Any = np.float32
    numbers = at_step(layer)
    lr, lr_inside, ratio_inside = (numbers[key] for key in ("lr", "lr_inside", "ratio_inside"))
    row = {key: f(value) for key, value in numbers.items()}
    inside = f((lr if lr_inside else 1) * (ratio if ratio_inside else 1))
    outside = f((1 if lr_inside else lr) * (1 if ratio_inside else ratio))
    w, g = layer.weight.astype(f), layer.gradient.astype(f)
    s: Any = {key: x.astype(f) for key, x in layer.state.items()}

    with np.errstate(all="ignore"):
        d = f(scale) * g
        if row["gradient_decay"] != 0:
            d = d + row["gradient_decay"] * w
        if layer.rule == "sgd":
            u = inside * d
            if row["momentum"] != 0:
                b = row["momentum"] * s["momentum_buffer"] + row["one_minus_dampening"] * u
                s["momentum_buffer"] = b
                u = u + row["momentum"] * b if row["nesterov"] else b
        elif layer.rule == "rmsprop":
            v = row["alpha"] * s["square_avg"] + row["one_minus_alpha"] * (d * d)
            s["square_avg"] = v
            if row["centered"]:
                mean = s["grad_avg"] + row["one_minus_alpha"] * (d - s["grad_avg"])
                s["grad_avg"] = mean
                v = np.maximum(v - mean * mean, f(0))
            u = inside * (d / (np.sqrt(v + row["eps_inside"]) + row["eps_outside"]))
            if row["momentum"] != 0:
                s["momentum_buffer"] = u = row["momentum"] * s["momentum_buffer"] + u
        elif layer.rule == "adagrad":
            s["sum"] = s["sum"] + d * d
            u = d / (np.sqrt(s["sum"]) + row["eps"])
        elif layer.rule == "adam":
            m = s["exp_avg"] + row["one_minus_beta1"] * (d - s["exp_avg"])
            v = row["beta2"] * s["exp_avg_sq"] + row["one_minus_beta2"] * (d * d)
            s["exp_avg"], s["exp_avg_sq"] = m, v
            if row["amsgrad"]:
                s["max_exp_avg_sq"] = v = np.maximum(s["max_exp_avg_sq"], v)
            u = row["mean_scale"] * m / (row["root_scale"] * np.sqrt(v) + row["eps"])
        else:
            v = row["rho"] * s["square_avg"] + row["one_minus_rho"] * (d * d)
            u = np.sqrt(s["acc_delta"] + row["eps"]) / np.sqrt(v + row["eps"]) * d
            s["square_avg"] = v
            s["acc_delta"] = row["rho"] * s["acc_delta"] + row["one_minus_rho"] * (u * u)
        if row["update_decay"] != 0:
            u = u + inside * row["update_decay"] * w
        w = row["weight_scale"] * w - outside * u
    assert all(x.dtype == f for x in (w, *s.values()))
    return replace(layer, weight=w, state=s)


def assert_within(actual: Layer, before: Layer, ratio: float, storage: str | None = None) -> None:
    """Hold a step's outcome to the reference's step from `before`."""
    expected = exact(before)
    allowed, allowed_states = tolerance(before, ratio, storage=storage)
    reference.update(expected, ratio)
    assert set(allowed_states) == set(expected.state)
    for key, bound in allowed_states.items():
        assert_close(actual.state[key], expected.state[key], bound, key)
    assert_close(actual.weight, expected.weight, allowed, "weight")


def state_from(rule: str, group: Options, values: list[Array]) -> dict[str, Array]:
    """Return states as a run may have them: two arrays fill the signed ones, squares the others."""
    mean, other = values
    filled = {
        "momentum_buffer": other,
        "grad_avg": mean,
        "square_avg": mean**2,
        "sum": group.get("initial_accumulator_value", 0.0) + other**2,
        "exp_avg": mean,
        "exp_avg_sq": mean**2,
        "max_exp_avg_sq": np.maximum(mean**2, other**2),
        "acc_delta": 0.01 * other**2,
    }
    used = fresh_states(rule, group)
    return {key: single(filled[key]) for key, value in used.items() if value is not None}


FLOAT32 = Rounding(2.0**-24, 2.0**-126)


def nearest(actual: Any, expected: Any, bound: Any) -> float:
    """Return the largest error as a part of its bound, which none exceeds."""
    assert actual.dtype == np.float32
    assert_close(actual, expected, bound, "operation")
    return float(np.max(np.abs(actual - expected) / bound))


def test_each_operation_comes_near_its_bound() -> None:
    """A rounding that was not counted would exceed it, one too many stay farther off."""
    f: Any = np.float32
    rng = np.random.default_rng(0)
    x, y = (single(rng.random(100_000) + 0.5) for _ in range(2))
    a, b, p, q = x.astype(f), y.astype(f), exact_term(x), exact_term(y)
    assert nearest(a * b, x * y, FLOAT32.product(p, q).error) > 0.95
    assert nearest(a / b, x / y, FLOAT32.quotient(p, q).error) > 0.95
    assert nearest(a + b, x + y, FLOAT32.sum((1.0, p), (1.0, q))) > 0.95
    parts = {"constant": 0.0, "mix": 0.0, "outside": 0.0, "inside": 0.0, "scaled": 0.0}
    for c in rng.random(50) + 0.5:
        results = {
            "constant": (f(c) * a, c * x, FLOAT32.sum((c, p))),
            "mix": (f(c) * a + f(1 - c) * b, c * x + (1 - c) * y, FLOAT32.sum((c, p), (1 - c, q))),
            "outside": (
                np.sqrt(a) + f(c / 50),
                np.sqrt(x) + c / 50,
                FLOAT32.root(p, c / 50).error,
            ),
            "inside": (
                np.sqrt(a + f(c / 50)),
                np.sqrt(x + c / 50),
                FLOAT32.root(p, c / 50, inside=True).error,
            ),
            "scaled": (
                f(c) * np.sqrt(a) + f(0.01),
                c * np.sqrt(x) + 0.01,
                FLOAT32.root(exact_term(c**2 * x), 0.01, scaled=True).error,
            ),
        }
        parts = {key: max(part, nearest(*results[key])) for key, part in parts.items()}
    assert min(parts.values()) > 0.6, parts


def test_what_an_operation_carries_on() -> None:
    """Errors of the operands at their extremes, which leave nothing to the roundings."""
    x, y = Term(np.array(3.0), np.array(0.5)), Term(np.array(0.5), np.array(1.0), least=0.25)
    assert FLOAT32.product(x, y).error >= 3.5 * 1.5 - 3 * 0.5
    assert FLOAT32.quotient(x, y).error >= 3.5 / 0.25 - 3 / 0.5
    z = Term(np.array(2.0), np.array(0.5))
    assert 3.5 / 1.5 - 3 / 2 <= FLOAT32.quotient(x, z).error <= 1.01 * (3.5 / 1.5 - 3 / 2)
    assert 2 * 0.5 + 0.5 <= FLOAT32.sum((2.0, x), (-1.0, z)) <= 1.01 * (2 * 0.5 + 0.5)
    for wide in (x, Term(np.array(0.5), np.array(1.0))):  # from where the root is not below 0
        low, high = np.sqrt(np.maximum(wide.size - wide.error, 0.0)), np.sqrt(wide.most)
        error = FLOAT32.root(wide, 0.0).error
        assert max(high - np.sqrt(wide.size), np.sqrt(wide.size) - low) <= error
    assert FLOAT32.root(y, 0.25).least == pytest.approx(0.25, rel=1e-6)
    assert FLOAT32.root(y, 0.25, inside=True).least == pytest.approx(0.5, rel=1e-6)


def test_every_rule_has_its_bound() -> None:
    assert set(BOUNDS) == set(reference.RULES) == set(RULES)


@settings(deadline=None, max_examples=100)
@given(
    data=st.data(),
    place=st.sampled_from(PLACES),
    decay=st.sampled_from([0.0, 0.1]),
    scale=st.sampled_from([1.0, -0.3]),
    ratio=st.floats(0.0, 10.0, width=32),
    cancel=st.booleans(),
    k=st.sampled_from([1, 2, 1000]),
)
@each_form
def test_a_float32_step_is_within_the_tolerance(
    *,
    rule: str,
    options: Options,
    place: str,
    data: st.DataObject,
    decay: float,
    scale: float,
    ratio: float,
    cancel: bool,
    k: int,
) -> None:
    values = arrays(np.float64, 8, elements=SINGLE)
    weight, gradient, other, mean = (data.draw(values) for _ in range(4))
    if cancel and decay:  # d = g + lambda*w is nothing but rounding
        gradient = single(-decay * weight / scale)
    elif cancel:  # so is the centered variance, or Adam's d - m
        mean = scale * gradient
    group = {**DEFAULTS[rule], **options, "weight_decay": decay, "weight_decay_in": place}
    layer = Layer(rule, weight, gradient, state_from(rule, group, [mean, other]), k, group)
    assert_within(kernel_step(layer, ratio, scale), exact(layer, scale), ratio)


@pytest.mark.parametrize("place", PLACES)
@each_form
def test_float32_steps_come_near_the_tolerance(rule: str, options: Options, place: str) -> None:
    """Within it, but not far: thousands of random elements, of which few round all one way.

    From fresh states, whose error is the gradient's, and from others.
    """
    rng = np.random.default_rng(0)
    scale, ratio = -0.3, 64.0
    parts: dict[str, float] = {}
    for k, decay, cancel in itertools.product((1, 2), (0.0, 0.1, 10.0), (False, True)):
        weight, gradient, other, mean = (single(rng.standard_normal(2000)) for _ in range(4))
        if cancel and decay:
            gradient = single(-decay * weight / scale)
        elif cancel:
            mean = single(scale * gradient)
        filled = [0 * mean, 0 * other] if k == 1 else [mean, other]
        group = {**DEFAULTS[rule], **options, "weight_decay": decay, "weight_decay_in": place}
        layer = Layer(rule, weight, gradient, state_from(rule, group, filled), k, group)
        before = exact(layer, scale)
        actual, after = kernel_step(layer, ratio, scale), exact(before)
        weight_tolerance, tolerances = tolerance(before, ratio)
        reference.update(after, ratio)
        for key, ours, theirs, allowed in (
            ("weight", actual.weight, after.weight, weight_tolerance),
            *((key, actual.state[key], after.state[key], tolerances[key]) for key in tolerances),
        ):
            parts[key] = max(parts.get(key, 0.0), nearest(ours, theirs, allowed))
    assert min(parts.values()) > 0.25, parts


def test_the_tolerance_carries_the_error_of_a_large_moving_average() -> None:
    rng = np.random.default_rng(0)
    weight, gradient = np.zeros(1000), np.ones(1000)
    mean = single(1e4 * (1 + rng.random(1000)))
    now = 0.1 * mean + 0.9
    # v - gbar^2 is a thousandth of either, and gbar's error is that of the far larger mean before.
    square = single(10 * (1.001 * now**2 - 0.9))
    state = {"square_avg": square, "grad_avg": mean}
    group = {**RMSPROP, "alpha": 0.1, "centered": True}
    layer = Layer("rmsprop", weight, gradient, state, 2, group)
    assert_within(kernel_step(layer, 1.0), layer, 1.0)


def test_the_tolerance_carries_the_error_of_a_mean_that_cancels() -> None:
    rng = np.random.default_rng(0)
    mean = single(1 + rng.random(1000))
    group = {**DEFAULTS["adam"], "betas": (0.5, 0.999)}
    # 0.5*m + 0.5*d is what rounding d left, times a thousand for the root of a small average.
    state = {"exp_avg": mean, "exp_avg_sq": np.full(1000, 1e-6)}
    layer = Layer("adam", np.zeros(1000), single(-mean / -0.3), state, 1000, group)
    assert_within(kernel_step(layer, 1.0, -0.3), exact(layer, -0.3), 1.0)


def test_the_tolerance_carries_the_error_of_a_small_square() -> None:
    rng = np.random.default_rng(0)
    weight = single(1 + rng.random(1000))
    group = {**DEFAULTS["adam"], "weight_decay": 0.1}
    # d is what rounding left of the gradient against the decay, and its square all that there is.
    state = {"exp_avg": np.ones(1000), "exp_avg_sq": np.zeros(1000)}
    layer = Layer("adam", weight, single(-0.1 * weight / -0.3), state, 2, group)
    assert_within(kernel_step(layer, 1.0, -0.3), exact(layer, -0.3), 1.0)


def in_the_middle(rule: str, **options: Any) -> Layer:
    """Return a layer at its third step, of small weights and with no number near 0."""
    rng = np.random.default_rng(0)
    run = Run(rule, [single(0.1 * rng.random(100) + 0.1)], options)
    for size in (2.0, 1.0):
        run.step([single(size * (rng.random(100) + 1))])
    layer = run.layers([single(3 * (rng.random(100) + 1))])[0]
    state = {key: single(x) for key, x in layer.state.items()}
    return replace(layer, weight=single(layer.weight), state=state)


@each_form
def test_the_tolerance_refuses_a_slightly_wrong_step(rule: str, options: Options) -> None:
    layer = in_the_middle(rule, **options)
    ratio = 64.0  # a large step: the weights' own rounding hides nothing of it
    bound, states = tolerance(layer, ratio)
    right, wrong = exact(layer), exact(layer, 1.0 + 1e-5)
    reference.update(right, ratio)
    reference.update(wrong, ratio)
    with pytest.raises(AssertionError, match=r"^weight: "):
        assert_close(wrong.weight, right.weight, bound, "weight")
    for key in states:
        with pytest.raises(AssertionError, match=f"^{key}: "):
            assert_close(wrong.state[key], right.state[key], states[key], key)


DECAY: Options = {"weight_decay": 0.1}
MORE_DECAY: Options = {"weight_decay": 0.1001}
UPDATE: Options = {**DECAY, "weight_decay_in": "update"}
MOMENTUM: Options = {"momentum": 0.9}

WRONG: list[tuple[str, Options, Options]] = [
    *((rule, {"eps": 1e-4}, {"eps": 0.0}) for rule in ("rmsprop", "adagrad", "adam")),
    ("adadelta", {"eps": 1e-3}, {"eps": 0.99e-3}),
    ("rmsprop", {"eps": 1e-4}, {"eps": 1e-4, "eps_inside_sqrt": True}),
    ("rmsprop", {"alpha": 0.9}, {"alpha": 0.9001}),
    ("rmsprop", {"centered": True}, {"centered": False}),
    ("adagrad", {"lr_decay": 1e-4}, {}),
    ("adam", {}, {"betas": (0.999, 0.9)}),
    ("adam", {}, {"betas": (0.9, 0.9)}),
    ("adam", {}, {"betas": (0.999, 0.999)}),
    ("adam", {}, {"bias_correction": False}),
    ("adam", {}, {"betas": (0.9001, 0.999)}),
    ("adam", {}, {"betas": (0.9, 0.99901)}),
    ("adadelta", {}, {"rho": 0.9001}),
    ("sgd", {**MOMENTUM, "dampening": 1e-4}, MOMENTUM),
    ("sgd", MOMENTUM, {"momentum": 0.9001}),
    ("sgd", {**MOMENTUM, "nesterov": True}, MOMENTUM),
    ("sgd", {**MOMENTUM, **UPDATE}, {**MOMENTUM, **DECAY}),
    ("sgd", {**MOMENTUM, **UPDATE, **INSIDE}, {**MOMENTUM, **DECAY, **INSIDE}),
    *(
        (rule, {**DECAY, "weight_decay_in": place}, {**DECAY, "weight_decay_in": other})
        for rule in DEFAULTS
        for place in PLACES
        for other in PLACES
        if place != other and not (rule == "sgd" and "weights" not in (place, other))
    ),
    *(
        (rule, {**DECAY, "weight_decay_in": place}, {**MORE_DECAY, "weight_decay_in": place})
        for rule in DEFAULTS
        for place in PLACES
    ),
]
"""Rules, their options, and options that make them another formula."""


@pytest.mark.parametrize(("rule", "options", "wrong"), WRONG, ids=str)
def test_the_tolerance_refuses_another_formula(rule: str, options: Options, wrong: Options) -> None:
    layer, ratio = in_the_middle(rule, **options), 0.5
    assert_within(kernel_step(layer, ratio), layer, ratio)
    other = replace(layer, group={**DEFAULTS[rule], **wrong})
    with pytest.raises(AssertionError, match=r": error .* exceeds"):
        assert_within(kernel_step(other, ratio), layer, ratio)


def test_the_tolerance_refuses_a_forgotten_maximum() -> None:
    layer = in_the_middle("adam", amsgrad=True, betas=(0.9, 0.5))
    state = {**layer.state, "max_exp_avg_sq": 2 * layer.state["max_exp_avg_sq"]}
    layer = replace(layer, state=state)
    assert_within(kernel_step(layer, 1.0), layer, 1.0)
    forgetful = replace(layer, state={**state, "max_exp_avg_sq": 0 * state["exp_avg_sq"]})
    with pytest.raises(AssertionError, match=r"^max_exp_avg_sq: "):
        assert_within(kernel_step(forgetful, 1.0), layer, 1.0)


# --- 16-bit weights -----------------------------------------------------------------------------

FORMATS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
STORED = st.sampled_from(sorted(FORMATS))


def stored(x: Array, storage: str) -> Array:
    """Return float32 values rounded to nearest."""
    rounded = torch.from_numpy(x).to(torch.float32).to(FORMATS[storage])
    array: Array = rounded.double().numpy()
    return array


@settings(deadline=None, max_examples=200)
@given(
    form=st.sampled_from(FORMS),
    place=st.sampled_from(PLACES),
    storage=STORED,
    size=st.integers(-24, 0).map(lambda n: 2.0**n),
    data=st.data(),
)
def test_a_stored_step_is_within_the_tolerance(
    *, form: tuple[str, Options], place: str, storage: str, size: float, data: st.DataObject
) -> None:
    """Down to float16's subnormal numbers."""
    rule, options = form
    values = arrays(np.float64, 8, elements=SINGLE)
    weight, gradient, *filled = (data.draw(values) for _ in range(4))
    group = {**DEFAULTS[rule], **options, "weight_decay": 0.1, "weight_decay_in": place}
    state = state_from(rule, group, filled)
    weight, gradient = stored(size * weight, storage), stored(gradient, storage)
    layer = Layer(rule, weight, gradient, state, 2, group)
    after = kernel_step(layer, size)
    assume(np.abs(after.weight).max() < 6e4)  # within float16's range
    assert_within(replace(after, weight=stored(after.weight, storage)), layer, size, storage)


@pytest.mark.parametrize("storage", FORMATS)
@pytest.mark.parametrize("size", [1.0, 2.0**-22])
def test_the_tolerance_refuses_a_stored_step_that_truncates(storage: str, size: float) -> None:
    rng = np.random.default_rng(0)
    weight = stored(size * (1 + rng.random(1000)), storage)
    layer = Layer("sgd", weight, size * single(rng.random(1000)), {}, 1, DEFAULTS["sgd"])
    after = kernel_step(layer, 1.0)
    nearest = stored(after.weight, storage)
    assert_within(replace(after, weight=nearest), layer, 1.0, storage)
    below = (
        stored(nearest * (1 - 2.0**-7), storage)
        if storage == "bfloat16"
        else np.nextafter(nearest.astype(np.float16), np.float16(0)).astype(np.float64)
    )
    truncated = np.where(nearest > after.weight, below, nearest)
    with pytest.raises(AssertionError, match=r"^weight: "):
        assert_within(replace(after, weight=truncated), layer, 1.0, storage)
    with pytest.raises(AssertionError, match=r"^weight: "):  # float32's is no 16-bit weight's
        assert_within(replace(after, weight=nearest), layer, 1.0)


def test_a_fresh_accumulator_of_tf1_needs_no_eps() -> None:
    group = {**DEFAULTS["adagrad"], **ADAGRAD_TF1}
    layer = Layer("adagrad", np.ones(3), np.zeros(3), {"sum": np.full(3, 0.125)}, 1, group)
    assert_within(kernel_step(layer, 1.0), layer, 1.0)


# --- the comparison -----------------------------------------------------------------------------


def test_assert_close_shows_the_worst_error() -> None:
    with pytest.raises(AssertionError, match=r"^x: error 0.5 exceeds 0.25 at index \(1, 0\)"):
        assert_close(
            [[1.0, 2.1], [3.5, 4.0]], [[1.0, 2.0], [3.0, 4.0]], [[1.0, 1.0], [0.25, 1.0]], "x"
        )
    assert_close([NAN, INF, 1.0], [NAN, INF, 1.0], [NAN, NAN, 0.0], "equal")
    for actual, expected in ((NAN, 1.0), (1.0, NAN), (INF, -INF), (INF, 1.0), (1.0, INF)):
        with pytest.raises(AssertionError, match=r"^x: error"):
            assert_close([actual], [expected], 1.0, "x")
    with pytest.raises(AssertionError, match="tolerance is not finite"):
        assert_close([1.0], [1.0], INF, "x")
    with pytest.raises(AssertionError, match="shape"):
        assert_close([1.0], 1.0, 1.0, "x")
