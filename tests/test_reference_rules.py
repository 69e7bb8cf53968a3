"""The reference's rules: torch.optim's without trust, and each formula written out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from reference_run import (
    ADAM,
    INF,
    INSIDE,
    LAMB,
    NAN,
    PLACES,
    RMSPROP,
    SCALINGS,
    W4,
    Array,
    G,
    Options,
    Run,
    W,
    gradients,
    one_step,
)

from date_kernels import RULES, reference
from date_kernels.testing import assert_close

# --- torch.optim --------------------------------------------------------------------------------

PLAIN: Options = {"weight_decay": 0.0, "maximize": False}
DECAY: Options = {"weight_decay": 0.1, "maximize": False}
MAXIMIZE: Options = {"weight_decay": 0.1, "maximize": True}
OPTIMIZERS: dict[str, tuple[str, Callable[..., torch.optim.Optimizer]]] = {
    "SGD": ("sgd", torch.optim.SGD),
    "RMSprop": ("rmsprop", torch.optim.RMSprop),
    "Adagrad": ("adagrad", torch.optim.Adagrad),
    "Adam": ("adam", torch.optim.Adam),
    "AdamW": ("adam", torch.optim.AdamW),
    "Adadelta": ("adadelta", torch.optim.Adadelta),
}
CASES: list[tuple[str, Options]] = [
    *(
        ("SGD", {"momentum": momentum, "dampening": dampening, "nesterov": nesterov, **common})
        for momentum, dampening, nesterov in (
            (0.0, 0.0, False),
            (0.9, 0.0, False),
            (0.9, 0.3, False),
            (0.9, -0.5, False),
            (0.9, 0.0, True),
        )
        for common in (PLAIN, DECAY, MAXIMIZE)
    ),
    *(
        ("RMSprop", {"momentum": momentum, "centered": centered, **common})
        for momentum in (0.0, 0.9)
        for centered in (False, True)
        for common in (
            {**PLAIN, "alpha": 0.99, "eps": 1e-8},
            {**DECAY, "alpha": 0.9, "eps": 1e-3},
            {**MAXIMIZE, "alpha": 0.5, "eps": 1e-8},
        )
    ),
    *(
        ("Adagrad", {"lr_decay": lr_decay, "initial_accumulator_value": initial, **common})
        for lr_decay in (0.0, 0.1)
        for initial in (0.0, 0.1)
        for common in (PLAIN, {**DECAY, "eps": 1e-3}, MAXIMIZE)
    ),
    *(
        (name, {"amsgrad": amsgrad, **common})
        for name in ("Adam", "AdamW")
        for amsgrad in (False, True)
        for common in (PLAIN, {**DECAY, "betas": (0.5, 0.9), "eps": 1e-3}, MAXIMIZE)
    ),
    *(
        ("Adadelta", common)
        for common in (PLAIN, {**DECAY, "rho": 0.5, "eps": 1e-3}, {**MAXIMIZE, "rho": 1.0})
    ),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_without_trust_it_is_torch(name: str, options: Options) -> None:
    rule, make = OPTIMIZERS[name]
    rng = np.random.default_rng(0)
    shapes = [(), (1,), (5, 3), (2, 0), (4, 3, 2)]
    place = {"weight_decay_in": "weights" if name == "AdamW" else "gradient"}
    weights = [rng.standard_normal(s) for s in shapes]
    run = Run(rule, weights, {**options, **place, "trust": False, "lr": 0.05})
    params = [torch.nn.Parameter(torch.from_numpy(param.copy())) for param in run.params]
    optimizer = make(params, lr=0.05, foreach=False, **options)
    for _ in range(50):
        # Not of one size: AMSGrad's maximum must outlive the average.
        size = 10.0 ** rng.uniform(-1, 1)
        grads = [size * rng.standard_normal(s) for s in shapes]
        for param, grad in zip(params, grads, strict=True):
            param.grad = torch.from_numpy(np.array(grad))
        optimizer.step()
        run.step(grads)
    for i, param in enumerate(params):
        theirs = {key: np.asarray(x) for key, x in optimizer.state[param].items() if x is not None}
        ours = {key: x for key, of in run.states.items() if (x := of[i]) is not None}
        if rule != "sgd":
            ours["step"] = run.steps[i]
        assert set(theirs) == set(ours)
        for key, x in ours.items():
            assert_close(x, theirs[key], 1e-12 * np.max(np.abs(x), initial=0), f"{key} of {i}")
        expected = param.detach().numpy()
        largest = np.max(np.abs([expected, weights[i]]), initial=0)  # it may end close to 0
        assert_close(run.params[i], expected, 1e-12 * largest, f"params[{i}]")


# --- formulas by hand ---------------------------------------------------------------------------

Direction = Callable[[Array], Array]

FIRST: list[tuple[str, Options, Direction]] = [
    ("sgd", {}, lambda d: d),
    *(("sgd", {"momentum": 0.9, "momentum_scaling": s}, lambda d: d) for s in SCALINGS),
    *(
        ("sgd", {"momentum": 0.9, "momentum_scaling": s, "nesterov": True}, lambda d: 1.9 * d)
        for s in SCALINGS
    ),
    *(
        (
            "rmsprop",
            {"momentum": 0.9, "momentum_scaling": s, "eps": 1e-2},
            lambda d: d / (np.sqrt(0.01 * d**2) + 1e-2),
        )
        for s in SCALINGS
    ),
    ("rmsprop", {"eps": 1e-2, "eps_inside_sqrt": True}, lambda d: d / np.sqrt(0.01 * d**2 + 1e-2)),
    (
        "adagrad",
        {"eps": 1e-2, "initial_accumulator_value": 0.5},
        lambda d: d / (np.sqrt(0.5 + d**2) + 1e-2),
    ),
    ("adam", {"eps": 1e-2}, lambda d: d / (abs(d) + 1e-2)),
    (
        "adam",
        {"eps": 1e-2, "betas": (0.8, 0.9), "bias_correction": False},
        lambda d: 0.2 * d / (np.sqrt(0.1 * d**2) + 1e-2),
    ),
    (
        "adadelta",
        {"rho": 0.8, "eps": 1e-2},
        lambda d: np.sqrt(1e-2) / np.sqrt(0.2 * d**2 + 1e-2) * d,
    ),
]
"""Options of a rule, and its first direction from fresh states."""


@pytest.mark.parametrize(
    ("rule", "options", "direction"), FIRST, ids=lambda each: "" if callable(each) else str(each)
)
def test_the_three_places_of_weight_decay(
    rule: str, options: Options, direction: Direction
) -> None:
    w, g = np.array(W4), next(gradients())
    lr, decay = 0.1, 0.3
    r = reference.norm(w) / reference.norm(g)
    expected = {
        "gradient": w - lr * r * direction(g + decay * w),
        "update": w - lr * r * (direction(g) + decay * w),
        "weights": w - lr * decay * w - lr * r * direction(g),
    }
    for place in PLACES:
        common = {"lr": lr, "weight_decay": decay, "weight_decay_in": place}
        weight, telemetry = one_step(rule, w, g, **options, **common)
        assert telemetry.ratio[0] == pytest.approx(r, rel=1e-15)
        assert_close(weight, expected[place], 1e-14, place)
        undecayed, _ = one_step(rule, w, g, **{**options, **common, "weight_decay": 0.0})
        assert_close(undecayed, w - lr * r * direction(g), 1e-14, "no decay")
    if rule == "sgd" and not options.get("nesterov"):
        # A linear direction takes both alike, but for the buffer.
        assert_close(expected["gradient"], expected["update"], 1e-14, "gradient and update")
    else:
        assert np.abs(expected["gradient"] - expected["update"]).max() > 1e-3
    assert np.abs(expected["weights"] - expected["update"]).max() > 1e-3


@pytest.mark.parametrize("scaling", SCALINGS)
def test_decay_in_the_update_stays_out_of_the_buffer(scaling: str) -> None:
    """At rates and ratios that change: two steps of momentum, written out."""
    mu, decay, rates = 0.9, 0.3, (0.1, 0.4)
    options = {"momentum": mu, "momentum_scaling": scaling}
    run = Run("sgd", [W4], {**options, "weight_decay": decay, "weight_decay_in": "update"})
    w, b = np.array(W4), np.zeros(4)
    for lr, g in zip(rates, gradients(), strict=False):
        run.groups[0]["lr"] = lr
        r = reference.norm(w) / reference.norm(g)
        inside = {"outside": 1.0, "inside": lr * r, "ratio_inside": r}[scaling]
        b = mu * b + inside * g
        w = w - lr * r / inside * b - lr * r * decay * w
        run.step([g])
    assert_close(run.params[0], w, 1e-14, "weights")
    buffer = run.states["momentum_buffer"][0]
    assert buffer is not None
    assert_close(buffer, b, 1e-14, "buffer")


def test_decoupled_decay_leaves_the_ratio_to_the_weights_before() -> None:
    options = {"weight_decay": 0.5, "weight_decay_in": "weights", "lr": 1.0}
    weight, telemetry = one_step("sgd", W, G, **options)
    assert telemetry.ratio[0] == 2.5
    np.testing.assert_array_equal(weight, [1.5, 2.0 - 5.0])
    # Its rate is not the ratio's: bounded or not the weights shrink alike.
    bounded, _ = one_step("sgd", W, [0.0, 0.0], **options, trust_upper=0.1)
    np.testing.assert_array_equal(bounded, [1.5, 2.0])


def test_decoupled_decay_scales_infinite_weights() -> None:
    common: Options = {"trust": False, "weight_decay": 0.5}
    weight, _ = one_step("sgd", [INF, 1.0], [1.0, 1.0], **common, weight_decay_in="weights")
    np.testing.assert_array_equal(weight, [INF, 0.95 - 0.1])


@pytest.mark.parametrize("place", PLACES)
def test_the_ratio_of_the_gradient_counts_decay_wherever_it_stands(place: str) -> None:
    common = {"weight_decay": 0.5, "weight_decay_in": place}
    _, added = one_step("adam", W, G, **common, trust_weight_decay="added")
    assert added.ratio[0] == pytest.approx(5 / 4.5, rel=1e-15)
    _, combined = one_step("adam", W, G, **common, trust_weight_decay="combined")
    assert combined.ratio[0] == pytest.approx(5 / math.hypot(1.5, 4), rel=1e-15)
    _, ignored = one_step("adam", W, G, **common)
    assert ignored.ratio[0] == 2.5


@pytest.mark.parametrize(
    ("place", "norm"),
    [
        ("update", math.hypot(1 + 1.5, 1 + 2)),
        ("weights", math.sqrt(2)),
        ("gradient", math.sqrt(2)),  # Adam's first direction is the sign of d
    ],
)
def test_the_ratio_of_the_update_is_of_the_whole_update(place: str, norm: float) -> None:
    options: Options = {"eps": 0.0, "weight_decay": 0.5, "weight_decay_in": place}
    run = Run("adam", [W], {**options, "trust_of": "update", "amsgrad": True})
    layer = run.layers([[2.0, 2.0]])[0]
    before = run.snapshot(0)
    assert reference.trust_ratio(layer).measured_norm == pytest.approx(norm, rel=1e-14)
    for now, then in zip(run.snapshot(0), before, strict=True):
        np.testing.assert_array_equal(now, then)
    assert run.step([[2.0, 2.0]]).ratio[0] == pytest.approx(5 / norm, rel=1e-14)


def test_lamb_written_out() -> None:
    """LAMB, Algorithm 2, with phi the identity: four steps."""
    lr, decay, (beta1, beta2), eps = 0.01, 0.1, (0.9, 0.999), 1e-6
    run = Run("adam", [W4], {**LAMB, "lr": lr, "weight_decay": decay})
    x, m, v = np.array(W4), np.zeros(4), np.zeros(4)
    for t, g in enumerate(gradients(4), start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        r = m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps)
        update = r + decay * x
        x = x - lr * np.linalg.norm(x) / np.linalg.norm(update) * update
        run.step([g])
    assert_close(run.params[0], x, 1e-14, "weights")


def test_adagrads_rate_stands_wherever_the_rate_does() -> None:
    def after(steps: int, **options: Any) -> tuple[Array, Any]:
        run = Run("adagrad", [W], {"lr": 1.0, "lr_decay": 0.5, "eps": 0.0, **options})
        run.steps[0][...] = steps
        telemetry = run.step([[2.0, 2.0]])
        return run.params[0], telemetry

    assert_close(after(2, trust=False)[0], [2.5, 3.5], 1e-15, "the step")
    shrunk, _ = after(2, trust=False, weight_decay=0.5, weight_decay_in="weights")
    assert_close(shrunk, [0.75 * 3 - 0.5, 0.75 * 4 - 0.5], 1e-15, "decoupled decay")
    ratio = after(6, trust_coefficient=0.01, trust_clip_by_lr=True)[1].raw_ratio[0]
    assert ratio == pytest.approx(0.01 * 5 / math.sqrt(8) / 0.25, rel=1e-15)
    assert after(6, trust_clip_by_lr=True)[1].raw_ratio[0] == 1.0
    # Without a count every step is the first.
    run = Run("adagrad", [W], {"lr": 1.0, "lr_decay": 0.5})
    run.steps = [None]  # type: ignore[list-item]
    assert reference.rate(run.layers([G])[0]) == 1.0


def test_amsgrad_keeps_the_largest_and_nan() -> None:
    largest = np.array([9.0, 1.0, NAN, 1.0])
    state = {"exp_avg": np.zeros(4), "exp_avg_sq": np.ones(4), "max_exp_avg_sq": largest}
    group = {**ADAM, "amsgrad": True, "betas": (0.9, 0.5)}
    reference.adam(np.array([1.0, 3.0, 1.0, NAN]), state, 2, 1.0, group)
    np.testing.assert_array_equal(state["exp_avg_sq"], [1.0, 5.0, 1.0, NAN])
    np.testing.assert_array_equal(largest, [9.0, 5.0, NAN, NAN])


def test_adadelta_averages_its_own_direction() -> None:
    """Neither rate nor ratio nor the update's decay reach ``acc_delta``."""
    deltas = []
    for options in ({}, {"lr": 0.3, "trust_upper": 0.1, **DECAY, "weight_decay_in": "update"}):
        run = Run("adadelta", [W4], options)
        for grad in gradients():
            run.step([grad])
        deltas.append(run.states["acc_delta"][0])
    np.testing.assert_array_equal(deltas[0], deltas[1])


def test_the_centered_variance_is_never_negative_and_keeps_nan() -> None:
    group = {**RMSPROP, "centered": True}
    state = {"square_avg": np.array([1.0, NAN, 1.0]), "grad_avg": np.array([1.1, 0.0, NAN])}
    variance = reference.rmsprop_variance(state, group)
    np.testing.assert_array_equal(variance, [0.0, NAN, NAN])


def test_rules_without_a_buffer_need_no_place_for_the_rate() -> None:
    run = Run("adagrad", [W], {})
    del run.groups[0]["momentum_scaling"]
    assert reference.place(run.layers([G])[0], 2.0) == (1.0, 0.2)


# --- master weights -----------------------------------------------------------------------------


def with_masters(**options: Any) -> tuple[Run, Array]:
    """Return a run of two layers, the first with master weights, and these."""
    run = Run("sgd", [W, W], {"momentum": 0.9, "master_weights": True, **options})
    master = np.array(W) + 0.25  # of which 3 and 4 may be the rounding
    run.states["master"] = [master, None]
    return run, master


def test_master_weights_are_the_layers_weights() -> None:
    run, master = with_masters(weight_decay=0.5, **INSIDE)
    alone = Run("sgd", [master], {"momentum": 0.9, "weight_decay": 0.5, **INSIDE})
    for grad in ([0.0, 2.0], [1.0, -1.0]):
        ours, theirs = run.step([grad, grad]), alone.step([grad])
        assert ours.weight_norm[0] == theirs.weight_norm[0] > ours.weight_norm[1]
        np.testing.assert_array_equal(master, alone.params[0])
        np.testing.assert_array_equal(run.params[0], master)
    assert set(run.layers([G, G])[0].state) == {"momentum_buffer"}


@pytest.mark.parametrize("where", ["master", "gradient"])
def test_a_skipped_layer_keeps_master_and_parameter(where: str) -> None:
    run, master = with_masters(on_nonfinite="skip")
    grads = [list(G), list(G)]
    (master if where == "master" else grads[0])[0] = NAN
    before = master.copy()
    telemetry = run.step(grads)
    assert telemetry.skipped.tolist() == [True, where == "gradient"]
    np.testing.assert_array_equal(master, before)
    np.testing.assert_array_equal(run.params[0], W)


def test_lion_is_its_papers_algorithm() -> None:
    """Chen et al. 2023, Algorithm 2, by hand, with the norm of its update in the ratio."""
    w, m, g = np.array([0.5, -0.25, 1.0]), np.array([0.25, 0.5, -0.5]), np.array([-1.0, 3.0, 1.5])
    group = RULES["lion"].complete(
        {
            **{"lr": 0.1, "params": [0], "betas": (0.75, 0.5), "weight_decay": 0.2},
            **{"weight_decay_in": "update", "trust": True, "trust_of": "update"},
        }
    )
    u = np.array([-1.0, 1.0, 0.0]) + 0.2 * w  # the signs of .1875 - .25, .375 + .75, -.375 + .375
    after, average = w.copy(), m.copy()
    telemetry = reference.step("lion", [after], [g], {"exp_avg": [average]}, [None], [group])
    ratio = math.sqrt(1.3125) / math.sqrt(0.9**2 + 0.95**2 + 0.2**2)
    np.testing.assert_allclose(telemetry.ratio, ratio, rtol=1e-12)
    np.testing.assert_allclose(after, w - 0.1 * ratio * u, rtol=1e-12)
    np.testing.assert_allclose(average, [-0.375, 1.75, 0.5], rtol=1e-12)
