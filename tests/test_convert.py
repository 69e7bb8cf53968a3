"""16-bit numbers to and from the arithmetic's float: every pattern, every rounding, each set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import TARGETS
from torch import Tensor

from date_kernels.plan import Plan

HALVES = [torch.bfloat16, torch.float16]

of_each_format = pytest.mark.parametrize("dtype", HALVES, ids=str)
of_each_target = pytest.mark.parametrize("target", TARGETS)


def every(dtype: torch.dtype) -> Tensor:
    """Every pattern of bits."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


def step(param: Tensor, master: Tensor, grad: Tensor, lr: float, target: str) -> None:
    """One step of plain SGD on master weights."""
    group = {"params": [0], "lr": lr, "master_weights": True}
    Plan("sgd", target=target).step([param], [grad], {"master": [master]}, [None], [group])


@of_each_target
@of_each_format
def test_every_gradient_is_read_exactly(dtype: torch.dtype, target: str) -> None:
    """From zero and at rate 1 the new weights are the gradient, negated."""
    grad = every(dtype)
    param, master = torch.zeros_like(grad), torch.zeros(grad.shape)
    step(param, master, grad, 1.0, target)
    np.testing.assert_array_equal(master.numpy(), -grad.float().numpy())
    np.testing.assert_array_equal(param.float().numpy(), -grad.float().numpy())


@of_each_target
@of_each_format
def test_weights_round_to_the_nearest_and_ties_to_even(dtype: torch.dtype, target: str) -> None:
    """As torch rounds: each pattern, what lies halfway to its neighbours, and next to that."""
    exact = every(dtype).float()
    bits = exact.view(torch.int32)
    half = 1 << (15 if dtype == torch.bfloat16 else 12)
    around = [bits + offset for offset in (0, 1, half - 1, half, half + 1)]
    if dtype == torch.float16:  # subnormal: halfway between multiples of 2^-24
        multiples = torch.arange(1 << 11) * 2.0**-25
        around += [multiples.view(torch.int32) + offset for offset in (-1, 0, 1)]
    master = torch.cat(around).view(torch.float32)
    master = torch.cat([master, -master])
    param, before = torch.zeros(master.shape, dtype=dtype), master.clone()
    step(param, master, torch.zeros_like(param), 0.0, target)
    expected = before.to(dtype)
    number = ~expected.isnan()
    assert torch.equal(master.view(torch.int32)[number], before.view(torch.int32)[number]), "lr 0"
    assert torch.equal(param.isnan(), ~number)
    assert torch.equal(param.view(torch.int16)[number], expected.view(torch.int16)[number])


@of_each_target
@of_each_format
def test_weights_come_back_as_they_were(dtype: torch.dtype, target: str) -> None:
    param = every(dtype)
    before = param.clone()
    group = {"params": [0], "lr": 0.0}
    Plan("sgd", target=target).step([param], [torch.zeros_like(param)], {}, [None], [group])
    number = ~before.isnan()
    assert torch.equal(param.view(torch.int16)[number], before.view(torch.int16)[number])
    assert param[~number].isnan().all()
