"""What a training run looks like from where its weights are: curvature, and the way they went."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

__all__ = ["Curvature", "Distance", "curvature_along_gradient"]


@dataclass(frozen=True)
class Curvature:
    """What `curvature_along_gradient` found.

    Attributes
    ----------
    value : float
        ``g'Hg / ||g||^2``; NaN where the gradient is zero.
    gradient_norm : float
        ``||g||`` over all parameters.
    """

    value: float
    gradient_norm: float


def curvature_along_gradient(
    params: Iterable[Tensor], loss: Callable[[], Tensor], step: float | None = None
) -> Curvature:
    r"""Measure the curvature of a loss along its own gradient.

    ``L(x, g) = g'Hg / ||g||^2``, which bounds the learning rate of a gradient step. LEGW (You et
    al. 2019, section 4) finds that it peaks early in a run, and the later the larger the batch: why
    a large batch needs a longer warm-up. The product with the Hessian is the central difference of
    the gradients at ``x + h g/||g||`` and ``x - h g/||g||``.

    Parameters
    ----------
    params : iterable of Tensor
        Those that the loss depends on; they keep their values to the bit, and their ``grad``.
    loss : callable
        Returns the loss at the parameters' values as they are, without side effects: put a model
        with batch norm in evaluation mode. Random numbers, as a dropout's, are the same in each of
        its three calls, and the generators of torch are left as they were found.
    step : float, optional
        ``h`` above, a length in the space of all parameters; by default the cube root of their
        dtype's epsilon, times their norm where it is not zero, which balances what rounding and
        what the third derivative add.

    Raises
    ------
    ValueError
        If there are no parameters, or `step` is not positive.

    Examples
    --------
    >>> x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    >>> found = curvature_along_gradient([x], lambda: (x[0] ** 2 + 4 * x[1] ** 2) / 2)
    >>> round(found.value, 6), round(found.gradient_norm, 6)
    (3.823529, 4.123106)
    """
    params = list(params)
    if not params:
        raise ValueError("curvature_along_gradient got no parameters")
    if step is not None and not step > 0:
        raise ValueError(f"step must be positive, got {step}")
    gradient = _gradient(params, loss)
    norm = sqrt(_dot(gradient, gradient))
    if norm == 0:
        return Curvature(float("nan"), norm)
    if step is None:
        epsilon = max(torch.finfo(param.dtype).eps for param in params)
        step = float(epsilon ** (1 / 3) * (sqrt(_dot(params, params)) or 1.0))
    start = [param.detach().clone() for param in params]
    ends = []
    try:
        for sign in (1, -1):
            with torch.no_grad():
                for param, value, each in zip(params, start, gradient, strict=True):
                    param.copy_(value + (sign * step / norm) * each)
            ends.append(_gradient(params, loss))
    finally:
        with torch.no_grad():
            for param, value in zip(params, start, strict=True):
                param.copy_(value)
    along = [_dot(end, gradient) for end in ends]
    return Curvature((along[0] - along[1]) / (2 * step * norm), norm)


class Distance:
    """How far parameters are from where they were when this was made.

    LIMIT (You et al.) plots it: a large batch that does not train stays near its start.

    Parameters
    ----------
    params : iterable of (name, Tensor)
        As ``named_parameters()``.
    start : mapping of str to Tensor, optional
        Where they were, if not where they are: the attribute of an earlier one, whose run goes on.

    Attributes
    ----------
    start : dict of str to Tensor
        Copies by name.
    """

    def __init__(
        self, params: Iterable[tuple[str, Tensor]], start: Mapping[str, Tensor] | None = None
    ) -> None:
        self._params = dict(params)
        found = self._params if start is None else start
        self.start = {name: found[name].detach().clone() for name in self._params}

    def layers(self) -> dict[str, float]:
        """Return each parameter's Euclidean distance, by name."""
        return {
            name: float((param.detach().double() - self.start[name].double()).norm())
            for name, param in self._params.items()
        }

    def total(self) -> float:
        """Return the Euclidean distance in the space of all of them."""
        return sqrt(sum(each**2 for each in self.layers().values()))


def _gradient(params: Sequence[Tensor], loss: Callable[[], Tensor]) -> Sequence[Tensor]:
    devices = sorted({param.device.index for param in params if param.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        return torch.autograd.grad(loss(), params)


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    with torch.no_grad():
        return float(sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)))
