"""Presets: the papers' optimizers, as classes that only change defaults."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .optimizer import Exclude, LayerwiseOptimizer
from .optimizers import SGD, Adadelta, Adagrad, Adam, RMSprop
from .trust_ratio import TrustRatio


class LARS(SGD):
    """LARS: SGD with its defaults changed (You, Gitman, Ginsburg 2017).

    "Large Batch Training of Convolutional Networks":
    ``r = coefficient * ||w|| / (||g|| + weight_decay * ||w||)``, learning rate and ratio inside the
    momentum buffer, biases and norm layers excluded.

    Parameters
    ----------
    params, lr, momentum, dampening, weight_decay, nesterov
        As `SGD`; momentum is 0.9.
    coefficient, lower, upper : float
        Of the trust ratio: 0.001, and no bounds.
    exclude, momentum_scaling
        As `SGD`; ``"1d"`` and ``"inside"``.
    **options
        Any other argument of `SGD`, but ``trust``.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As `SGD`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        coefficient: float = 0.001,
        lower: float = 0.0,
        upper: float = math.inf,
        exclude: Exclude = "1d",
        momentum_scaling: str = "inside",
        **options: Any,
    ) -> None:
        _refuse_trust(options, "LARS", "coefficient=, lower=, upper=, or use SGD")
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            trust=TrustRatio(coefficient, lower, upper, weight_decay="added"),
            exclude=exclude,
            momentum_scaling=momentum_scaling,
            **options,
        )


class LAMB(Adam):
    """LAMB: Adam with its defaults changed (You et al. 2019).

    "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes":
    ``r = coefficient * ||w|| / ||u||`` for the whole update u, weight decay included; biases and
    norm layers excluded.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay, amsgrad
        As `Adam`; eps is 1e-6.
    coefficient, lower, upper : float
        Of the trust ratio: 1, and no bounds.
    exclude, weight_decay_in
        As `Adam`; ``"1d"`` and ``"update"``.
    **options
        Any other argument of `Adam`, but ``trust``.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As `Adam`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        coefficient: float = 1.0,
        lower: float = 0.0,
        upper: float = math.inf,
        exclude: Exclude = "1d",
        weight_decay_in: str = "update",
        **options: Any,
    ) -> None:
        _refuse_trust(options, "LAMB", "coefficient=, lower=, upper=, or use Adam")
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            trust=TrustRatio(coefficient, lower, upper, of="update"),
            exclude=exclude,
            weight_decay_in=weight_decay_in,
            **options,
        )


def _refuse_trust(options: dict[str, Any], name: str, instead: str) -> None:
    if "trust" in options:
        raise TypeError(f"{name} has its own trust ratio: pass {instead}")


_SOLVERS: dict[str, tuple[Callable[..., LayerwiseOptimizer], dict[str, Any]]] = {
    "sgd": (SGD, {}),
    "momentum": (SGD, {"momentum": 0.9}),
    "nesterov": (SGD, {"momentum": 0.9, "nesterov": True}),
    "adagrad": (Adagrad, {}),
    "rmsprop": (RMSprop, {}),
    "adam": (Adam, {}),
    "adadelta": (Adadelta, {}),
}


def DATE(  # noqa: N802 - the paper's name
    params: ParamsT,
    rule: str = "rmsprop",
    *,
    lower: float = 0.1,
    upper: float = 1.0,
    **options: Any,
) -> LayerwiseOptimizer:
    """DATE: a base solver with the bounded trust ratio ``||w|| / ||g||`` of each layer.

    You et al. 2019, "Large-Batch Training for LSTM and Beyond", Algorithm 1.
    The paper gives no bounds; [0.1, 1] is this project's choice.

    Parameters
    ----------
    params : iterable
        As torch.optim.
    rule : {"sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam", "adadelta"}
        The base solver, one of the paper's seven.
    lower, upper : float
        Bounds of the ratio.
    **options
        Any other argument of the solver's class, but ``trust``.

    Returns
    -------
    SGD, Adagrad, RMSprop, Adam or Adadelta

    Raises
    ------
    ValueError, TypeError, RuntimeError
        For an unknown rule or ``trust=``, and as the class.
    """
    if rule not in _SOLVERS:
        raise ValueError(f"rule {rule!r} is unknown; there are {', '.join(_SOLVERS)}")
    _refuse_trust(options, "DATE", "lower=, upper=, or use the class with trust=")
    solver, defaults = _SOLVERS[rule]
    return solver(params, trust=TrustRatio(lower=lower, upper=upper), **{**defaults, **options})
