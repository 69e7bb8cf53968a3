"""Whether a contestant computes what it should, before it is timed."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .contestants import Contestant, Params, by_backend
from .measure import failure
from .models import parameters

SHAPES = ((64, 3, 7, 7), (64,), (300, 500), (1000,))
"""A layer of several chunks, one of a tail, vectors."""

STEPS = 3

ROUNDINGS = 32
"""Roundings in a row that an element of an update may see, more than any formula here has."""

PEERS_ROUNDINGS = 1000
"""Of others: a bias correction ``1 - 0.999**k`` in float32, as in torch's compiled step, errs by a
rounding of its 1."""

OPTIONS: tuple[dict[str, float], ...] = ({}, {"lr": 0.1, "weight_decay": 0.5})
"""Those that are timed; and others, by which a decay that is not there shows."""


def why_not(contestant: Contestant, device: str) -> str | None:
    """Return why a contestant cannot be timed here, None where it can.

    A few float32 steps are held to the float64 reference by the call of ours that computes the
    same: each layer's error, in the Euclidean norm, is at most that of `ROUNDINGS`, for others
    `PEERS_ROUNDINGS`, of its way from where it began, and one of its weights each step.

    Parameters
    ----------
    contestant : Contestant
    device : {"cpu", "cuda"}
    """
    return next(filter(None, (_why_not(contestant, device, each) for each in OPTIONS)), None)


def _why_not(contestant: Contestant, device: str, options: Mapping[str, float]) -> str | None:
    try:
        found = _steps(contestant, device, options)
    except ImportError as raised:
        return f"fails to import: {raised}"
    except Exception as raised:  # whatever another package raises is a row of the table
        return failure(raised)
    expected = _truth(contestant, options)
    start = [param.detach().double() for param in parameters(SHAPES, "cpu")]
    rounding = torch.finfo(torch.float32).eps / 2
    roundings = ROUNDINGS if contestant.is_ours else PEERS_ROUNDINGS
    for i, (a, b, w) in enumerate(zip(found, expected, start, strict=True)):
        error = float((a.detach().cpu().double() - b.detach()).norm())
        way = float((b.detach() - w).norm())
        allowed = rounding * (roundings * way + STEPS * float(w.norm() + way))
        if not error <= allowed:
            told = "".join(f", {key}={value}" for key, value in options.items())
            return (
                f"wrong result: after {STEPS} steps{told} a layer of shape {tuple(SHAPES[i])} is "
                f"{error / way:.1e} of its way from the reference; {allowed / way:.1e} is allowed"
            )
    return None


def _gradients(i: int) -> Params:
    # DATE's ratio is within its bounds for them.
    return [(4 + i) * param.grad for param in parameters(SHAPES, "cpu") if param.grad is not None]


def _steps(contestant: Contestant, device: str, options: Mapping[str, float]) -> Params:
    params = parameters(SHAPES, device)
    optimizer = contestant.make(params, **options)
    for i in range(STEPS):
        for param, gradient in zip(params, _gradients(i), strict=True):
            param.grad = gradient.to(device)
        optimizer.step()
    return params


def _truth(contestant: Contestant, options: Mapping[str, float]) -> Params:
    params: Params = [
        torch.nn.Parameter(param.detach().double()) for param in parameters(SHAPES, "cpu")
    ]
    optimizer = by_backend(contestant.same, "reference", params, **options)
    for i in range(STEPS):
        for param, gradient in zip(params, _gradients(i), strict=True):
            param.grad = gradient.double()
        optimizer.step()
    return params
