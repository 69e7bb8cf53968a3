"""Whether a contestant computes what it should, before it is timed."""

from __future__ import annotations

import torch

from .contestants import Contestant, Params, by_backend
from .models import parameters

SHAPES = ((64, 3, 7, 7), (64,), (300, 500), (1000,))
"""A layer of several chunks, one of a tail, vectors."""

STEPS = 3

ROUNDINGS = 32
"""Roundings in a row that an element of a step may see, more than any formula here has."""


def why_not(contestant: Contestant, device: str) -> str | None:
    """Return why a contestant cannot be timed here, None where it can.

    A few float32 steps are held to the float64 reference by the call of ours that computes the
    same: each layer's error, in the Euclidean norm, is at most that of `ROUNDINGS` roundings of its
    weights and of its way.

    Parameters
    ----------
    contestant : Contestant
    device : {"cpu", "cuda"}
    """
    try:
        found = _steps(contestant, device)
    except ImportError as raised:
        return f"fails to import: {raised}"
    except Exception as raised:  # whatever another package raises is a row of the table
        return f"fails: {type(raised).__name__}: {raised}"
    expected = _truth(contestant)
    start = [param.detach().double() for param in parameters(SHAPES, "cpu")]
    allowed = ROUNDINGS * torch.finfo(torch.float32).eps / 2
    for i, (a, b, w) in enumerate(zip(found, expected, start, strict=True)):
        error = float((a.detach().cpu().double() - b.detach()).norm())
        scale = float(w.norm() + (b.detach() - w).norm())
        if not error <= allowed * scale:
            return (
                f"wrong result: after {STEPS} steps a layer of shape {tuple(SHAPES[i])} is "
                f"{error / scale:.1e} of its norm from the reference; {allowed:.1e} is allowed"
            )
    return None


def _gradients(i: int) -> Params:
    # DATE's ratio is within its bounds for them.
    return [(4 + i) * param.grad for param in parameters(SHAPES, "cpu") if param.grad is not None]


def _steps(contestant: Contestant, device: str) -> Params:
    params = parameters(SHAPES, device)
    optimizer = contestant.make(params)
    for i in range(STEPS):
        for param, gradient in zip(params, _gradients(i), strict=True):
            param.grad = gradient.to(device)
        optimizer.step()
    return params


def _truth(contestant: Contestant) -> Params:
    params: Params = [
        torch.nn.Parameter(param.detach().double()) for param in parameters(SHAPES, "cpu")
    ]
    optimizer = by_backend(contestant.same, "reference", params)
    for i in range(STEPS):
        for param, gradient in zip(params, _gradients(i), strict=True):
            param.grad = gradient.double()
        optimizer.step()
    return params
