"""The torch optimizers: equal to torch.optim without trust, to the reference with it.

Note [Twice torch's own error]. Over many steps the yardstick is torch itself: the same run by
torch.optim in float32 and in float64. Ours in float32 may lie at most twice as far from the float64
run as torch's float32 does, measured as the Euclidean distance over all parameters together. The
gradients are given, not computed from the parameters, so that no run amplifies its own errors.

Where torch has no twin (trust), one is made of torch.optim: a group for each parameter, whose
learning rate is multiplied by the ratio that torch's own norms give in the run's dtype.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TF1, Options, judged_optimizer_step, random_tensors
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from date_optim import DATE, LARS, SGD, RMSprop, TrustRatio
from date_optim.optimizer import LayerwiseOptimizer

SHAPES = [(60, 33), (33,), (), (5, 4, 3, 3), (0, 4), (500,)]
STEPS = 50

Make = Callable[[list[Parameter]], Optimizer]
BeforeStep = Callable[[int, Optimizer], None]


def train(
    make: Make,
    dtype: torch.dtype = torch.float32,
    *,
    steps: int = STEPS,
    before_step: BeforeStep = lambda i, optimizer: None,
    absent: Callable[[int, int], bool] = lambda i, n: False,
) -> list[Tensor]:
    """Train on given gradients; ``absent(step, parameter)`` says which are None."""
    params = [Parameter(w.to(dtype)) for w in random_tensors(SHAPES, 0)]
    optimizer = make(params)
    for i in range(steps):
        for n, (param, grad) in enumerate(zip(params, random_tensors(SHAPES, i + 1), strict=True)):
            param.grad = None if absent(i, n) else grad.to(dtype)
        before_step(i, optimizer)
        optimizer.step()
    return [param.detach() for param in params]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Return the Euclidean distance over all parameters together."""
    pairs = zip(a, b, strict=True)
    return math.sqrt(sum(float((x.double() - y.double()).square().sum()) for x, y in pairs))


def assert_within_twice(ours: list[Tensor], torch32: list[Tensor], torch64: list[Tensor]) -> None:
    """See Note [Twice torch's own error]."""
    error, allowed = distance(ours, torch64), 2 * distance(torch32, torch64)
    assert 0 < allowed < 1e-2, "torch's own error is no yardstick"
    assert error <= allowed, f"error {error:.3g} exceeds twice torch's own, {allowed:.3g}"


def assert_parity(ours: Make, twin: Make, **kwargs: Any) -> None:
    """Hold our run to the twin's in both dtypes."""
    assert_within_twice(
        train(ours, **kwargs),
        train(twin, **kwargs),
        train(twin, torch.float64, **kwargs),
    )


TORCH: dict[str, type[Optimizer]] = {"sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop}
OURS: dict[str, type[LayerwiseOptimizer]] = {"sgd": SGD, "rmsprop": RMSprop}


def both(rule: str, **options: Any) -> tuple[Make, Make]:
    """Return how to make our optimizer and torch's for-loop one."""
    return (
        lambda params: OURS[rule](params, **options),
        lambda params: TORCH[rule](params, foreach=False, **options),  # type: ignore[call-arg]
    )


# --- parity with torch.optim ----------------------------------------------------------------------

SGD_OPTIONS: list[Options] = [
    {},
    {"lr": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.5},
    {"momentum": 0.9, "dampening": -0.25, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True},
    {"weight_decay": 0.1},
    {"maximize": True, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "maximize": True},
]
RMSPROP_OPTIONS: list[Options] = [
    {},
    {"alpha": 0.9, "eps": 1e-4},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"centered": True, "eps": 1e-2},
    {"centered": True, "eps": 1e-2, "momentum": 0.5, "weight_decay": 0.1},
    {"maximize": True, "weight_decay": 0.1},
    {"momentum": 0.9, "centered": True, "eps": 1e-2, "maximize": True, "alpha": 0.5},
]
PARITY = [
    *(("sgd", {"lr": 0.01, **options}) for options in SGD_OPTIONS),
    *(("rmsprop", {"lr": 0.01, **options}) for options in RMSPROP_OPTIONS),
]


def ids(cases: list[tuple[str, Options]]) -> list[str]:
    return ["-".join([rule, *(f"{k}={v}" for k, v in options.items())]) for rule, options in cases]


@pytest.mark.parametrize(("rule", "options"), PARITY, ids=ids(PARITY))
def test_without_trust_it_is_torch(rule: str, options: Options) -> None:
    assert_parity(*both(rule, **options))


FULL = [
    ("sgd", {"lr": 0.05, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.01}),
    ("sgd", {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    ("rmsprop", {"lr": 0.01, "momentum": 0.9, "centered": True, "eps": 1e-2}),
]
full = pytest.mark.parametrize(("rule", "options"), FULL, ids=ids(FULL))


@full
def test_gradients_that_come_late_or_pause(rule: str, options: Options) -> None:
    """Each layer has its own first step, and a frozen one keeps its state."""
    assert_parity(*both(rule, **options), absent=lambda i, n: i < 3 * n or (n == 0 and 20 < i < 30))


@full
def test_frozen_by_requires_grad(rule: str, options: Options) -> None:
    def freeze(i: int, optimizer: Optimizer) -> None:
        param = optimizer.param_groups[0]["params"][1]
        if i in (10, 20):
            param.requires_grad_(i == 20)
        if 10 <= i < 20:
            param.grad = None

    assert_parity(*both(rule, **options), before_step=freeze)


@full
def test_groups_with_options_of_their_own(rule: str, options: Options) -> None:
    def grouped(make: Make) -> Make:
        def make_groups(params: list[Parameter]) -> Optimizer:
            groups: Any = [
                {"params": params[:2], "lr": 0.02},
                {"params": params[2:3], "momentum": 0.0, "dampening": 0.0, "nesterov": False},
                {"params": params[3:], "weight_decay": 0.2, "maximize": True},
            ]
            return make(groups)

        return make_groups

    ours, twin = both(rule, **options)
    assert_parity(grouped(ours), grouped(twin))


def vary_rate(i: int, optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        rate = 0.01 * (1 + i % 7)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)  # in place, as torch's schedulers do
        else:
            group["lr"] = rate


@full
@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
def test_a_rate_that_changes_every_step(rule: str, options: Options, as_tensor: bool) -> None:
    def make(maker: Make) -> Make:
        def with_rate(params: list[Parameter]) -> Optimizer:
            optimizer = maker(params)
            if as_tensor:
                optimizer.param_groups[0]["lr"] = torch.tensor(0.01, dtype=torch.float64)
            return optimizer

        return with_rate

    ours, twin = both(rule, **options)
    assert_parity(make(ours), make(twin), before_step=vary_rate)


def test_tensor_rate_in_the_constructor() -> None:
    rate = torch.tensor(0.05)
    tensor, number = (train(partial(SGD, lr=lr, momentum=0.9)) for lr in (rate, float(rate)))
    assert distance(tensor, number) == 0
    assert rate.item() == float(torch.tensor(0.05))


@pytest.mark.parametrize("rule", OURS)
def test_groups_that_mix_momentum_nesterov_and_trust(rule: str) -> None:
    """A ratio whose bounds coincide is a factor on the rate: torch knows that one, too."""
    second: Options = {"nesterov": True} if rule == "sgd" else {"centered": True, "eps": 1e-2}

    def groups(params: list[Parameter], pinned: Options) -> Any:
        return [
            {"params": params[:1]},
            {"params": params[1:3], "momentum": 0.9, **second},
            {"params": params[3:4], "momentum": 0.9, **pinned},
            {"params": params[4:], "weight_decay": 0.1, **pinned},
        ]

    ours, twin = both(rule, lr=0.05)
    trust = TrustRatio(lower=0.25, upper=0.25, weight_decay="added")
    assert_parity(
        lambda params: ours(groups(params, {"trust": trust})),
        lambda params: twin(groups(params, {"lr": 0.05 * 0.25})),
    )


def test_centered_variance_is_never_negative() -> None:
    """With constant gradients ``v - gbar^2`` rounds below 0: torch's float32 takes its root."""

    def run(make: Make) -> Tensor:
        (w, g) = random_tensors([1000, 1000], 0)
        param = Parameter(w)
        optimizer = make([param])
        for _ in range(60):
            param.grad = g.clone()
            optimizer.step()
        return param.detach()

    ours, twin = both("rmsprop", alpha=0.5, centered=True, lr=1e-3)
    assert run(twin).isnan().any(), "torch has changed: this test shows nothing any more"
    assert run(ours).isfinite().all()


# --- trust ----------------------------------------------------------------------------------------


def torch_ratio(param: Tensor, trust: TrustRatio, weight_decay: float) -> Tensor:
    """Return a bounded ratio by torch's own norms."""
    assert param.grad is not None
    w, g = param.detach().norm(), param.grad.norm()
    if trust.weight_decay == "combined":
        g = (param.grad + weight_decay * param.detach()).norm()
    if trust.weight_decay == "added":
        g = g + weight_decay * w
    raw = trust.coefficient * w / (g + trust.eps) if w > 0 and g > 0 else torch.ones_like(w)
    return raw.clamp(trust.lower, trust.upper)


def with_ratio(make: Make, lr: float, trust: TrustRatio) -> Make:
    """Return a torch optimizer whose rate is multiplied, layer by layer, outside the buffer."""

    def scale_rates(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            (param,) = group["params"]
            group["lr"] = lr * float(torch_ratio(param, trust, group["weight_decay"]))

    def make_twin(params: list[Parameter]) -> Optimizer:
        groups: Any = [{"params": [param]} for param in params]
        optimizer = make(groups)
        optimizer.register_step_pre_hook(scale_rates)
        return optimizer

    return make_twin


@pytest.mark.parametrize(
    "trust",
    [
        TrustRatio(upper=10.0),
        TrustRatio(lower=0.9, upper=1.1),
        TrustRatio(0.3, weight_decay="added", eps=0.5),
        TrustRatio(weight_decay="combined", upper=3.0),
    ],
    ids=["ignored", "bounded", "added", "combined"],
)
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("sgd", {"lr": 0.01, "weight_decay": 0.1}),
        ("sgd", {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9, "dampening": 0.2}),
        ("sgd", {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
        ("rmsprop", {"lr": 0.001, "weight_decay": 0.1, "momentum": 0.5}),
    ],
    ids=["sgd", "momentum", "nesterov", "rmsprop"],
)
def test_trust_is_torch_with_a_rate_for_each_layer(
    rule: str, options: Options, trust: TrustRatio
) -> None:
    ours, _ = both(rule, trust=trust, **options)
    _, twin = both(rule, **options)
    assert_parity(ours, with_ratio(twin, options["lr"], trust))


def test_lars_is_torch_with_scaled_gradients() -> None:
    """Rate and ratio inside: torch's momentum at rate 1, fed ``lr * r * (g + decay*w)``."""
    lr, decay = 0.5, 0.1
    trust = TrustRatio(0.02, upper=0.05, weight_decay="added")

    def scale_gradients(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for param in optimizer.param_groups[0]["params"]:
            if param.ndim <= 1:  # excluded: neither ratio nor decay
                param.grad = lr * param.grad
            else:
                ratio = torch_ratio(param, trust, decay)
                param.grad = lr * ratio * (param.grad + decay * param.detach())

    def twin(params: list[Parameter]) -> Optimizer:
        optimizer = torch.optim.SGD(params, lr=1.0, momentum=0.9, foreach=False)
        optimizer.register_step_pre_hook(scale_gradients)
        return optimizer

    assert_parity(
        lambda params: LARS(params, lr=lr, weight_decay=decay, coefficient=0.02, upper=0.05), twin
    )


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"maximize": True}])
def test_lars_is_the_reference(options: Options) -> None:
    params = [Parameter(w) for w in random_tensors(SHAPES, 0)]
    optimizer = LARS(params, lr=2.0, weight_decay=1e-2, **options)
    (group,) = optimizer.param_groups
    assert (group["trust_coefficient"], group["trust_weight_decay"]) == (0.001, "added")
    assert (group["momentum"], group["momentum_scaling"]) == (0.9, "inside")
    assert group["exclude"] == (False, True, True, False, False, True)
    for i in range(4):
        for param, grad in zip(params, random_tensors(SHAPES, i + 1), strict=True):
            param.grad = grad
        group["lr"] = 2.0 / (i + 1)
        ratio = judged_optimizer_step(optimizer).ratio
        np.testing.assert_array_equal(ratio[[1, 2, 5]], 1.0)
        assert (ratio[[0, 3]] < 0.1).all()


@pytest.mark.parametrize(
    ("rule", "solver", "options"),
    [
        ("sgd", SGD, {"momentum": 0, "nesterov": False}),
        ("momentum", SGD, {"momentum": 0.9, "nesterov": False}),
        ("nesterov", SGD, {"momentum": 0.9, "nesterov": True}),
        ("rmsprop", RMSprop, {"alpha": 0.99, "centered": False}),
    ],
)
def test_date_is_a_solver_with_the_papers_ratio(
    rule: str, solver: type[Optimizer], options: Options
) -> None:
    param = Parameter(random_tensors([40], 0)[0])
    optimizer = DATE([param], rule=rule, lr=0.01)
    assert type(optimizer) is solver
    (group,) = optimizer.param_groups
    expected: Options = {
        **options,
        "lr": 0.01,
        "trust": True,
        "trust_of": "gradient",
        "trust_weight_decay": "ignored",
        "trust_coefficient": 1.0,
        "trust_lower": 0.1,
        "trust_upper": 1.0,
        "exclude": (False,),
        "momentum_scaling": "outside",
    }
    assert {key: group[key] for key in expected} == expected
    for scale, ratio in ((1e3, 0.1), (1e-3, 1.0)):
        param.grad = scale * param.detach()
        assert judged_optimizer_step(optimizer).ratio.tolist() == [ratio]


def test_date_takes_options_and_refuses_its_own() -> None:
    params = [Parameter(torch.ones(2))]
    (group,) = DATE(params, "momentum", lower=0.5, upper=2.0, momentum=0.8, lr=3.0).param_groups
    assert [group[k] for k in ("trust_lower", "trust_upper", "momentum", "lr")] == [0.5, 2, 0.8, 3]
    assert type(DATE(params)) is RMSprop
    with pytest.raises(ValueError, match="rule 'adamax' is unknown; there are sgd, momentum"):
        DATE(params, rule="adamax")
    with pytest.raises(TypeError, match="DATE has its own trust ratio"):
        DATE(params, trust=None)
    with pytest.raises(TypeError, match="LARS has its own trust ratio"):
        LARS(params, trust=TrustRatio())


def test_trust_of_a_group_overrides_the_constructors() -> None:
    params = [Parameter(w) for w in random_tensors([9] * 4, 0)]
    groups: Any = [
        {"params": params[0:1]},
        {"params": params[1:2], "trust": TrustRatio(upper=0.125)},
        {"params": params[2:3], "trust": None},
        {"params": params[3:4], "trust": False},
    ]
    optimizer = SGD(groups, lr=0.1, trust=TrustRatio(0.5, upper=0.25))
    for param in params:
        param.grad = param.detach().clone()  # the raw ratio is the coefficient
    telemetry = judged_optimizer_step(optimizer)
    assert telemetry.ratio.tolist() == [0.25, 0.125, 1, 1]
    np.testing.assert_array_equal(telemetry.raw_ratio, [0.5, 1, math.nan, math.nan])


def test_exclude_leaves_layers_without_ratio_and_decay() -> None:
    names, shapes = ["fc.weight", "fc.bias", "norm.weight", "scale"], [(4, 3), (4,), (2, 2), ()]

    def excluded(exclude: Any, **options: Any) -> tuple[bool, ...]:
        params = [Parameter(w) for w in random_tensors(shapes, 0)]
        pairs = list(zip(names, params, strict=True))
        optimizer = SGD(
            pairs, lr=0.1, weight_decay=0.5, trust=TrustRatio(upper=0.3), exclude=exclude
        )
        for param, grad in zip(params, random_tensors(shapes, 1), strict=True):
            param.grad = grad
        starts = [param.detach().clone() for param in params]
        telemetry = judged_optimizer_step(optimizer)
        mask: tuple[bool, ...] = optimizer.param_groups[0]["exclude"]
        for i, (param, start) in enumerate(zip(params, starts, strict=True)):
            plain = torch.equal(param.detach(), start - 0.1 * random_tensors(shapes, 1)[i])
            assert plain == mask[i]
            assert math.isnan(telemetry.weight_norm[i]) == mask[i]
        return mask

    assert excluded(None) == (False, False, False, False)
    assert excluded("1d") == (False, True, False, True)
    assert excluded(lambda name, param: "norm" in name or name == "scale") == (0, 0, 1, 1)
    assert excluded(lambda name, param: param.numel() == 4) == (False, True, True, False)


def test_exclude_of_a_group() -> None:
    params = [Parameter(w) for w in random_tensors([4, 4, 4], 0)]
    groups: Any = [{"params": params[:1]}, {"params": params[1:2], "exclude": "1d"}]
    optimizer = SGD(groups, trust=TrustRatio(), exclude=lambda name, param: name is not None)
    assert [group["exclude"] for group in optimizer.param_groups] == [(False,), (True,)]
    with pytest.raises(ValueError, match="give this param group its own exclude="):
        optimizer.add_param_group({"params": params[2:]})
    assert len(optimizer.param_groups) == 2
    optimizer.add_param_group({"params": params[2:], "exclude": None})
    assert optimizer.param_groups[2]["exclude"] == (False,)


# --- golden numbers -------------------------------------------------------------------------------

GOLDEN = json.loads((Path(__file__).parent / "golden" / "optimizers.json").read_text())
DATE_MOMENTUM: Options = {"momentum": 0.9, "trust": TrustRatio()}
LARS_FORM: Options = {"weight_decay": 0.01, "coefficient": 0.02, "exclude": None}
VARYING: dict[str, tuple[type[Optimizer], Options]] = {
    "DATE momentum: lr and r outside": (SGD, DATE_MOMENTUM),
    "DATE momentum: lr and r inside": (SGD, {**DATE_MOMENTUM, "momentum_scaling": "inside"}),
    "DATE momentum: r inside, lr outside (timm-like)": (
        SGD,
        {**DATE_MOMENTUM, "momentum_scaling": "ratio_inside"},
    ),
    "LARS A: lr and ratio inside (TF/TPU)": (LARS, LARS_FORM),
    "LARS F: ratio inside, lr outside (timm,torch_optimizer)": (
        LARS,
        {**LARS_FORM, "momentum_scaling": "ratio_inside"},
    ),
    "LARS B0: lr and ratio outside, eps 0 (NUS form)": (
        LARS,
        {**LARS_FORM, "momentum_scaling": "outside"},
    ),
}


def golden_run(optimizer_of: Make, rates: list[float]) -> tuple[Tensor, float]:
    """Return the final weights, and the error that float32 may have in them.

    Inputs round once, then every step rounds the weight and the handful of products in its update:
    16 half-eps of what was added up covers each step's.
    """
    param = Parameter(torch.tensor(GOLDEN["w0"]))
    optimizer = optimizer_of([param])
    terms = float(param.detach().abs().max())
    for rate, grad in zip(rates, GOLDEN["grads"], strict=True):
        before = param.detach().clone()
        param.grad = torch.tensor(grad)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        terms += float((param.detach() - before).abs().max()) + float(before.abs().max())
    return param.detach(), 8 * float(torch.finfo(torch.float32).eps) * terms


@pytest.mark.parametrize("name", VARYING)
def test_golden_numbers_at_a_varying_rate(name: str) -> None:
    """These alone tell the three places of rate and ratio apart."""
    make, options = VARYING[name]
    golden = GOLDEN["varying_lr"]
    weights, allowed = golden_run(partial(make, **options), golden["lr"])
    others = [v for key, v in golden["res"].items() if key != name]
    error = np.abs(weights.double().numpy() - golden["res"][name]).max()
    assert error <= allowed
    assert min(np.abs(weights.double().numpy() - other).max() for other in others) > 100 * allowed


@pytest.mark.parametrize(
    ("name", "make", "options"),
    [
        ("DATE-SGD", SGD, {}),
        ("DATE-momentum.9 lr-outside", SGD, {"momentum": 0.9}),
        ("DATE-nesterov.9 lr-outside", SGD, {"momentum": 0.9, "nesterov": True}),
        ("DATE-rmsprop TF1(.9,1e-10)", RMSprop, TF1),
    ],
)
@pytest.mark.parametrize("bounds", ["[0.0,inf]", "[0.5,2.0]"])
def test_golden_numbers(name: str, make: Any, options: Options, bounds: str) -> None:
    lower, upper = (float(x) for x in bounds.strip("[]").split(","))
    trust = TrustRatio(lower=lower, upper=upper)
    weights, allowed = golden_run(partial(make, trust=trust, **options), [GOLDEN["lr"]] * 3)
    assert np.abs(weights.double().numpy() - GOLDEN["res"][name + bounds]).max() <= allowed


# --- options that change in the middle of a run ---------------------------------------------------

CHANGES: dict[str, tuple[type[LayerwiseOptimizer], list[Options]]] = {
    "bounds": (SGD, [{}, {"trust_upper": 0.02}, {"trust_lower": 5.0, "trust_upper": 6.0}]),
    "rate": (SGD, [{}, {"lr": 0.5}, {"lr": 0.0}, {"lr": 0.25}]),
    "momentum": (
        SGD,
        [{}, {"momentum": 0.9}, {"momentum": 0.5}, {"momentum": 0.0}, {"momentum": 0.9}],
    ),
    "late dampening": (
        SGD,
        [
            {"momentum": 0.9},
            {"dampening": 0.5},
            {},
            {"dampening": 0.0},
            {},
            {"dampening": 0.25},
            {},
        ],
    ),
    "dampening with momentum": (SGD, [{}, {"momentum": 0.9, "dampening": 0.5}, {}, {}]),
    "nesterov": (SGD, [{"momentum": 0.9}, {"nesterov": True}, {"nesterov": False}]),
    "scaling": (
        SGD,
        [
            {"momentum": 0.9},
            *({"momentum_scaling": s} for s in ("inside", "ratio_inside", "outside")),
        ],
    ),
    "trust": (RMSprop, [{"trust": False}, {"trust": True}, {"trust": False}, {"trust": True}]),
    "decay": (RMSprop, [{}, {"weight_decay": 0.5}, {"trust_weight_decay": "added"}]),
    "centered": (RMSprop, [{}, {"centered": True, "eps": 1e-2}, {}, {"centered": False}]),
    "rmsprop momentum": (RMSprop, [{}, {"momentum": 0.9}, {}, {"momentum": 0.0}]),
    "clipping": (
        SGD,
        [{}, {"max_grad_norm": 0.5}, {"max_grad_norm": 1e3}, {"max_grad_norm": None}],
    ),
    "maximize": (RMSprop, [{}, {"maximize": True}, {"maximize": False}]),
    "exclude": (SGD, [{"weight_decay": 0.1}, {"exclude": (True, False, True)}]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_group_says_holds_from_the_next_step(name: str) -> None:
    make, changes = CHANGES[name]
    shapes = [(5, 3), (), (40,)]
    params = [Parameter(w) for w in random_tensors(shapes, 0)]
    optimizer = make(params, lr=0.1, trust=TrustRatio(upper=0.5))  # type: ignore[call-arg]
    (group,) = optimizer.param_groups
    for i, change in enumerate(changes):
        group.update(change)
        for param, grad in zip(params, random_tensors(shapes, i + 1), strict=True):
            param.grad = grad
        telemetry = judged_optimizer_step(optimizer)
        if not group["trust"] or group["exclude"][0]:
            assert telemetry.ratio[0] == 1
        else:
            assert group["trust_lower"] <= telemetry.ratio[0] <= group["trust_upper"]


def test_moving_bounds_follow_each_layers_own_step() -> None:
    params = [Parameter(w) for w in random_tensors([6, 6], 0)]
    trust = TrustRatio(bounds="adabound", final=0.1, gamma=0.5)
    optimizer = SGD(params, lr=0.1, trust=trust)
    for k in range(1, 5):
        for n, (param, grad) in enumerate(zip(params, random_tensors([6, 6], k), strict=True)):
            param.grad = None if n == 1 and k < 3 else 1e-3 * grad  # the raw ratio is far above
        ratio = judged_optimizer_step(optimizer).ratio
        steps = [k] if k < 3 else [k, k - 2]
        np.testing.assert_allclose(ratio, [0.1 * (1 + 1 / (0.5 * s)) for s in steps], rtol=1e-12)


def test_a_group_added_in_the_middle_starts_at_its_own_first_step() -> None:
    """A new layer's first step is undamped while the old ones' steps are not."""
    old, new = (Parameter(w) for w in random_tensors([7, 5], 0))
    optimizer = SGD([old], lr=0.1, momentum=0.9, dampening=0.5, trust=TrustRatio(upper=0.5))
    old.grad, new.grad = random_tensors([7, 5], 1)
    for _ in range(2):
        judged_optimizer_step(optimizer)
    optimizer.add_param_group({"params": [new], "lr": 0.3, "trust": None})
    judged_optimizer_step(optimizer)
    assert torch.equal(optimizer.state[new]["momentum_buffer"], new.grad)
    assert [optimizer.state[p]["step"].item() for p in (old, new)] == [3, 1]
    judged_optimizer_step(optimizer)
