"""Curvature along the gradient and the distance from the start."""

from __future__ import annotations

import doctest
from math import isnan, sqrt

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from date_optim import diagnostics
from date_optim.diagnostics import Distance, curvature_along_gradient

GOLDEN = 3.823529411764706
"""Of (x1^2 + 4 x2^2)/2 at (1, 1): g = (1, 4), g'Hg = 65, ||g||^2 = 17."""


def quadratic(x: Tensor) -> Tensor:
    return (x[0] ** 2 + 4 * x[1] ** 2) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step", [None, 0.5])
def test_the_golden_value(dtype: torch.dtype, step: float | None) -> None:
    x = torch.ones(2, dtype=dtype, requires_grad=True)
    found = curvature_along_gradient([x], lambda: quadratic(x), step)
    # Gradients are linear, so that only rounding errs: of an epsilon of them, over the step.
    h = step or sqrt(2) * torch.finfo(dtype).eps ** (1 / 3)
    assert abs(found.value - GOLDEN) < 8 * torch.finfo(dtype).eps * sqrt(17) / h
    assert found.gradient_norm == pytest.approx(sqrt(17), rel=1e-7)


def test_a_hessian_of_autograd_agrees() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    inputs, labels = torch.randn(20, 5).double(), torch.randint(3, (20,))
    params = list(model.parameters())

    def loss() -> Tensor:
        return cross_entropy(model(inputs), labels)

    gradient = torch.autograd.grad(loss(), params, create_graph=True)
    squared = sum((each * each.detach()).sum() for each in gradient)
    assert isinstance(squared, Tensor)
    product = torch.autograd.grad(squared, params)
    with torch.no_grad():
        dot = sum((a * b).sum() for a, b in zip(product, gradient, strict=True))
    expected = float(dot / squared.detach())

    def error(step: float | None) -> float:
        return abs(curvature_along_gradient(params, loss, step).value - expected)

    # A central difference errs by the square of its step.
    assert error(2e-2) / error(1e-2) == pytest.approx(4, rel=1e-2)
    assert error(None) < error(1e-2) / 100


def test_nothing_is_left_behind() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Dropout(), nn.Linear(7, 1))
    inputs = torch.randn(20, 5)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    before = [param.detach().clone() for param in model.parameters()]
    state = torch.get_rng_state()

    def loss() -> Tensor:
        value: Tensor = model(inputs).square().mean()
        return value

    first = curvature_along_gradient(model.parameters(), loss)
    assert torch.equal(torch.get_rng_state(), state)
    assert curvature_along_gradient(model.parameters(), loss) == first
    for param, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(param, value)
        assert param.grad is not None
        assert torch.equal(param.grad, torch.ones_like(param))


def test_weights_are_restored_after_an_error() -> None:
    x = torch.ones(2, requires_grad=True)
    calls = iter([True, False])

    def loss() -> Tensor:
        if next(calls):
            return quadratic(x)
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        curvature_along_gradient([x], loss)
    assert torch.equal(x, torch.ones(2))


def test_no_gradient_no_curvature() -> None:
    x = torch.zeros(2, requires_grad=True)
    found = curvature_along_gradient([x], lambda: quadratic(x))
    assert isnan(found.value)
    assert found.gradient_norm == 0


def test_bad_arguments() -> None:
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="no parameters"):
        curvature_along_gradient([], lambda: quadratic(x))
    for step in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="step must be positive"):
            curvature_along_gradient([x], lambda: quadratic(x), step)


def test_distances() -> None:
    model = nn.Linear(2, 1)
    distance = Distance(model.named_parameters())
    assert distance.total() == 0
    with torch.no_grad():
        model.weight.add_(torch.tensor([[3.0, 4.0]]))
        model.bias.add_(12)
    # The weights are added to, which rounds.
    assert distance.layers() == pytest.approx({"weight": 5.0, "bias": 12.0}, rel=1e-6)
    assert distance.total() == pytest.approx(13.0, rel=1e-6)
    again = Distance(model.named_parameters(), distance.start)
    assert again.layers() == distance.layers()


def test_examples() -> None:
    found = doctest.testmod(diagnostics)
    assert found.attempted > 0
    assert found.failed == 0
