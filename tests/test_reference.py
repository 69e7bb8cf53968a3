"""The reference against golden numbers and the facts of its own mathematics.

Its rules: `test_reference_rules.py`; how far backends may be off: `test_reference_bounds.py`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from reference_run import (
    ADAGRAD_TF1,
    FORMS,
    INF,
    INSIDE,
    LAMB,
    NAN,
    PLACES,
    RATIO_INSIDE,
    RMSPROP_TF1,
    SCALINGS,
    SGD,
    Array,
    G,
    Options,
    Run,
    W,
    each_form,
    gradients,
    one_step,
)

from date_kernels import reference
from date_kernels.reference import Layer, Telemetry
from date_kernels.testing import assert_close

GOLDEN = json.loads((Path(__file__).parent / "golden" / "optimizers.json").read_text())

# --- golden numbers -----------------------------------------------------------------------------

LARS: Options = {
    "momentum": 0.9,
    "weight_decay": 0.01,
    "trust_weight_decay": "added",
    "trust_coefficient": 0.02,
}
DATE_ROWS: dict[str, tuple[str, Options]] = {
    "DATE-SGD": ("sgd", {}),
    "DATE-momentum.9 lr-outside": ("sgd", {"momentum": 0.9}),
    "DATE-momentum.9 lr-inside": ("sgd", {"momentum": 0.9, "momentum_scaling": "inside"}),
    "DATE-nesterov.9 lr-outside": ("sgd", {"momentum": 0.9, "nesterov": True}),
    "DATE-rmsprop torch(.99,1e-8)": ("rmsprop", {}),
    "DATE-adagrad torch": ("adagrad", {}),
    "DATE-adagrad TF1": ("adagrad", ADAGRAD_TF1),
    "DATE-rmsprop TF1(.9,1e-10)": ("rmsprop", RMSPROP_TF1),
    "DATE-adam r(grad)": ("adam", {}),
    "DATE-adam r(update)": ("adam", {"trust_of": "update"}),
}
LAMB_DECAY: Options = {**LAMB, "lr": 0.01, "weight_decay": 0.01}
NO_CORRECTION: Options = {"bias_correction": False}
GOLDEN_ROWS: dict[str, tuple[str, Options]] = {
    **{
        f"{name}[{lower},{upper}]": (rule, {**options, "trust_lower": lower, "trust_upper": upper})
        for name, (rule, options) in DATE_ROWS.items()
        for lower, upper in ((0.0, INF), (0.5, 2.0))
    },
    "LARS A lr-inside, wd in grad (TF/TPU,optax-like)": ("sgd", {**LARS, **INSIDE}),
    "LARS A nesterov (TF use_nesterov)": ("sgd", {**LARS, **INSIDE, "nesterov": True}),
    "LARS B lr-outside (NUS/ColossalAI eps1e-5)": ("sgd", {**LARS, "trust_eps": 1e-5}),
    "LARS D norm of (g+wd w), lr-inside (optax/tf-models)": (
        "sgd",
        {**LARS, **INSIDE, "trust_weight_decay": "combined"},
    ),
    "LARS E popular momentum, ratio on buffer (tf-models classic_momentum=False)": (
        "sgd",
        {**LARS, "trust_weight_decay": "ignored", "trust_of": "update"},
    ),
    "LIMIT eq2 (eeta=1) lr-inside": ("sgd", {**LARS, **INSIDE, "trust_coefficient": 1.0}),
    "LAMB bias-corrected wd0 eps1e-6 lr.01": ("adam", {**LAMB_DECAY, "weight_decay": 0.0}),
    "LAMB bias-corrected wd.01": ("adam", LAMB_DECAY),
    "LAMB no-bc wd.01 (ALBERT/cybertronai/Colossal)": ("adam", {**LAMB_DECAY, **NO_CORRECTION}),
    "LAMB no-bc wd0": ("adam", {**LAMB_DECAY, **NO_CORRECTION, "weight_decay": 0.0}),
    "LAMB bc wd.01 clip0.3": ("adam", {**LAMB_DECAY, "max_grad_norm": 0.3}),
    "LAMB bc wd.01 phi clamp [0,1]": (
        "adam",
        {**LAMB_DECAY, "trust_weight_norm_bounds": (0.0, 1.0)},
    ),
}
VARYING_ROWS: dict[str, Options] = {
    "DATE momentum: lr and r outside": {"momentum": 0.9},
    "DATE momentum: lr and r inside": {"momentum": 0.9, **INSIDE},
    "DATE momentum: r inside, lr outside (timm-like)": {"momentum": 0.9, **RATIO_INSIDE},
    "LARS A: lr and ratio inside (TF/TPU)": {**LARS, **INSIDE},
    "LARS F: ratio inside, lr outside (timm,torch_optimizer)": {**LARS, **RATIO_INSIDE},
    "LARS B0: lr and ratio outside, eps 0 (NUS form)": LARS,
}
# Decay in the ratio but not in the gradient, which no option expresses.
INEXPRESSIBLE = {"LARS C tf.contrib lr-outside, NO wd in grad"}


def test_every_golden_row_is_accounted_for() -> None:
    assert set(GOLDEN["res"]) == set(GOLDEN_ROWS) | INEXPRESSIBLE
    assert not set(GOLDEN_ROWS) & INEXPRESSIBLE
    assert set(GOLDEN["varying_lr"]["res"]) == set(VARYING_ROWS)


@pytest.mark.parametrize("row", GOLDEN_ROWS)
def test_golden(row: str) -> None:
    rule, options = GOLDEN_ROWS[row]
    run = Run(rule, [GOLDEN["w0"]], {"lr": GOLDEN["lr"], **options})
    for grad in GOLDEN["grads"]:
        run.step([grad])
    assert_close(run.params[0], GOLDEN["res"][row], 1e-12, row)


@pytest.mark.parametrize("row", VARYING_ROWS)
def test_golden_with_varying_lr(row: str) -> None:
    golden = GOLDEN["varying_lr"]
    run = Run("sgd", [GOLDEN["w0"]], VARYING_ROWS[row])
    for grad, lr in zip(GOLDEN["grads"], golden["lr"], strict=True):
        run.groups[0]["lr"] = lr
        run.step([grad])
    assert_close(run.params[0], golden["res"][row], 1e-12, row)


# --- the ratio ----------------------------------------------------------------------------------


def ratio_of(weight: Any, gradient: Any, k: int = 1, **options: Any) -> reference.TrustRatio:
    layer = Layer("sgd", np.array(weight), np.array(gradient), {}, k, {**SGD, **options})
    return reference.trust_ratio(layer)


@pytest.mark.parametrize(
    ("options", "raw"),
    [
        ({}, 2.5),
        ({"trust_coefficient": 0.02}, 0.05),
        ({"trust_eps": 0.5}, 2.0),
        ({"weight_decay": 0.5}, 2.5),
        ({"weight_decay": 0.5, "trust_weight_decay": "added"}, 5 / 4.5),
        ({"weight_decay": 0.5, "trust_weight_decay": "combined"}, 5 / math.hypot(1.5, 4)),
        ({"trust_weight_norm_bounds": (0.0, 1.0)}, 0.5),
        ({"trust_weight_norm_bounds": (6.0, 10.0)}, 3.0),
        ({"trust_clip_by_lr": True, "lr": 10.0}, 0.25),
        ({"trust_clip_by_lr": True, "lr": 0.1}, 1.0),
        ({"trust_clip_by_lr": True, "lr": 0.0}, 1.0),
        ({"momentum": 0.9, "trust_of": "update"}, 2.5),
    ],
)
def test_raw_ratio(options: Options, raw: float) -> None:
    layer_state = {"momentum_buffer": np.zeros(2)}
    layer = Layer("sgd", np.array(W), np.array(G), layer_state, 1, {**SGD, **options})
    ratio = reference.trust_ratio(layer)
    assert ratio.raw_ratio == pytest.approx(raw, rel=1e-15)
    assert ratio.ratio == ratio.raw_ratio
    assert ratio.clamp == 0
    assert ratio.weight_norm == pytest.approx(5, rel=1e-15)
    assert not layer_state["momentum_buffer"].any()


def test_the_added_decay_is_not_part_of_the_measured_norm() -> None:
    options: Options = {"weight_decay": 0.5, "trust_weight_decay": "added"}
    assert ratio_of(W, G, **options).measured_norm == 2
    options["trust_weight_decay"] = "combined"
    assert ratio_of(W, G, **options).measured_norm == pytest.approx(math.hypot(1.5, 4))


def test_the_bounds_and_their_report() -> None:
    low = ratio_of(W, G, trust_lower=3.0, trust_upper=4.0)
    assert (low.raw_ratio, low.ratio, low.clamp) == (2.5, 3.0, -1)
    high = ratio_of(W, G, trust_lower=0.1, trust_upper=1.0)
    assert (high.raw_ratio, high.ratio, high.clamp) == (2.5, 1.0, 1)
    # The division by the rate comes first: clamped first it would be 0.1.
    assert ratio_of(W, G, trust_upper=1.0, trust_clip_by_lr=True, lr=10.0).ratio == 0.25


@pytest.mark.parametrize(("weight", "gradient"), [([0.0, 0.0], G), (W, [0.0, 0.0]), ([], [])])
def test_zero_norms(weight: Any, gradient: Any) -> None:
    assert ratio_of(weight, gradient).ratio == 1.0
    assert ratio_of(weight, gradient, trust_zero_norm=0.7, trust_eps=0.1).ratio == 0.7
    bounded = ratio_of(weight, gradient, trust_zero_norm=5.0, trust_upper=2.0)
    assert (bounded.raw_ratio, bounded.ratio, bounded.clamp) == (5.0, 2.0, 1)
    # Neither phi's lower bound nor the rate enters.
    options: Options = {
        "trust_weight_norm_bounds": (1.0, 9.0),
        "trust_clip_by_lr": True,
        "lr": 10.0,
    }
    assert ratio_of(weight, gradient, **options).ratio == 1.0


def test_a_zero_gradient_with_added_decay_is_no_zero_norm() -> None:
    options: Options = {"weight_decay": 0.5, "trust_weight_decay": "added"}
    assert ratio_of(W, [0.0, 0.0], **options).ratio == 2.0


def test_adabound_closes_in_on_its_final_value() -> None:
    options: Options = {"trust_bounds": "adabound", "trust_final": 0.1, "trust_gamma": 0.5}
    for k in (1, 2, 100):
        lower, upper = 0.1 * (1 - 1 / (0.5 * k + 1)), 0.1 * (1 + 1 / (0.5 * k))
        assert ratio_of(W, G, k, **options).ratio == upper
        assert ratio_of(W, [1e9, 0.0], k, **options).ratio == lower
    run = Run("sgd", [W, W], {**options, "params": [0, 1]})
    run.steps[0][...] = 99
    assert run.step([G, G]).ratio.tolist() == [0.1 * (1 + 1 / 50), 0.1 * 3]
    assert run.step([G, G]).ratio.tolist() == [0.1 * (1 + 1 / 50.5), 0.1 * 2]


def test_a_layer_without_counter_is_at_its_first_step() -> None:
    run = Run("sgd", [W], {"trust_bounds": "adabound", "trust_final": 0.1, "trust_gamma": 0.5})
    run.steps = [None]  # type: ignore[list-item]
    assert [run.step([G]).ratio[0] for _ in range(2)] == [0.1 * 3] * 2


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["weight", "gradient"])
@pytest.mark.parametrize("decay", ["ignored", "added", "combined"])
def test_a_norm_that_is_not_finite_is_never_clamped(bad: float, where: str, decay: str) -> None:
    weight, gradient = ([bad, 1.0], G) if where == "weight" else (W, [bad, 1.0])
    options: Options = {
        "weight_decay": 0.1,
        "trust_weight_decay": decay,
        "trust_lower": 0.1,
        "trust_upper": 1,
    }
    ratio = ratio_of(weight, gradient, **options)
    assert math.isnan(ratio.ratio)
    assert math.isnan(ratio.raw_ratio)
    assert ratio.clamp == 0
    # Also where the other norm is zero.
    other = ([bad, 1.0], [0.0, 0.0]) if where == "weight" else ([0.0, 0.0], [bad, 1.0])
    assert math.isnan(ratio_of(*other, **options).ratio)


def test_clamp_keeps_nan() -> None:
    value, hit = reference.clamp(NAN, 0.1, 1.0)
    assert math.isnan(value)
    assert hit == 0


def test_norms_neither_overflow_nor_vanish() -> None:
    for size in (1e300, 1e-300, 1.0, 5e-324):
        x = np.full((3, 3), size)
        assert reference.norm(x) == pytest.approx(3 * size, rel=1e-15)
    assert reference.norm(np.zeros((0, 3))) == 0
    assert reference.norm(np.array(-2.0)) == 2
    assert math.isnan(reference.norm(np.array([NAN, INF])))
    assert reference.norm(np.array([1.0, -INF])) == INF


FINITE = st.floats(-1e100, 1e100)
RATIO_OPTIONS = st.fixed_dictionaries(
    {
        "lr": st.floats(0, 1e3),
        "weight_decay": st.sampled_from([0.0, 0.01]),
        "trust_weight_decay": st.sampled_from(["ignored", "added", "combined"]),
        "trust_coefficient": st.floats(0, 1e3),
        "trust_eps": st.sampled_from([0.0, 1e-8]),
        "trust_zero_norm": st.floats(0, 1e3),
        "trust_weight_norm_bounds": st.sampled_from([None, (0.0, 10.0)]),
        "trust_clip_by_lr": st.booleans(),
    }
)


@settings(deadline=None)
@given(
    arrays(np.float64, 3, elements=FINITE),
    arrays(np.float64, 3, elements=FINITE),
    RATIO_OPTIONS,
    st.lists(st.floats(0, allow_nan=False), min_size=2, max_size=2).map(sorted),
    st.integers(1, 1000),
    st.sampled_from(["constant", "adabound"]),
)
def test_the_ratio_is_within_its_bounds(
    weight: Array, gradient: Array, options: Options, limits: list[float], k: int, kind: str
) -> None:
    lower, upper = limits
    bounds: Options = {"trust_lower": lower, "trust_upper": upper, "trust_bounds": kind}
    moving: Options = {"trust_final": 0.5, "trust_gamma": 1e-3}
    ratio = ratio_of(weight, gradient, k, **options, **bounds, **moving)
    if kind == "adabound":
        lower, upper = 0.5 * (1 - 1 / (1e-3 * k + 1)), 0.5 * (1 + 1 / (1e-3 * k))
    assert lower <= ratio.ratio <= upper
    assert ratio.clamp == (ratio.raw_ratio < lower) * -1 + (ratio.raw_ratio > upper)


MODERATE = st.floats(-100, 100).map(lambda x: 0.0 if abs(x) < 1e-6 else x)
VECTOR = arrays(np.float64, 3, elements=MODERATE)
POWER = st.integers(-20, 20).map(lambda n: 2.0**n)


@settings(deadline=None)
@given(VECTOR, VECTOR, POWER, POWER)
def test_the_ratio_scales_with_the_weights_and_against_the_gradient(
    weight: Array, gradient: Array, a: float, b: float
) -> None:
    assume(weight.any() and gradient.any())
    # Powers of two: exactly.
    expected = ratio_of(weight, gradient).ratio * (a / b)
    assert ratio_of(a * weight, b * gradient).ratio == expected
    # Each of its own norm's size: decay in the ratio scales with the weights.
    decay: Options = {"weight_decay": 0.1, "trust_weight_decay": "added"}
    assert (
        ratio_of(a * weight, a * gradient, **decay).ratio
        == ratio_of(weight, gradient, **decay).ratio
    )


# --- facts of whole steps -----------------------------------------------------------------------

of_each = pytest.mark.parametrize("of", ["gradient", "update"])


@of_each
@each_form
def test_zero_gradients_move_nothing(rule: str, options: Options, of: str) -> None:
    run = Run(rule, [W], {**options, "trust_of": of})
    for _ in range(3):
        run.step([[0.0, 0.0]])
    np.testing.assert_array_equal(run.params[0], W)
    assert run.steps[0] == 3


@pytest.mark.parametrize("place", [None, *PLACES])
@each_form
def test_a_rate_of_zero_moves_nothing(rule: str, options: Options, place: str | None) -> None:
    decay = {} if place is None else {"weight_decay": 0.5, "weight_decay_in": place}
    run = Run(rule, [GOLDEN["w0"]], {**options, **decay})
    if options.get("momentum_scaling") != "inside":  # whose buffer carries earlier rates
        for grad in gradients():
            run.step([grad])
    before = run.params[0].copy()
    run.groups[0]["lr"] = 0.0
    for grad in gradients(seed=1):
        run.step([grad])
    np.testing.assert_array_equal(run.params[0], before)
    assert not np.array_equal(before, GOLDEN["w0"]) or options.get("momentum_scaling") == "inside"


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"dampening": 0.5}])
@pytest.mark.parametrize("bound", [INF, 0.5])
def test_forms_of_momentum_that_coincide_at_a_constant_rate(options: Options, bound: float) -> None:
    ends = []
    for scaling in SCALINGS:
        common = {"momentum": 0.9, "momentum_scaling": scaling, "trust_upper": bound}
        run = Run("sgd", [GOLDEN["w0"]], {**common, **options, "trust_lower": min(bound, 0.5)})
        for grad in gradients(10):
            run.step([grad])
        ends.append(run.params[0])
    outside, inside, ratio_inside = ends
    assert_close(inside, ratio_inside, 1e-14 * np.abs(inside).max(), "inside and ratio_inside")
    if bound == INF:
        assert np.abs(outside - inside).max() > 1e-3
    else:  # lower = upper: the ratio is constant
        assert_close(outside, inside, 1e-14 * np.abs(inside).max(), "outside and inside")


def test_forms_of_momentum_differ_at_a_varying_rate_for_rmsprop() -> None:
    ends = []
    for scaling in SCALINGS:
        options = {**RMSPROP_TF1, "momentum": 0.9, "momentum_scaling": scaling}
        run = Run("rmsprop", [GOLDEN["w0"]], options)
        for lr, grad in zip((0.1, 0.05, 0.2), gradients(), strict=True):
            run.groups[0]["lr"] = lr
            run.step([grad])
        ends.append(run.params[0])
    for i in range(3):
        assert np.abs(ends[i] - ends[i - 1]).max() > 1e-3


def test_unbounded_layerwise_rmsprop_explodes_in_torchs_form_alone() -> None:
    for options, explodes in (({}, True), (RMSPROP_TF1, False)):
        run = Run("rmsprop", [GOLDEN["w0"]], options)
        for grad in GOLDEN["grads"]:
            run.step([grad])
        growth = reference.norm(run.params[0]) / reference.norm(np.array(GOLDEN["w0"]))
        assert (growth > 10) == explodes
        assert explodes or growth < 1.1


LINEAR = [form for form in FORMS if form[0] == "sgd"]
OUTSIDE = [form for form in FORMS if form[1].get("momentum_scaling", "outside") == "outside"]
NOT_ZERO = arrays(np.float64, 3, elements=st.floats(0.1, 10) | st.floats(-10, -0.1))
RUN = st.lists(NOT_ZERO, min_size=3, max_size=3)


def end(rule: str, options: Options, weight: Array, grads: list[Array]) -> Array:
    """Return the weights after steps with these gradients, none of whose norms was 0."""
    run = Run(rule, [weight], options)
    for grad in grads:
        telemetry = run.step([grad])
        assume(telemetry.weight_norm[0] > 0)  # else the ratio is zero_norm, whatever the gradient
    return run.params[0]


@settings(deadline=None)
@given(st.sampled_from(LINEAR), NOT_ZERO, RUN, POWER)
def test_an_unbounded_ratio_of_the_gradient_hides_its_constant_factor(
    form: tuple[str, Options], weight: Array, grads: list[Array], factor: float
) -> None:
    """For directions that are linear in the gradients. Powers of two: exactly."""
    scaled = [factor * grad for grad in grads]
    np.testing.assert_array_equal(end(*form, weight, scaled), end(*form, weight, grads))


WITHOUT_EPS: list[tuple[str, Options]] = [
    ("rmsprop", {"eps": 0.0}),
    ("rmsprop", {"eps": 0.0, "momentum": 0.9}),
    ("adagrad", {"eps": 0.0, "lr_decay": 0.1}),
    ("adam", {"eps": 0.0}),
    ("adam", {"eps": 0.0, "amsgrad": True, "bias_correction": False}),
]


@settings(deadline=None)
@given(st.sampled_from(WITHOUT_EPS), NOT_ZERO, RUN, POWER)
def test_adaptive_rules_cancel_the_factor_that_the_ratio_divides_by(
    form: tuple[str, Options], weight: Array, grads: list[Array], factor: float
) -> None:
    """A factor on the gradients divides their rate: it takes the ratio of the update to hide it."""
    rule, options = form
    scaled = end(rule, {**options, "lr": 0.125}, weight, [factor * grad for grad in grads])
    divided = end(rule, {**options, "lr": 0.125 / factor}, weight, grads)
    np.testing.assert_array_equal(scaled, divided)


@settings(deadline=None)
@given(
    st.sampled_from([*WITHOUT_EPS, ("sgd", {}), ("sgd", {"momentum": 0.9, "nesterov": True})]),
    st.sampled_from([0.0, 0.01]),
    NOT_ZERO,
    RUN,
    POWER,
)
def test_lamb_hides_a_constant_factor_on_the_gradients(
    form: tuple[str, Options], decay: float, weight: Array, grads: list[Array], factor: float
) -> None:
    """Any rule's update does with its ratio; with decay in the update the adaptive rules' alone."""
    rule, options = form
    assume(decay == 0 or rule != "sgd")
    options = {**options, **LAMB, "eps": 0.0, "weight_decay": decay}
    scaled = end(rule, options, weight, [factor * grad for grad in grads])
    np.testing.assert_array_equal(scaled, end(rule, options, weight, grads))


@settings(deadline=None)
@given(st.sampled_from(OUTSIDE), NOT_ZERO, NOT_ZERO, POWER)
def test_the_ratio_of_the_update_scales_with_the_weights(
    form: tuple[str, Options], weight: Array, gradient: Array, factor: float
) -> None:
    rule, options = form
    ratios = []
    for scale in (1.0, factor):
        run = Run(rule, [scale * weight], {**options, "trust_of": "update"})
        ratios.append(reference.trust_ratio(run.layers([gradient])[0]).ratio)
    assert ratios[1] == factor * ratios[0]


@settings(deadline=None)
@given(
    form=st.sampled_from(FORMS),
    of=st.sampled_from(["gradient", "update"]),
    place=st.sampled_from(PLACES),
    decay=st.sampled_from([0.0, 0.1]),
    limits=st.lists(st.floats(0, 10), min_size=2, max_size=2).map(sorted),
    weight=VECTOR,
    grads=st.lists(VECTOR, min_size=2, max_size=2),
)
def test_the_ratio_of_a_step_is_within_its_bounds(
    *,
    form: tuple[str, Options],
    of: str,
    place: str,
    decay: float,
    limits: list[float],
    weight: Array,
    grads: list[Array],
) -> None:
    rule, options = form
    assume(form in OUTSIDE or of == "gradient")
    decayed = {"weight_decay": decay, "weight_decay_in": place}
    bounds = {"trust_lower": limits[0], "trust_upper": limits[1]}
    run = Run(rule, [weight], {**options, **decayed, **bounds, "trust_of": of})
    for grad in grads:
        ratio = run.step([grad]).ratio[0]
        assert limits[0] <= ratio <= limits[1]


@each_form
@pytest.mark.parametrize("trust", [{"trust": False}, {"trust_upper": 0.5}], ids=str)
def test_the_gradient_scale_is_divided_out(rule: str, options: Options, trust: Options) -> None:
    plain, scaled = (Run(rule, [GOLDEN["w0"]], {**options, **trust}) for _ in range(2))
    for grad in gradients():
        plain.step([grad])
        scaled.step([1024 * grad], grad_scale=np.array([1024.0]), found_inf=np.array(0.0))
    np.testing.assert_array_equal(plain.params[0], scaled.params[0])


@each_form
def test_maximize_negates_the_gradient_and_not_the_decay(rule: str, options: Options) -> None:
    options = {**options, "weight_decay": 0.1}
    up, down = (Run(rule, [GOLDEN["w0"]], {**options, "maximize": up}) for up in (True, False))
    for grad in gradients():
        up.step([grad])
        down.step([-grad])
    np.testing.assert_array_equal(up.params[0], down.params[0])


def test_clipping_is_by_the_norm_of_all_layers_after_unscaling() -> None:
    # ||(3, 4, 12)|| = 13, over both groups, and an excluded layer counts.
    options: Options = {"trust": False, "lr": 1.0, "max_grad_norm": 6.5}
    groups = [{**options, "params": [2, 0]}, {**options, "params": [1], "exclude": (True,)}]
    run = Run("sgd", [[0.0], [0.0], [0.0]], *groups)
    telemetry = run.step([[6.0], [8.0], [24.0]], grad_scale=2.0)
    assert telemetry.total_norm == pytest.approx(13, rel=1e-15)
    assert telemetry.clip == pytest.approx(0.5, rel=1e-15)
    assert_close([float(p[0]) for p in run.params], [-1.5, -2, -6], 1e-14, "clipped steps")
    small = run.step([[0.3], [0.4], [1.2]])
    assert small.clip == 1.0
    assert small.total_norm == pytest.approx(1.3)
    assert Run("sgd", [W], {}).step([G]).clip == 1.0
    assert math.isnan(Run("sgd", [W], {}).step([G]).total_norm)


def test_the_ratio_measures_the_clipped_gradient() -> None:
    assert one_step("sgd", W, G, max_grad_norm=1.0)[1].measured_norm[0] == pytest.approx(1)
    assert one_step("sgd", W, G, max_grad_norm=1.0)[1].ratio[0] == pytest.approx(5)


def test_clip_factor_keeps_what_is_not_finite() -> None:
    assert reference.clip_factor(0.0, 1.0) == 1
    assert reference.clip_factor(INF, 1.0) == 0
    assert math.isnan(reference.clip_factor(NAN, 1.0))


def test_excluded_layers_have_no_trust_and_no_decay() -> None:
    common = {"lr": 1.0, "weight_decay": 0.5, "trust_weight_decay": "added"}
    run = Run("sgd", [W, W], {**common, "params": [1, 0], "exclude": (True, False)})
    telemetry = run.step([G, G])
    assert_close(telemetry.ratio, [5 / 4.5, 1], 1e-15, "ratio")
    assert np.isnan(
        [telemetry.weight_norm[1], telemetry.measured_norm[1], telemetry.raw_ratio[1]]
    ).all()
    np.testing.assert_array_equal(run.params[1], np.subtract(W, G))
    assert_close(run.params[0], np.subtract(W, np.multiply(5 / 4.5, [1.5, 4])), 1e-14, "weights")


def test_skip_without_decay() -> None:
    telemetry = one_step("sgd", W, G, trust_skip_without_decay=True)[1]
    assert telemetry.ratio[0] == 1
    assert math.isnan(telemetry.weight_norm[0])
    assert (
        one_step("sgd", W, G, trust_skip_without_decay=True, weight_decay=1e-3)[1].ratio[0] == 2.5
    )


# --- what is not finite -------------------------------------------------------------------------


def three_layers(on_nonfinite: str, **options: Any) -> Run:
    """Return measured, excluded and measured layers in two groups, after a step."""
    common = {"momentum": 0.9, "on_nonfinite": on_nonfinite, **options}
    groups = [{**common, "params": [0, 1], "exclude": (False, True)}, {**common, "params": [2]}]
    run = Run("sgd", [W, W, W], *groups)
    run.step([G, G, G])
    return run


def changed(run: Run, grads: list[Any], **kwargs: Any) -> tuple[list[bool], Telemetry]:
    before = [run.snapshot(i) for i in range(3)]
    telemetry = run.step(grads, **kwargs)
    pairs = [(b, run.snapshot(i)) for i, b in enumerate(before)]
    return [
        not all(np.array_equal(x, y, equal_nan=True) for x, y in zip(b, a, strict=True))
        for b, a in pairs
    ], telemetry


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize(("max_grad_norm", "implied"), [(None, False), (1.0, False), (1.0, True)])
def test_skip_changes_nothing_for_a_gradient_that_is_not_finite(
    bad: float, where: int, max_grad_norm: float | None, implied: bool
) -> None:
    run = three_layers("propagate" if implied else "skip", max_grad_norm=max_grad_norm)
    grads = [list(G) for _ in range(3)]
    grads[where][1] = bad
    found = {"found_inf": 0.0} if implied else {}
    which, telemetry = changed(run, grads, **found)
    assert which == [False] * 3
    assert telemetry.skipped.all()
    assert np.isnan(telemetry.weight_norm).all()
    assert changed(run, [G, G, G], **found)[0] == [True] * 3


def test_a_scaler_that_found_nothing_is_believed() -> None:
    run = three_layers("propagate")
    grads = [list(G) for _ in range(3)]
    grads[0][1] = NAN
    which, telemetry = changed(run, grads, found_inf=0.0)
    assert which == [False, True, True]  # the layer's own norm shows it
    assert telemetry.skipped.tolist() == [True, False, False]


def test_found_inf_changes_nothing() -> None:
    run = three_layers("propagate")
    assert changed(run, [G, G, G], found_inf=np.array([1.0]))[0] == [False] * 3
    which, telemetry = changed(run, [G, G, G], found_inf=np.array([0.0]))
    assert which == [True] * 3
    assert not telemetry.skipped.any()


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_skip_keeps_a_layer_alone_whose_own_norm_is_not_finite(bad: float, where: int) -> None:
    run = three_layers("skip")
    run.params[where][0] = bad
    which, telemetry = changed(run, [G, G, G])
    # The excluded layer (1) is not measured: it just computes.
    assert which == [True if i == 1 else i != where for i in range(3)]
    assert telemetry.skipped.tolist() == [i == where and i != 1 for i in range(3)]
    assert np.isnan(telemetry.ratio).tolist() == telemetry.skipped.tolist()


def test_without_decay_infinite_weights_stay_out_of_the_gradient() -> None:
    weight, _ = one_step("sgd", [INF, 1.0], [1.0, 1.0], trust=False)
    np.testing.assert_array_equal(weight, [INF, 0.9])


@pytest.mark.parametrize("where", ["weight", "gradient"])
def test_propagate_makes_the_layer_nan(where: str) -> None:
    run = three_layers("propagate")
    grads = [list(G) for _ in range(3)]
    (run.params[2] if where == "weight" else grads[2])[0] = INF
    telemetry = run.step(grads)
    assert np.isnan(run.params[2]).all()
    assert np.isfinite([run.params[0], run.params[1]]).all()
    assert not telemetry.skipped.any()
    assert [int(s) for s in run.steps] == [2, 2, 2]


def test_propagate_clips_an_infinite_norm_as_torch_does() -> None:
    run = three_layers("propagate", max_grad_norm=1.0, momentum=0.0)
    before = run.params[0].copy()
    telemetry = run.step([G, G, [INF, 1.0]])
    assert (telemetry.total_norm, telemetry.clip) == (INF, 0)
    np.testing.assert_array_equal(run.params[0], before)
    assert np.isnan(run.params[2]).all()
    telemetry = run.step([G, G, [NAN, 1.0]])
    assert math.isnan(telemetry.clip)
    assert np.isnan(run.params[0]).all()


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "value"), [("max_grad_norm", 1.0), ("on_nonfinite", "skip")])
def test_options_of_all_layers_must_be_equal(key: str, value: Any) -> None:
    run = Run("sgd", [W, W], {"params": [0]}, {"params": [1], key: value})
    with pytest.raises(ValueError, match=f"{key} must be equal in all groups.*None|propagate"):
        run.step([G, G])
    np.testing.assert_array_equal(run.params, [W, W])


def test_a_step_of_nothing() -> None:
    assert reference.step("sgd", [], [], {}, [], []).ratio.shape == (0,)


def test_an_unknown_rule_is_named() -> None:
    run = Run("sgd", [W], {})
    run.rule = "sgdm"
    with pytest.raises(ValueError, match="rule is 'sgdm'; take one of sgd, rmsprop"):
        run.step([G])
