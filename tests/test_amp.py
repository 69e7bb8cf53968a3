"""torch.amp.GradScaler: by its own unscaling, and by the protocol of fused optimizers."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers import Options, assert_same_bits, unchanged
from setups import CLASSES, give_gradients, make, setups
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch_runs import FULL, TWINS

SCALE = 8.0

fused = pytest.mark.parametrize("fused", [True, None])


def scaler_of(scale: float = SCALE) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.ones(()))  # makes the scale's tensor
    return scaler


def grads_of(params: list[Parameter]) -> list[Tensor]:
    return [param.grad for param in params if param.grad is not None]


def give_scaled(params: list[Parameter], seed: int, scale: float = SCALE) -> list[Tensor]:
    """Gradients as the backward pass of a scaled loss leaves them; returns them unscaled."""
    give_gradients(params, seed)
    plain = [grad.clone() for grad in grads_of(params)]
    for grad in grads_of(params):
        grad.mul_(scale)
    return plain


def fuse(optimizer: Optimizer, fused: bool | None) -> None:
    for group in optimizer.param_groups:
        group["fused"] = fused


def states_of(optimizer: Optimizer) -> list[Tensor]:
    return [x for of in optimizer.state.values() for x in of.values() if isinstance(x, Tensor)]


@setups
@fused
@pytest.mark.parametrize("unscales", [False, True])
def test_steps_are_those_of_unscaled_gradients(
    name: str, fused: bool | None, unscales: bool
) -> None:
    """A scale that is a power of two rounds nothing; gradients are unscaled afterwards."""
    (scaled, params), (plain, others) = make(name), make(name)
    fuse(scaled, fused)
    scaler = scaler_of()
    for seed in (1, 2, 3):
        unscaled = give_scaled(params, seed)
        if unscales:
            scaler.unscale_(scaled)
        scaler.step(scaled)
        scaler.update()
        give_gradients(others, seed)
        plain.step()
        assert_same_bits(grads_of(params), unscaled)
        assert_same_bits(params, others)
        assert_same_bits(states_of(scaled), states_of(plain))
        assert not {"grad_scale", "found_inf"} & set(vars(scaled))


@setups
@fused
@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_step_with_an_infinite_gradient_changes_nothing(
    name: str, fused: bool | None, unscales: bool, steps_before: int, bad: float
) -> None:
    """Also where it is the first one; the next step is as if it had not been."""
    (scaled, params), (plain, others) = make(name), make(name)
    fuse(scaled, fused)
    scaler = scaler_of()
    for seed in range(steps_before):
        for optimizer, of in ((scaled, params), (plain, others)):
            give_gradients(of, seed)
            optimizer.step()
    give_scaled(params, 5)
    assert params[0].grad is not None
    params[0].grad.view(-1)[3] = bad
    if unscales:
        scaler.unscale_(scaled)
    grads = (
        [] if fused is None else grads_of(params)
    )  # unscale_ has its own rules of what it leaves
    with unchanged([*params, *states_of(scaled), *grads]):
        scaler.step(scaled)
    scaler.update()
    assert scaler.get_scale() == SCALE / 2
    give_scaled(params, 6, SCALE / 2)
    scaler.step(scaled)
    give_gradients(others, 6)
    plain.step()
    assert_same_bits(params, others)
    assert_same_bits(states_of(scaled), states_of(plain))


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_left_as_torchs_fused_optimizers_leave_them(
    name: str, dtype: torch.dtype
) -> None:
    """Of any scale, after a step and after one that an inf has stopped."""
    ours, torchs = TWINS[name]
    options: Options = {**FULL[name], "fused": True}
    start = [torch.linspace(-1, 1, n).to(dtype) for n in (1, 5, 300)]
    params, others = ([Parameter(x.clone()) for x in start] for _ in range(2))
    one, other = ours(params, **options), torchs(others, **options)
    for step, bad in enumerate((False, True, False)):
        scale = torch.tensor(3.0 + step)
        for of in (params, others):
            for seed, param in enumerate(of):
                generator = torch.Generator().manual_seed(10 * step + seed)
                param.grad = (torch.randn(param.shape, generator=generator) * scale).to(dtype)
                if bad and seed == 1:
                    param.grad[2] = math.inf
        for optimizer in (one, other):
            handed: Any = optimizer
            handed.grad_scale, handed.found_inf = scale, torch.tensor(float(bad))
            optimizer.step()
            del handed.grad_scale, handed.found_inf
        for a, b in zip(grads_of(params), grads_of(others), strict=True):
            assert_same_bits([a], [b])


@pytest.mark.parametrize("cls", CLASSES)
def test_all_groups_must_ask_for_it(cls: Any) -> None:
    """Class property: copies keep it, and it follows the groups."""
    groups = [{"params": [Parameter(torch.ones(2))]} for _ in range(2)]
    optimizer = cls(groups, lr=0.1, fused=True)
    assert optimizer._step_supports_amp_scaling
    assert copy.deepcopy(optimizer)._step_supports_amp_scaling
    for other in (None, False):
        optimizer.param_groups[1]["fused"] = other
        assert not optimizer._step_supports_amp_scaling
    assert not cls([Parameter(torch.ones(2))], lr=0.1)._step_supports_amp_scaling


def test_a_step_that_is_refused_leaves_scaled_gradients() -> None:
    optimizer, params = make("momentum")
    fuse(optimizer, True)
    scaler = scaler_of()
    give_scaled(params, 1)
    optimizer.param_groups[0]["lr"] = -1.0
    with unchanged([*params, *grads_of(params)]), pytest.raises(ValueError, match="learning rate"):
        scaler.step(optimizer)


@pytest.mark.parametrize("after_unscale", [False, True])
def test_a_scale_that_the_user_has_set_is_taken_up(after_unscale: bool) -> None:
    """GradScaler multiplies it by its own, or hands it on as it is after unscale_."""
    (scaled, params), (plain, others) = make("momentum"), make("momentum")
    fuse(scaled, True)
    scaler = scaler_of()
    unscaled = give_scaled(params, 1, 2.0 * SCALE)
    if after_unscale:
        scaler.unscale_(scaled)
    handed: Any = scaled
    handed.grad_scale = 2.0
    scaler.step(scaled)
    give_gradients(others, 1)
    plain.step()
    assert_same_bits(params, others)
    assert_same_bits(grads_of(params), unscaled)


def test_gradients_that_cannot_be_written_are_refused_first() -> None:
    optimizer, params = make("momentum")
    fuse(optimizer, True)
    give_gradients(params, 1)
    handed: Any = optimizer
    handed.grad_scale = torch.tensor(8.0)
    for grad in (torch.ones(()).expand(5, 4), torch.inference_mode()(torch.ones)(5, 4)):
        params[0].grad = grad
        with unchanged(params), pytest.raises(RuntimeError, match="cannot be unscaled"):
            optimizer.step()


def test_norms_are_of_unscaled_gradients() -> None:
    optimizer, params = make("LARS")
    fuse(optimizer, True)
    scaler = scaler_of(1024.0)
    unscaled = give_scaled(params, 1, 1024.0)
    scaler.step(optimizer)
    measured = [of.measured_norm for of in optimizer.read_telemetry().values()]
    for norm, grad in zip(measured, unscaled, strict=True):
        if not math.isnan(norm):
            rounding = grad.numel() * torch.finfo(torch.float64).eps
            assert norm == pytest.approx(float(grad.double().norm()), rel=rounding)
