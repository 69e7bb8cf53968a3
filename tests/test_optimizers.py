"""The layer-wise part of the torch optimizers: trust, exclusion, dtypes, options that change.

They are held to the float64 reference step by step, and over many steps to twins made of
torch.optim: Note [Twice torch's own error] in `torch_runs`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    DTYPES,
    Options,
    assert_same_bits,
    judged_optimizer_step,
    plan_of,
    random_tensors,
)
from torch.nn import Parameter
from torch_runs import (
    FULL,
    TWINS,
    Make,
    assert_parity,
    both,
    every_dtype,
    every_full,
    fed_twin,
    give,
    set_rate,
)

from date_kernels import MASTER
from date_kernels.layers import HALF
from date_optim import LARS, SGD, Adadelta, Adagrad, Adam, AdamW, RMSprop, TrustRatio
from date_optim.optimizer import LayerwiseOptimizer

PLACES = ("gradient", "update", "weights")
SHAPES = [(6, 5), (5,), (), (0, 4), (70,)]

# --- trust ----------------------------------------------------------------------------------------

TRUSTS: dict[str, tuple[TrustRatio, str]] = {
    "plain": (TrustRatio(upper=10.0), "gradient"),
    "bounded": (TrustRatio(lower=0.9, upper=1.1), "weights"),
    "added": (TrustRatio(0.3, weight_decay="added", eps=0.5), "gradient"),
    "combined": (TrustRatio(weight_decay="combined", upper=3.0), "update"),
    "of update": (TrustRatio(0.5, of="update"), "gradient"),
    "LAMB": (TrustRatio(of="update", upper=5.0), "update"),
    "of update, decoupled": (TrustRatio(of="update", lower=0.5, upper=2.0), "weights"),
}
"""Ratios, and where weight decay stands with them."""


@pytest.mark.parametrize(("trust", "place"), TRUSTS.values(), ids=TRUSTS)
@every_dtype
@every_full
def test_trust_is_torch_fed_with_the_ratio(
    name: str, options: Options, dtype: torch.dtype, trust: TrustRatio, place: str
) -> None:
    options = {**options, "weight_decay": 0.1, **({"lr_decay": 0.0} if name == "Adagrad" else {})}
    ours, _ = both(name, **options, trust=trust, weight_decay_in=place)
    assert_parity(ours, fed_twin(name, options, trust, place), dtype)


@pytest.mark.parametrize("form", ["inside", "ratio_inside"])
@pytest.mark.parametrize("key", ["SGD", "SGD-nesterov", "RMSprop"])
@every_dtype
def test_a_ratio_inside_is_torchs_momentum_fed_with_it(
    key: str, form: str, dtype: torch.dtype
) -> None:
    """At a rate that changes with the step, which tells the forms apart."""
    name, options = key.split("-", maxsplit=1)[0], {**FULL[key], "weight_decay": 0.1}
    trust = TrustRatio(0.5, upper=5.0)
    ours, _ = both(name, **options, trust=trust, momentum_scaling=form)
    twin = fed_twin(name, options, trust, form=form)
    assert_parity(ours, twin, dtype, before_step=set_rate)


@every_dtype
@pytest.mark.parametrize("name", ["SGD", "RMSprop"])
def test_groups_that_mix_momentum_nesterov_and_trust(name: str, dtype: torch.dtype) -> None:
    """A ratio whose bounds coincide is a factor on the rate: torch knows that one, too."""
    second: Options = {"nesterov": True} if name == "SGD" else {"centered": True, "eps": 1e-2}
    eps: Options = {} if name == "SGD" else {"eps": 1e-3}

    def groups(params: list[Parameter], pinned: Options) -> Any:
        return [
            {"params": params[:1]},
            {"params": params[1:3], "momentum": 0.9, **second},
            {"params": params[3:4], "momentum": 0.9, **pinned},
            {"params": params[4:], "weight_decay": 0.1, **pinned},
        ]

    ours, twin = both(name, lr=0.05, **eps)
    trust = TrustRatio(lower=0.25, upper=0.25, weight_decay="added")
    assert_parity(
        lambda params: ours(groups(params, {"trust": trust})),
        lambda params: twin(groups(params, {"lr": 0.05 * 0.25})),
        dtype,
    )


# --- one step against the reference ---------------------------------------------------------------


def make(
    name: str, options: Options, dtype: torch.dtype = torch.float32, **more: Any
) -> tuple[LayerwiseOptimizer, list[Parameter]]:
    """Return one of our optimizers and its parameters."""
    params = [Parameter(weight) for weight in random_tensors(SHAPES, 0, dtype)]
    cls: Any = TWINS[name][0]
    return cls(params, **{**options, **more}), params


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"), DTYPES, ids=[f"{d}-{g}".replace("torch.", "") for d, g in DTYPES]
)
@pytest.mark.parametrize("of", ["gradient", "update"])
@every_full
def test_every_step_is_the_references(
    name: str,
    options: Options,
    of: str,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    place: str,
) -> None:
    trust = TrustRatio(0.5 if of == "gradient" else 0.02, upper=0.6, of=of)
    for master_weights in (False, True) if dtype in HALF else (False,):
        optimizer, params = make(
            name,
            options,
            dtype,
            weight_decay=0.1,
            trust=trust,
            weight_decay_in=place,
            master_weights=master_weights,
        )
        inside = 0
        for seed in range(1, 5):
            give(params, random_tensors(SHAPES, seed, grad_dtype))
            inside += int((judged_optimizer_step(optimizer).clamp[:3] == 0).sum())
        assert inside > 0, "a bound held every ratio"
        assert (MASTER in optimizer.state[params[0]]) == master_weights


def mixed(make_optimizer: Make) -> tuple[LayerwiseOptimizer, list[Parameter], list[torch.dtype]]:
    """Return an optimizer of one group with parameters and gradients of every pair of dtypes."""
    weights = random_tensors([(9, 5)] * len(DTYPES), 0)
    params = [Parameter(w.to(dtype)) for w, (dtype, _) in zip(weights, DTYPES, strict=True)]
    optimizer: Any = make_optimizer(params)
    return optimizer, params, [grad_dtype for _, grad_dtype in DTYPES]


def give_mixed(params: list[Parameter], dtypes: list[torch.dtype], seed: int) -> None:
    grads = random_tensors([(9, 5)] * len(params), seed)
    give(params, [grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)])


MIXED: Options = {"trust": TrustRatio(0.5, upper=1.0), "master_weights": True}


@every_full
def test_every_dtype_in_one_group_and_one_launch(name: str, options: Options) -> None:
    optimizer, params, dtypes = mixed(both(name, **options, **MIXED, max_grad_norm=0.5)[0])
    for seed in range(1, 4):
        give_mixed(params, dtypes, seed)
        assert len(judged_optimizer_step(optimizer).ratio) == len(DTYPES)
    assert plan_of(optimizer).builds == 1
    for param in params:
        values = optimizer.state[param]
        assert (MASTER in values) == (param.dtype in HALF)
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        assert {v.dtype for key, v in values.items() if key != "step"} <= {wide}


@every_full
def test_dtypes_together_are_each_by_itself_in_every_bit(name: str, options: Options) -> None:
    make_optimizer, _ = both(name, **options, **MIXED)
    whole, params, dtypes = mixed(make_optimizer)
    _, others, _ = mixed(make_optimizer)
    parts = [make_optimizer([param]) for param in others]
    for seed in range(1, 4):
        for given in (params, others):
            give_mixed(given, dtypes, seed)
        whole.step()
        for part in parts:
            part.step()
        assert_same_bits(params, others)


# --- groups and exclusion -------------------------------------------------------------------------


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


def test_a_groups_start_of_a_state() -> None:
    params = [Parameter(w) for w in random_tensors([3, 3], 0)]
    give(params, [torch.full((3,), 2.0)] * 2)
    groups: Any = [{"params": params[:1]}, {"params": params[1:], "initial_accumulator_value": 0.5}]
    adagrad = Adagrad(groups)
    adagrad.step()
    assert [float(adagrad.state[param]["sum"][0]) for param in params] == [4.0, 4.5]


EXCLUDES: dict[str, tuple[Any, tuple[bool, ...]]] = {
    "none": (None, (False,) * 5),
    "1d": ("1d", (False, True, True, False, True)),
    "by name": (lambda name, param: name in ("2", "3"), (False, False, True, True, False)),
    "by shape": (lambda name, param: param.numel() == 30, (True, False, False, False, False)),
}


@pytest.mark.parametrize("of", ["gradient", "update"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("exclude", "mask"), EXCLUDES.values(), ids=EXCLUDES)
@every_full
def test_an_excluded_layer_has_neither_ratio_nor_decay(
    name: str, options: Options, exclude: Any, mask: tuple[bool, ...], place: str, of: str
) -> None:
    """In every bit what it is without them; the other layers are not."""
    layerwise: Options = {
        "weight_decay": 0.5,
        "weight_decay_in": place,
        "trust": TrustRatio(0.1, upper=0.3, of=of),
        "exclude": exclude,
    }

    def named(maker: Make) -> tuple[LayerwiseOptimizer, list[Parameter]]:
        params = [Parameter(weight) for weight in random_tensors(SHAPES, 0)]
        pairs: Any = [(str(i), param) for i, param in enumerate(params)]
        optimizer: Any = maker(pairs)
        return optimizer, params

    optimizer, params = named(both(name, **{**options, **layerwise})[0])
    plain, others = named(both(name, **{**options, "weight_decay": 0.0})[0])
    assert optimizer.param_groups[0]["exclude"] == mask
    for seed in (1, 2):
        for given in (params, others):
            give(given, random_tensors(SHAPES, seed))
        telemetry = judged_optimizer_step(optimizer)
        plain.step()
        np.testing.assert_array_equal(np.isnan(telemetry.weight_norm), mask)
    same = [torch.equal(param, other) for param, other in zip(params, others, strict=True)]
    assert same == [
        excluded or param.numel() == 0 for param, excluded in zip(params, mask, strict=True)
    ]


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
    "place of decay": (
        Adam,
        [
            {"weight_decay": 0.5},
            *({"weight_decay_in": p} for p in ("update", "weights", "gradient")),
        ],
    ),
    "of": (Adadelta, [{}, {"trust_of": "update"}, {"trust_of": "gradient"}]),
    "betas": (AdamW, [{}, {"betas": (0.5, 0.6)}, {"bias_correction": False}, {"eps": 0.1}]),
    "amsgrad": (Adam, [{}, {}, {"amsgrad": True}, {"amsgrad": False}, {}, {"amsgrad": True}]),
    "rate's decay": (Adagrad, [{}, {"lr_decay": 0.5}, {}, {"lr_decay": 0.0}]),
    "rho": (Adadelta, [{}, {"rho": 0.5}, {"rho": 1.0}, {"eps": 0.1}]),
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


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_master_weights_that_come_and_go(name: str) -> None:
    """They begin at the parameter each time: an old copy would take it back."""
    optimizer, params = make(name, {"lr": 0.1}, torch.bfloat16)
    (group,) = optimizer.param_groups
    for i, wanted in enumerate((False, True, False, False, True, True)):
        group["master_weights"] = wanted
        give(params, random_tensors(SHAPES, i + 1, torch.bfloat16))
        judged_optimizer_step(optimizer)
        assert all((MASTER in optimizer.state.get(param, {})) == wanted for param in params)
        assert all(optimizer.state.values()), "an empty state"


def test_a_master_is_dropped_with_the_16_bits_that_it_was_for() -> None:
    """Or it would undo, once they are back, what happened to the weights meanwhile."""
    param = Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    optimizer = SGD([param], lr=0.125, master_weights=True)
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        param.grad = None
        param.data = param.data.to(dtype)
        param.grad = torch.ones(2, dtype=dtype)
        optimizer.step()
        assert ("master" in optimizer.state[param]) == (dtype == torch.bfloat16)
    assert param.tolist() == [1 - 3 * 0.125, 2 - 3 * 0.125]


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (
            lambda p: AdamW(p, decoupled_weight_decay=False),  # type: ignore[call-arg]
            TypeError,
            r"AdamW\(\) got an unexpected keyword argument 'decoupled_weight_decay'",
        ),
        (lambda p: LARS([{"params": p, "upper": 0.5}]), ValueError, "says trust_upper, not upper"),
        (lambda p: LARS([{"params": p, "of": "update"}]), ValueError, "says trust_of, not of"),
        (lambda p: SGD([{"params": p, "clip_by_lr": True}]), ValueError, "trust_clip_by_lr, not"),
        (lambda p: SGD([{"params": p, "trust_uper": 1}]), ValueError, "'trust_uper' is no option"),
        (
            lambda p: SGD([{"params": p[:1]}, {"params": p[1:], "max_grad_norm": 1.0}]),
            ValueError,
            "max_grad_norm is one decision for all param groups, but they differ",
        ),
    ],
)
def test_what_would_be_ignored_is_refused(
    make: Callable[[list[Parameter]], Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        make([Parameter(torch.ones(2)), Parameter(torch.ones(2))])


def test_names_are_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once for each: a first step over n tensors would cost n squared."""
    made: list[int] = []
    names_of = LayerwiseOptimizer._names

    def names(optimizer: LayerwiseOptimizer) -> dict[int, str]:
        made.append(1)
        return names_of(optimizer)

    monkeypatch.setattr(LayerwiseOptimizer, "_names", names)
    counts = []
    for size in (5, 50):
        params = [Parameter(weight) for weight in random_tensors([3] * size, 0)]
        optimizer = SGD(params, lr=0.1, momentum=0.9)
        made.clear()
        for param in params:
            param.grad = torch.ones(3)
        optimizer.step()
        counts.append(len(made))
    assert counts[0] == counts[1]
