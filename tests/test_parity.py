"""Without trust every class is torch.optim's, in every dtype: Note [Twice torch's own error].

The note stands in `torch_runs`.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from helpers import Options, assert_same_bits, random_tensors
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch_runs import (
    SHAPES,
    TWINS,
    Make,
    assert_parity,
    assert_within_twice,
    both,
    distance,
    every_dtype,
    every_full,
    fit_for,
    give,
    run,
    set_rate,
    train,
)

import date_optim
from date_kernels import MASTER


def tensor(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


OPTIONS: dict[str, list[Options]] = {
    "SGD": [
        {},
        {"lr": 0.1},
        {"lr": tensor(0.01), "weight_decay": tensor(0.1), "momentum": 0.5},
        {"lr": 0.01, "momentum": 0.9},
        {"lr": 0.01, "momentum": 0.9, "dampening": 0.5},
        {"lr": 0.01, "momentum": 0.9, "dampening": -0.25, "weight_decay": 0.1},
        {"lr": 0.01, "momentum": 0.9, "nesterov": True},
        {"lr": 0.01, "weight_decay": 0.1},
        {"lr": 0.01, "maximize": True, "weight_decay": 0.1},
        {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "maximize": True},
    ],
    "RMSprop": [
        {},
        {"lr": 0.01, "alpha": 0.9, "eps": 1e-4},
        {"lr": tensor(0.02), "weight_decay": 0.1},
        {"momentum": 0.9},
        {"centered": True, "eps": 1e-2},
        {"centered": True, "eps": 1e-2, "momentum": 0.5, "weight_decay": 0.1},
        {"maximize": True, "weight_decay": 0.1},
        {"momentum": 0.9, "centered": True, "eps": 1e-2, "maximize": True, "alpha": 0.5},
    ],
    "Adagrad": [
        {},
        {"lr": tensor(0.05)},
        {"lr_decay": 0.1},
        {"initial_accumulator_value": 0.1, "eps": 0.0},
        {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
        {"lr_decay": 0.02, "weight_decay": 0.1, "initial_accumulator_value": 1.0, "eps": 1e-2},
    ],
    "Adam": [
        {},
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-4},
        {"lr": tensor(0.01), "betas": (tensor(0.8), tensor(0.95))},
        {"betas": (0.0, 0.0), "eps": 1e-2},
        {"weight_decay": 0.1},
        {"amsgrad": True, "betas": (0.9, 0.9)},
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
        {"amsgrad": True, "weight_decay": 0.1, "maximize": True, "betas": (0.5, 0.9)},
    ],
    "AdamW": [
        {},
        {"lr": tensor(0.01), "betas": (tensor(0.8), tensor(0.95)), "weight_decay": 1.0},
        {"weight_decay": 0.0, "eps": 1e-4},
        {"lr": 0.01, "amsgrad": True, "betas": (0.9, 0.9), "weight_decay": 0.1, "maximize": True},
    ],
    "Adadelta": [
        {},
        {"lr": tensor(0.5), "rho": 0.5},
        {"lr": 0.1, "rho": 1.0, "eps": 1e-2},
        {"rho": 0.0, "eps": 1e-3},
        {"weight_decay": 0.1, "maximize": True, "eps": 1e-3},
    ],
}
CASES = [(name, options) for name, every in OPTIONS.items() for options in every]


def label(name: str, options: Options) -> str:
    """Return a case's name among the tests."""

    def word(value: Any) -> str:
        if isinstance(value, tuple):
            return ",".join(map(word, value))
        return f"T{float(value)}" if isinstance(value, Tensor) else str(value)

    return "-".join([name, *(f"{key}={word(value)}" for key, value in options.items())])


@pytest.mark.parametrize("name", TWINS)
def test_every_argument_of_torchs_is_among_the_cases(name: str) -> None:
    tried = {key for options in OPTIONS[name] for key in options}
    _, twin = TWINS[name]
    how = {"params", "foreach", "fused", "capturable", "differentiable"}  # not what
    assert tried == inspect.signature(twin).parameters.keys() - how


@every_dtype
@pytest.mark.parametrize(("name", "options"), CASES, ids=[label(*case) for case in CASES])
def test_without_trust_it_is_torch(name: str, options: Options, dtype: torch.dtype) -> None:
    assert_parity(*both(name, **fit_for(dtype, name, options)), dtype)


@every_dtype
@every_full
def test_gradients_that_come_late_or_pause(name: str, options: Options, dtype: torch.dtype) -> None:
    """Each layer has its own first step, and a frozen one keeps its state."""
    ours, twin = both(name, **options)
    assert_parity(ours, twin, dtype, absent=lambda i, n: i < 3 * n or (n == 0 and 20 < i < 30))


@every_full
def test_frozen_by_requires_grad(name: str, options: Options) -> None:
    def freeze(i: int, optimizer: Optimizer) -> None:
        param = optimizer.param_groups[0]["params"][1]
        if i in (10, 20):
            param.requires_grad_(i == 20)
        if 10 <= i < 20:
            param.grad = None

    assert_parity(*both(name, **options), torch.float32, before_step=freeze)


OWN: dict[str, Options] = {
    "SGD": {"momentum": 0.0, "dampening": 0.0, "nesterov": False},
    "RMSprop": {"momentum": 0.0, "centered": False},
    "Adagrad": {"lr_decay": 0.0},  # torch ignores a group's initial_accumulator_value
    "Adam": {"amsgrad": False, "betas": (0.9, 0.99)},
    "AdamW": {"amsgrad": True, "betas": (0.5, 0.9)},
    "Adadelta": {"rho": 0.5},
}
"""What one group of the run has otherwise."""


@every_dtype
@every_full
def test_groups_with_options_of_their_own(name: str, options: Options, dtype: torch.dtype) -> None:
    def grouped(make: Make) -> Make:
        def make_groups(params: list[Parameter]) -> Optimizer:
            groups: Any = [
                {"params": params[:2], "lr": 0.02},
                {"params": params[2:3], **OWN[name]},
                {"params": params[3:], "weight_decay": 0.2, "maximize": True},
            ]
            return make(groups)

        return make_groups

    ours, twin = both(name, **options)
    assert_parity(grouped(ours), grouped(twin), dtype)


@every_dtype
@every_full
@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
def test_a_rate_that_changes_every_step(
    name: str, options: Options, dtype: torch.dtype, as_tensor: bool
) -> None:
    def make(maker: Make) -> Make:
        def with_rate(params: list[Parameter]) -> Optimizer:
            optimizer = maker(params)
            if as_tensor:
                optimizer.param_groups[0]["lr"] = tensor(0.01)
            return optimizer

        return with_rate

    ours, twin = both(name, **options)
    assert_parity(make(ours), make(twin), dtype, before_step=set_rate)


@every_full
def test_a_tensor_is_the_number_that_it_holds(name: str, options: Options) -> None:
    as_tensors = {"lr": torch.tensor(0.05)}
    as_numbers = {"lr": float(as_tensors["lr"])}
    if "betas" in options:
        pair = (torch.tensor(0.8), torch.tensor(0.95))
        as_tensors, as_numbers = (
            {**as_tensors, "betas": pair},  # type: ignore[dict-item]
            {**as_numbers, "betas": tuple(map(float, pair))},  # type: ignore[dict-item]
        )
    runs = [
        train(both(name, **{**options, **values})[0], torch.float32, steps=5)
        for values in (as_tensors, as_numbers)
    ]
    assert_same_bits(*runs)
    assert torch.equal(as_tensors["lr"], torch.tensor(0.05))


@every_full
def test_a_closure_gives_the_gradients(name: str, options: Options) -> None:
    expected = train(both(name, **options)[0], torch.float32, steps=5)
    params = [Parameter(weight) for weight in random_tensors(SHAPES, 0)]
    optimizer = both(name, **options)[0](params)

    def closure(seed: int) -> float:
        give(params, random_tensors(SHAPES, seed))
        return 0.5 * seed

    losses = [optimizer.step(lambda seed=seed: closure(seed)) for seed in range(1, 6)]  # type: ignore[misc]
    assert losses == [0.5, 1.0, 1.5, 2.0, 2.5]
    assert_same_bits([param.detach() for param in params], expected)


# --- where weight decay stands --------------------------------------------------------------------


@every_dtype
@every_full
@pytest.mark.parametrize("place", ["update", "weights"])
def test_decay_beside_the_rule_is_torch_on_shrunk_weights(
    name: str, options: Options, dtype: torch.dtype, place: str
) -> None:
    """Without trust ``w - lr*(u + decay*w)`` is ``(1 - lr*decay)*w - lr*u`` wherever it stands."""

    def shrink(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        (group,) = optimizer.param_groups
        for param in group["params"]:
            steps = 0 if not optimizer.state.get(param) else optimizer.state[param].get("step", 0)
            rate = group["lr"] / (1 + float(steps) * group.get("lr_decay", 0.0))
            param.data *= 1 - rate * 0.2

    def shrunk(params: list[Parameter]) -> Optimizer:
        optimizer = both(name, **{**options, "weight_decay": 0.0})[1](params)
        optimizer.register_step_pre_hook(shrink)
        return optimizer

    ours, _ = both(name, **{**options, "weight_decay": 0.2, "weight_decay_in": place})
    assert_parity(ours, shrunk, dtype)


# --- 16 bits --------------------------------------------------------------------------------------

half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])


@half
@every_full
def test_a_float32_gradient_of_equal_value_is_equal(
    name: str, options: Options, dtype: torch.dtype
) -> None:
    ours, _ = both(name, **options)
    narrow, wide = (
        train(ours, dtype, inputs=dtype, grad_dtype=grad_dtype)
        for grad_dtype in (None, torch.float32)
    )
    assert_same_bits(narrow, wide)


@half
@every_full
def test_master_weights_lose_no_update(name: str, options: Options, dtype: torch.dtype) -> None:
    """They are as good as torch's float32; the parameter rounds once what it else does 50 times."""
    ours, twin = both(name, **options)
    exact, single = (train(twin, wide, inputs=dtype) for wide in (torch.float64, torch.float32))
    optimizer, params = run(both(name, **options, master_weights=True)[0], dtype)
    masters = [optimizer.state[param][MASTER] for param in optimizer.param_groups[0]["params"]]
    assert {master.dtype for master in masters} == {torch.float32}
    assert_within_twice(masters, single, exact)
    assert_same_bits(params, [master.to(dtype) for master in masters])
    assert distance(params, exact) < distance(train(ours, dtype), exact) / 2


# --- where torch's own formula fails --------------------------------------------------------------


def test_centered_variance_is_never_negative() -> None:
    """With constant gradients ``v - gbar^2`` rounds below 0: torch's float32 takes its root."""

    def last(make: Make) -> Tensor:
        (w, g) = random_tensors([1000, 1000], 0)
        param = Parameter(w)
        optimizer = make([param])
        for _ in range(60):
            param.grad = g.clone()
            optimizer.step()
        return param.detach()

    ours, twin = both("RMSprop", alpha=0.5, centered=True, lr=1e-3)
    assert last(twin).isnan().any(), "torch has changed: this test shows nothing any more"
    assert last(ours).isfinite().all()


@pytest.mark.parametrize("name", ["RMSprop", "Adam", "Adadelta"])
def test_a_gradient_whose_square_overflows(name: str) -> None:
    """The average of squares does not, and the layer goes on as torch's."""
    params = [Parameter(torch.ones(3)) for _ in range(2)]
    ours, torchs = getattr(date_optim, name)(params[:1]), getattr(torch.optim, name)(params[1:])
    for gradient in (3e19, 1.0, 1.0):
        for param, optimizer in zip(params, (ours, torchs), strict=True):
            param.grad = torch.full((3,), gradient)
            optimizer.step()
    for key, state in torchs.state[params[1]].items():
        assert torch.equal(ours.state[params[0]][key].isfinite(), state.isfinite()), key
    torch.testing.assert_close(params[0], params[1])
