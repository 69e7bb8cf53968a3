"""Runs of our optimizers beside torch.optim's, and what ours are held to.

Note [Twice torch's own error]. Over many steps the yardstick is torch itself: the same run by
torch.optim's for-loop in a run's dtype and in float64, both from the same weights and gradients of
that dtype. Ours may lie at most twice as far from the float64 run as torch's does, measured as the
Euclidean distance over all parameters together. In float64 ours is to be torch's to 1e-12. The
gradients are given, not computed from the parameters, so that no run amplifies its own errors.

Note [Options for 16 bits]. torch keeps states in 16 bits. In float16 the square of a gradient
below 2e-4 vanishes, an average of squares sooner, and an eps of 1e-8 is 0: torch divides by 0. In
bfloat16 an average with a constant of 0.999 stands still, since 0.001 of it is below half an ulp;
and updates below half an ulp of the weight are lost. What torch is far off at is no yardstick: its
16-bit runs have an eps of at least 1e-3, a beta2 of at most 0.95 and a rate of 0.1.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Options, random_tensors
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from date_kernels.layers import HALF
from date_kernels.testing import assert_close
from date_optim import SGD, Adadelta, Adagrad, Adam, AdamW, RMSprop, TrustRatio
from date_optim.optimizer import LayerwiseOptimizer

SHAPES = [(60, 33), (33,), (), (5, 4, 3, 3), (0, 4), (500,)]
STEPS = 50

Make = Callable[[list[Parameter]], Optimizer]
BeforeStep = Callable[[int, Optimizer], Optimizer | None]
"""May change the optimizer before step `i`, or return another to go on with."""

TWINS: dict[str, tuple[type[LayerwiseOptimizer], type[Optimizer]]] = {
    "SGD": (SGD, torch.optim.SGD),
    "RMSprop": (RMSprop, torch.optim.RMSprop),
    "Adagrad": (Adagrad, torch.optim.Adagrad),
    "Adam": (Adam, torch.optim.Adam),
    "AdamW": (AdamW, torch.optim.AdamW),
    "Adadelta": (Adadelta, torch.optim.Adadelta),
}
"""By torch's name: our class and torch's."""

FULL: dict[str, Options] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.01},
    "SGD-nesterov": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    "RMSprop": {"lr": 0.01, "momentum": 0.9, "centered": True, "eps": 1e-2},
    "Adagrad": {"lr": 0.05, "lr_decay": 0.05, "initial_accumulator_value": 0.1, "eps": 1e-3},
    "Adam": {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "amsgrad": True, "weight_decay": 0.1},
    "AdamW": {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.1},
    "Adadelta": {"lr": 0.5, "rho": 0.8, "eps": 1e-3, "weight_decay": 0.1},
}
"""Options for each class, as many as go together."""


def fit_for(dtype: torch.dtype, name: str, options: Options) -> Options:
    """Return options with which torch runs in the dtype: Note [Options for 16 bits]."""
    if dtype not in HALF:
        return options
    defaults = inspect.signature(TWINS[name][1]).parameters
    every = {key: options.get(key, defaults[key].default) for key in defaults}
    fit: Options = {**options, "lr": 0.1}
    if isinstance(every["lr"], Tensor):
        fit["lr"] = torch.full_like(every["lr"], 0.1)
    if "eps" in every:
        fit["eps"] = max(every["eps"], 1e-3)
    if "betas" in every:
        beta1, beta2 = every["betas"]
        fit["betas"] = (beta1, beta2 if beta2 <= 0.95 else 0.95)
    return fit


BUFFER = ("momentum", "dampening", "nesterov")
"""The options of a momentum buffer."""

every_full = pytest.mark.parametrize(
    ("name", "options"), [(key.split("-", maxsplit=1)[0], FULL[key]) for key in FULL], ids=FULL
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["f64", "f32", "bf16", "f16"])


def both(name: str, **options: Any) -> tuple[Make, Make]:
    """Return how to make our optimizer and torch's for-loop one."""
    ours, twin = TWINS[name]
    return (
        lambda params: ours(params, **options),
        lambda params: twin(params, **{"foreach": False, **options}),
    )


def give(params: list[Parameter], grads: list[Tensor]) -> None:
    """Give each parameter its gradient, in its dtype or as it is."""
    for param, grad in zip(params, grads, strict=True):
        param.grad_dtype = None  # a 16-bit parameter may have a float32 gradient
        param.grad = grad


def run(
    make: Make,
    dtype: torch.dtype,
    *,
    inputs: torch.dtype | None = None,
    grad_dtype: torch.dtype | None = None,
    steps: int = STEPS,
    before_step: BeforeStep = lambda i, optimizer: None,
    absent: Callable[[int, int], bool] = lambda i, n: False,
) -> tuple[Optimizer, list[Tensor]]:
    """Train on given gradients and return the optimizer and the weights.

    Parameters
    ----------
    dtype : torch.dtype
        Of the parameters, and of the gradients unless `grad_dtype` is given.
    inputs : torch.dtype, optional
        What initial weights and gradients are rounded to first.
    absent : callable
        ``absent(step, parameter)`` tells which gradients are None.
    """

    def tensors(seed: int, dtype: torch.dtype) -> list[Tensor]:
        return [tensor.to(dtype) for tensor in random_tensors(SHAPES, seed, inputs or dtype)]

    params = [Parameter(weight) for weight in tensors(0, dtype)]
    optimizer = make(params)
    for i in range(steps):
        give(params, tensors(i + 1, grad_dtype or dtype))
        for n, param in enumerate(params):
            if absent(i, n):
                param.grad = None
        optimizer = before_step(i, optimizer) or optimizer
        optimizer.step()
    return optimizer, [param.detach() for param in params]


def train(make: Make, dtype: torch.dtype, **kwargs: Any) -> list[Tensor]:
    """Return the weights of a `run`."""
    return run(make, dtype, **kwargs)[1]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Return the Euclidean distance over all parameters together."""
    pairs = zip(a, b, strict=True)
    return math.sqrt(sum(float((x.double() - y.double()).square().sum()) for x, y in pairs))


def assert_within_twice(ours: list[Tensor], twin: list[Tensor], exact: list[Tensor]) -> None:
    """See Note [Twice torch's own error]."""
    error, allowed = distance(ours, exact), 2 * distance(twin, exact)
    moved = distance(exact, random_tensors(SHAPES, 0))
    assert 0 < allowed < moved, f"torch's own error is no yardstick: {allowed} of {moved}"
    assert error <= allowed, f"error {error:.3g} exceeds twice torch's own, {allowed:.3g}"


def assert_torchs(mine: list[Tensor], twin: Make, dtype: torch.dtype, **kwargs: Any) -> None:
    """Hold the weights of our run to the twin's."""
    exact = train(twin, torch.float64, inputs=dtype, **kwargs)
    if dtype == torch.float64:
        for i, (x, e) in enumerate(zip(mine, exact, strict=True)):
            largest = float(e.abs().max()) if e.numel() else 0.0
            assert_close(x.numpy(), e.numpy(), 1e-12 * largest, f"params[{i}]")
    else:
        assert_within_twice(mine, train(twin, dtype, **kwargs), exact)


def assert_parity(ours: Make, twin: Make, dtype: torch.dtype, **kwargs: Any) -> None:
    """Hold our run to the twin's."""
    assert_torchs(train(ours, dtype, **kwargs), twin, dtype, **kwargs)


def torch_ratio(trust: TrustRatio, w: Tensor, g: Tensor, u: Tensor, decay: float) -> float:
    """Return the bounded ratio that torch's own norms give."""
    weight_norm = float(w.norm())
    if trust.of == "update":
        measured = float(u.norm())
    elif trust.weight_decay == "combined":
        measured = float((g + decay * w).norm())
    else:
        added = decay * weight_norm if trust.weight_decay == "added" else 0.0
        measured = float(g.norm()) + added
    raw = trust.coefficient * weight_norm / (measured + trust.eps) if weight_norm * measured else 1
    return min(max(raw, trust.lower), trust.upper)


def fed_twin(
    name: str,
    options: Options,
    trust: TrustRatio,
    place: str = "gradient",
    form: str = "outside",
    excluded: Callable[[Tensor], bool] = lambda param: False,
) -> Make:
    """Return how to make torch's SGD, fed with the ratio times the rule's own direction.

    The direction is what torch's optimizer takes off weights of 0 at a rate of 1. With the ratio
    inside the buffer that optimizer has no momentum, and SGD has it. The rate stands in the group
    as ``"rate"``; see `set_rate`.
    """
    momentum = {key: options[key] for key in BUFFER if key in options} if form != "outside" else {}
    own = {key: value for key, value in options.items() if key not in momentum}

    def make(params: list[Parameter]) -> Optimizer:
        zeros = [Parameter(torch.zeros_like(param)) for param in params]
        _, rule_of = both(name, **{**own, "lr": 1.0, "weight_decay": 0.0})
        rule = rule_of(zeros)
        sgd = torch.optim.SGD(params, foreach=False, **momentum)
        (group,) = sgd.param_groups
        group["rate"] = options["lr"]

        def feed(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            rate = group["rate"]
            group["lr"] = 1.0 if form == "inside" else rate
            decays = [0.0 if excluded(p) else options.get("weight_decay", 0.0) for p in params]
            for param, zero, decay in zip(params, zeros, decays, strict=True):
                g, w = param.grad, param.detach()
                assert g is not None
                zero.data.zero_()
                zero.grad = g + decay * w if place == "gradient" else g.clone()
            rule.step()
            for param, zero, decay in zip(params, zeros, decays, strict=True):
                g, w = param.grad, param.detach()
                assert g is not None
                u = decay * w - zero.detach() if place == "update" else -zero.detach()
                ratio = 1.0 if excluded(param) else torch_ratio(trust, w, g, u, decay)
                if place == "weights":
                    w *= 1 - rate * decay
                param.grad = (rate * ratio if form == "inside" else ratio) * u

        sgd.register_step_pre_hook(feed)
        return sgd

    return make


def set_rate(i: int, optimizer: Optimizer) -> None:
    """Give every group the rate of step `i`."""
    for group in optimizer.param_groups:
        rate = 0.01 * (1 + i % 7)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)  # in place, as torch's schedulers do
        else:
            group["rate" if "rate" in group else "lr"] = rate
