"""The papers' solvers at one setting: plain, layer-wise, or layer-wise and bounded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

import date_kernels
from date_optim import DATE, LARS, SGD, Adadelta, Adagrad, Adam, RMSprop
from date_optim.optimizer import LayerwiseOptimizer

PLAIN: Mapping[str, tuple[type[LayerwiseOptimizer], dict[str, Any]]] = {
    "momentum": (SGD, {"momentum": 0.9}),
    "adagrad": (Adagrad, {}),
    "rmsprop": (RMSprop, {}),
    "adam": (Adam, {}),
    "adadelta": (Adadelta, {}),
}
"""By DATE's names of rules."""

OWN_RATIO: Mapping[str, type[LayerwiseOptimizer]] = {"lars": LARS}

Trust = str | list[float] | None
"""None, ``"layer-wise"``, or two bounds."""


def backend_for(device: str) -> str:
    """Name the kernels that step on a device.

    Raises
    ------
    RuntimeError
        If there are none, so that the reference would take their place.
    """
    backends = date_kernels.info().backends
    names = ("cpu",) if device == "cpu" else ("triton", "cuda")
    for name in names:
        if backends[name] is None:
            return name
    whys = "; ".join(f"{name}: {backends[name]}" for name in names)
    raise RuntimeError(f"the studies train through native kernels, which are not there: {whys}")


def make_optimizer(
    solver: str, trust: Trust, params: Iterable[tuple[str, nn.Parameter]], **options: Any
) -> LayerwiseOptimizer:
    """Make an optimizer of the papers' tables.

    Parameters
    ----------
    solver : str
        A key of `PLAIN` or `OWN_RATIO`.
    trust : None, "layer-wise" or [lower, upper]
        DATE's ratio for a key of `PLAIN`; None for one of `OWN_RATIO`, which has its own.
    params : iterable of (name, parameter)
    **options
        Of the optimizer's class.
    """
    if solver in OWN_RATIO:
        if trust is not None:
            raise ValueError(f"{solver} has a trust ratio of its own, got trust={trust!r}")
        return OWN_RATIO[solver](params, **options)
    if trust is None:
        kind, defaults = PLAIN[solver]
        return kind(params, **{**defaults, **options})
    lower, upper = (0.0, math.inf) if trust == "layer-wise" else map(float, trust)
    return DATE(params, solver, lower=lower, upper=upper, **options)
