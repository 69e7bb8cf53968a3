"""LARS, LAMB and DATE: their defaults, the golden numbers, and twins made of torch.optim."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TF1, Options, judged_optimizer_step, random_tensors
from torch.nn import Parameter
from torch_runs import Make, assert_parity, every_dtype, fed_twin, give, set_rate

from date_kernels.testing import assert_close
from date_optim import DATE, LAMB, LARS, SGD, Adadelta, Adagrad, Adam, RMSprop, TrustRatio
from date_optim.optimizer import LayerwiseOptimizer

SHAPES = [(6, 5), (5,), (), (5, 4, 3, 3), (70,)]

SOLVERS: dict[str, tuple[type[LayerwiseOptimizer], Options]] = {
    "sgd": (SGD, {"momentum": 0, "nesterov": False}),
    "momentum": (SGD, {"momentum": 0.9, "nesterov": False}),
    "nesterov": (SGD, {"momentum": 0.9, "nesterov": True}),
    "adagrad": (Adagrad, {"lr_decay": 0, "eps": 1e-10}),
    "rmsprop": (RMSprop, {"alpha": 0.99, "centered": False, "momentum": 0}),
    "adam": (Adam, {"betas": (0.9, 0.999), "amsgrad": False}),
    "adadelta": (Adadelta, {"rho": 0.9, "eps": 1e-6}),
}
"""DATE's seven, with what tells them apart."""


# --- golden numbers -------------------------------------------------------------------------------

GOLDEN = json.loads((Path(__file__).parent / "golden" / "optimizers.json").read_text())
ADAGRAD_TF1: Options = {"initial_accumulator_value": 0.1, "eps": 0.0}
INSIDE: Options = {"momentum_scaling": "inside"}

DATE_ROWS: dict[str, Any] = {
    "DATE-SGD": partial(DATE, rule="sgd"),
    "DATE-momentum.9 lr-outside": partial(DATE, rule="momentum"),
    "DATE-momentum.9 lr-inside": partial(DATE, rule="momentum", **INSIDE),
    "DATE-nesterov.9 lr-outside": partial(DATE, rule="nesterov"),
    "DATE-adagrad torch": partial(DATE, rule="adagrad"),
    "DATE-adagrad TF1": partial(DATE, rule="adagrad", **ADAGRAD_TF1),
    "DATE-rmsprop torch(.99,1e-8)": partial(DATE, rule="rmsprop"),
    "DATE-rmsprop TF1(.9,1e-10)": partial(DATE, rule="rmsprop", **TF1),
    "DATE-adam r(grad)": partial(DATE, rule="adam"),
    "DATE-adam r(update)": lambda params, lower, upper: Adam(
        params, trust=TrustRatio(lower=lower, upper=upper, of="update")
    ),
}
lars = partial(LARS, weight_decay=0.01, coefficient=0.02, exclude=None)
lamb = partial(LAMB, exclude=None)


def lars_like(trust: TrustRatio, **options: Any) -> Any:
    """Return LARS with another ratio than its own: SGD with its options."""
    return partial(SGD, momentum=0.9, weight_decay=0.01, trust=trust, **options)


ROWS: dict[str, Any] = {
    **{
        f"{name}[{lower},{upper}]": partial(make, lower=lower, upper=upper)
        for name, make in DATE_ROWS.items()
        for lower, upper in ((0.0, math.inf), (0.5, 2.0))
    },
    "LARS A lr-inside, wd in grad (TF/TPU,optax-like)": lars,
    "LARS A nesterov (TF use_nesterov)": partial(lars, nesterov=True),
    "LARS B lr-outside (NUS/ColossalAI eps1e-5)": lars_like(
        TrustRatio(0.02, weight_decay="added", eps=1e-5)
    ),
    "LARS D norm of (g+wd w), lr-inside (optax/tf-models)": lars_like(
        TrustRatio(0.02, weight_decay="combined"), **INSIDE
    ),
    "LARS E popular momentum, ratio on buffer (tf-models classic_momentum=False)": lars_like(
        TrustRatio(0.02, of="update")
    ),
    "LIMIT eq2 (eeta=1) lr-inside": partial(lars, coefficient=1.0),
    "LAMB bias-corrected wd0 eps1e-6 lr.01": lamb,
    "LAMB bias-corrected wd.01": partial(lamb, weight_decay=0.01),
    "LAMB no-bc wd.01 (ALBERT/cybertronai/Colossal)": partial(
        lamb, weight_decay=0.01, bias_correction=False
    ),
    "LAMB no-bc wd0": partial(lamb, bias_correction=False),
    "LAMB bc wd.01 clip0.3": partial(lamb, weight_decay=0.01, max_grad_norm=0.3),
    "LAMB bc wd.01 phi clamp [0,1]": partial(
        Adam,
        eps=1e-6,
        weight_decay=0.01,
        weight_decay_in="update",
        trust=TrustRatio(of="update", weight_norm_bounds=(0.0, 1.0)),
    ),
}
INEXPRESSIBLE = {"LARS C tf.contrib lr-outside, NO wd in grad"}
"""Decay in the ratio but not in the gradient."""

date_momentum = partial(DATE, rule="momentum", lower=0.0, upper=math.inf)
VARYING_ROWS: dict[str, Any] = {
    "DATE momentum: lr and r outside": date_momentum,
    "DATE momentum: lr and r inside": partial(date_momentum, **INSIDE),
    "DATE momentum: r inside, lr outside (timm-like)": partial(
        date_momentum, momentum_scaling="ratio_inside"
    ),
    "LARS A: lr and ratio inside (TF/TPU)": lars,
    "LARS F: ratio inside, lr outside (timm,torch_optimizer)": partial(
        lars, momentum_scaling="ratio_inside"
    ),
    "LARS B0: lr and ratio outside, eps 0 (NUS form)": partial(lars, momentum_scaling="outside"),
}


def golden_run(make: Make, rates: list[float], dtype: torch.dtype) -> tuple[Parameter, float]:
    """Return the final weights, and the error that the dtype may have in them.

    Inputs round once, then every step rounds the weight and the handful of products in its update:
    16 half-eps of what was added up covers each step's.
    """
    param = Parameter(torch.tensor(GOLDEN["w0"], dtype=dtype))
    optimizer = make([param])
    terms = float(param.detach().abs().max())
    for rate, grad in zip(rates, GOLDEN["grads"], strict=True):
        before = param.detach().clone()
        param.grad = torch.tensor(grad, dtype=dtype)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        terms += float((param.detach() - before).abs().max()) + float(before.abs().max())
    return param, 8 * torch.finfo(dtype).eps * terms


def test_every_golden_row_is_accounted_for() -> None:
    assert set(GOLDEN["res"]) == set(ROWS) | INEXPRESSIBLE
    assert set(GOLDEN["varying_lr"]["res"]) == set(VARYING_ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_golden_numbers(row: str) -> None:
    rate = 0.01 if row.startswith("LAMB") else GOLDEN["lr"]
    param, _ = golden_run(ROWS[row], [rate] * 3, torch.float64)
    assert_close(param.detach(), GOLDEN["res"][row], 1e-12, row)


@pytest.mark.parametrize("row", VARYING_ROWS)
def test_golden_numbers_at_a_varying_rate(row: str) -> None:
    """These alone tell the three places of rate and ratio apart."""
    golden = GOLDEN["varying_lr"]
    param, _ = golden_run(VARYING_ROWS[row], golden["lr"], torch.float64)
    assert_close(param.detach(), golden["res"][row], 1e-12, row)


@pytest.mark.parametrize("row", VARYING_ROWS)
def test_golden_numbers_in_float32(row: str) -> None:
    golden = GOLDEN["varying_lr"]
    param, allowed = golden_run(VARYING_ROWS[row], golden["lr"], torch.float32)
    weights = param.detach().double().numpy()
    others = [v for key, v in golden["res"].items() if key != row]
    assert_close(weights, golden["res"][row], allowed, row)
    assert min(np.abs(weights - other).max() for other in others) > 100 * allowed


# --- LARS and LAMB --------------------------------------------------------------------------------


def is_vector(param: Any) -> bool:
    return bool(param.ndim <= 1)


@every_dtype
def test_lars_is_torchs_momentum_fed_with_rate_and_ratio(dtype: torch.dtype) -> None:
    trust = TrustRatio(0.5, upper=0.8, weight_decay="added")
    options: Options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
    twin = fed_twin("SGD", options, trust, form="inside", excluded=is_vector)
    ours = partial(LARS, lr=0.05, weight_decay=0.1, coefficient=0.5, upper=0.8)
    assert_parity(ours, twin, dtype, before_step=set_rate)


@every_dtype
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lamb_is_torchs_adam_with_the_ratio_of_its_update(dtype: torch.dtype, decay: float) -> None:
    options: Options = {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": decay}
    trust = TrustRatio(of="update", upper=2.0)
    twin = fed_twin("Adam", options, trust, "update", excluded=is_vector)
    assert_parity(partial(LAMB, **options, upper=2.0), twin, dtype, before_step=set_rate)


PRESETS: list[tuple[type[LayerwiseOptimizer], Options]] = [
    (
        LARS,
        {
            "momentum": 0.9,
            "momentum_scaling": "inside",
            "weight_decay_in": "gradient",
            "trust_coefficient": 0.001,
            "trust_weight_decay": "added",
            "trust_of": "gradient",
        },
    ),
    (
        LAMB,
        {
            "betas": (0.9, 0.999),
            "eps": 1e-6,
            "bias_correction": True,
            "weight_decay_in": "update",
            "trust_coefficient": 1.0,
            "trust_weight_decay": "ignored",
            "trust_of": "update",
        },
    ),
]


@pytest.mark.parametrize(("cls", "expected"), PRESETS, ids=["LARS", "LAMB"])
def test_defaults_of_a_preset(cls: Any, expected: Options) -> None:
    (group,) = cls([Parameter(weight) for weight in random_tensors(SHAPES, 0)]).param_groups
    every: Options = {
        **expected,
        "lr": 1e-3,
        "weight_decay": 0,
        "trust": True,
        "trust_lower": 0.0,
        "trust_upper": math.inf,
        "exclude": (False, True, True, False, True),
    }
    assert {key: group[key] for key in every} == every


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (LARS, {"lr": 0.5, "momentum": 0.25, "dampening": 0.75, "weight_decay": 0.125}),
        (LAMB, {"lr": 0.5, "betas": (0.5, 0.25), "eps": 0.75, "weight_decay": 0.125}),
    ],
)
def test_positions_of_a_preset_are_its_bases(cls: Any, arguments: Options) -> None:
    (group,) = cls([Parameter(torch.ones(2))], *arguments.values()).param_groups
    assert {key: group[key] for key in arguments} == arguments


@pytest.mark.parametrize("options", [{}, {"lower": 0.5, "upper": 0.75}, {"maximize": True}])
@pytest.mark.parametrize("cls", [LARS, LAMB])
def test_a_preset_is_the_reference(cls: Any, options: Options) -> None:
    params = [Parameter(weight) for weight in random_tensors(SHAPES, 0)]
    optimizer = cls(params, lr=2.0, weight_decay=1e-2, **options)
    for i in range(4):
        give(params, random_tensors(SHAPES, i + 1))
        optimizer.param_groups[0]["lr"] = 2.0 / (i + 1)
        ratio = judged_optimizer_step(optimizer).ratio
        np.testing.assert_array_equal(ratio[[1, 2, 4]], 1.0)
        assert (ratio[[0, 3]] != 1.0).all()


# --- DATE -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", SOLVERS)
def test_date_is_a_solver_with_the_papers_ratio(rule: str) -> None:
    solver, options = SOLVERS[rule]
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
        "weight_decay_in": "gradient",
    }
    assert {key: group[key] for key in expected} == expected
    for scale, ratio in ((1e3, 0.1), (1e-3, 1.0)):
        param.grad = scale * param.detach()
        assert judged_optimizer_step(optimizer).ratio.tolist() == [ratio]


@pytest.mark.parametrize("rule", SOLVERS)
def test_date_over_a_run(rule: str) -> None:
    """In float64 against torch's own solver; Adadelta has no golden number."""
    solver, options = SOLVERS[rule]
    options = {"lr": 0.1, **options}
    twin = fed_twin(solver.__name__, options, TrustRatio(lower=0.1, upper=1.0))
    assert_parity(partial(DATE, rule=rule, lr=0.1), twin, torch.float64)


def test_date_takes_options() -> None:
    params = [Parameter(torch.ones(2))]
    (group,) = DATE(params, "momentum", lower=0.5, upper=2.0, momentum=0.8, lr=3.0).param_groups
    assert [group[k] for k in ("trust_lower", "trust_upper", "momentum", "lr")] == [0.5, 2, 0.8, 3]
    assert type(DATE(params)) is RMSprop
    with pytest.raises(ValueError, match="rule 'adamax' is unknown; there are sgd, momentum"):
        DATE(params, rule="adamax")


@pytest.mark.parametrize(("make", "name"), [(DATE, "DATE"), (LARS, "LARS"), (LAMB, "LAMB")])
@pytest.mark.parametrize("trust", [None, TrustRatio()])
def test_a_preset_has_its_own_ratio(make: Any, name: str, trust: TrustRatio | None) -> None:
    with pytest.raises(TypeError, match=f"{name} has its own trust ratio: pass .*lower="):
        make([Parameter(torch.ones(2))], trust=trust)
