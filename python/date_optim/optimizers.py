"""torch.optim's classes on the fused layer-wise step, and presets that only change defaults.

Note [Layer-wise arguments]. Beside torch's arguments every class here takes

trust : TrustRatio, optional
    The layer-wise bounded trust ratio; None is the plain rule, equal to torch.optim.
exclude : None, "1d" or callable
    Layers with ratio 1 and no weight decay: none, those with ndim <= 1, or those for which
    ``exclude(name or None, parameter)`` is true. Resolved when a param group is added; a predicate
    is not kept.
max_grad_norm : float, optional
    Clip the Euclidean norm over all gradients of the optimizer to it first; the same in every
    group.
momentum_scaling : {"outside", "inside", "ratio_inside"}
    Where learning rate and ratio stand: both outside the momentum buffer (TensorFlow), both inside
    it (LARS paper, TPU, optax), or the ratio alone (timm, LARC). They differ where the rate or the
    ratio changes.
on_nonfinite : {"propagate", "skip"}
    ``"propagate"`` does as torch. ``"skip"``: a non-finite gradient anywhere changes nothing at
    all, and a layer whose norm is not finite for another reason stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .optimizer import Exclude, LayerwiseOptimizer
from .trust_ratio import TrustRatio


class SGD(LayerwiseOptimizer):
    """SGD, momentum and Nesterov with the bounded trust ratio.

    torch.optim.SGD's arguments, defaults and state keys (its documentation gives the formulas),
    with ``w -= lr * r * u`` for the layer's trust ratio r. A step moves at least 12 bytes per
    parameter, 20 with momentum; 8 more with trust where a layer does not stay in the cache.

    Parameters
    ----------
    params : iterable
        float32 tensors on the CPU, (name, tensor) pairs, or dicts of a param group.
    lr : float or one-element Tensor
        Learning rate, at least 0.
    momentum : float
        At least 0.
    dampening : float
        The buffer takes ``(1 - dampening)`` of the gradient, after the first step.
    weight_decay : float
        L2: ``weight_decay * w`` is added to the gradient.
    nesterov : bool
        Needs momentum and no dampening.
    maximize : bool
        Ascend.
    foreach, fused : bool, optional
        Accepted as torch does; the step is always one native call.
    capturable, differentiable : bool
        Refused where true.
    trust, exclude, max_grad_norm, momentum_scaling, on_nonfinite
        See Note [Layer-wise arguments] in `date_optim.optimizers`.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        For arguments out of their range or at odds with each other.

    Examples
    --------
    >>> import torch, date_optim
    >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> opt = date_optim.SGD([w], lr=0.1, trust=date_optim.TrustRatio(upper=1.0))
    >>> w.grad = torch.tensor([0.0, 2.0])
    >>> opt.step()
    >>> opt.read_telemetry()["0.0"].raw_ratio  # ||w|| / ||g||
    2.5
    """

    rule = "sgd"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        trust: TrustRatio | None = None,
        exclude: Exclude = None,
        max_grad_norm: float | None = None,
        momentum_scaling: str = "outside",
        on_nonfinite: str = "propagate",
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "maximize": maximize,
                "foreach": foreach,
                "differentiable": differentiable,
                "fused": fused,
                "capturable": capturable,
                "trust": trust,
                "exclude": exclude,
                "max_grad_norm": max_grad_norm,
                "momentum_scaling": momentum_scaling,
                "on_nonfinite": on_nonfinite,
            },
        )


class RMSprop(LayerwiseOptimizer):
    """RMSprop with the bounded trust ratio.

    torch.optim.RMSprop's arguments, defaults and state keys, with ``w -= lr * r * u``. A step moves
    at least 20 bytes per parameter, 8 more each with momentum and centered; 8 more with trust where
    a layer does not stay in the cache. TensorFlow 1's rule, which the papers ran, is ``alpha=0.9,
    eps=1e-10, eps_inside_sqrt=True, initial_square_avg=1``. The centered variance is never below 0
    (torch may take the root of a negative rounding error).

    Parameters
    ----------
    params : iterable
        float32 tensors on the CPU, (name, tensor) pairs, or dicts of a param group.
    lr : float or one-element Tensor
        Learning rate, at least 0.
    alpha : float
        Smoothing constant of the squared gradient, in [0, 1).
    eps : float
        Added to the root, or inside it with `eps_inside_sqrt`.
    weight_decay : float
        L2: ``weight_decay * w`` is added to the gradient.
    momentum : float
        At least 0.
    centered : bool
        Divide by the root of the gradient's variance.
    capturable, differentiable : bool
        Refused where true.
    foreach, fused : bool, optional
        Accepted as torch does; the step is always one native call.
    maximize : bool
        Ascend.
    eps_inside_sqrt : bool
        ``sqrt(v + eps)`` instead of ``sqrt(v) + eps``.
    initial_square_avg : float
        What v starts from.
    trust, exclude, max_grad_norm, momentum_scaling, on_nonfinite
        See Note [Layer-wise arguments] in `date_optim.optimizers`.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        For arguments out of their range or at odds with each other.
    """

    rule = "rmsprop"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        fused: bool | None = None,
        eps_inside_sqrt: bool = False,
        initial_square_avg: float = 0,
        trust: TrustRatio | None = None,
        exclude: Exclude = None,
        max_grad_norm: float | None = None,
        momentum_scaling: str = "outside",
        on_nonfinite: str = "propagate",
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "alpha": alpha,
                "eps": eps,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "centered": centered,
                "capturable": capturable,
                "foreach": foreach,
                "maximize": maximize,
                "differentiable": differentiable,
                "fused": fused,
                "eps_inside_sqrt": eps_inside_sqrt,
                "initial_square_avg": initial_square_avg,
                "trust": trust,
                "exclude": exclude,
                "max_grad_norm": max_grad_norm,
                "momentum_scaling": momentum_scaling,
                "on_nonfinite": on_nonfinite,
            },
        )


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
        if "trust" in options:
            raise TypeError(
                "LARS has its own trust ratio: pass coefficient=, lower=, upper=, or use SGD"
            )
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


_SOLVERS: dict[str, tuple[Callable[..., LayerwiseOptimizer], dict[str, Any]]] = {
    "sgd": (SGD, {}),
    "momentum": (SGD, {"momentum": 0.9}),
    "nesterov": (SGD, {"momentum": 0.9, "nesterov": True}),
    "rmsprop": (RMSprop, {}),
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
    rule : {"sgd", "momentum", "nesterov", "rmsprop"}
        The base solver.
    lower, upper : float
        Bounds of the ratio.
    **options
        Any other argument of the solver's class, but ``trust``.

    Returns
    -------
    SGD or RMSprop

    Raises
    ------
    ValueError, TypeError, RuntimeError
        For an unknown rule or ``trust=``, and as the class.
    """
    if rule not in _SOLVERS:
        raise ValueError(f"rule {rule!r} is unknown; there are {', '.join(_SOLVERS)}")
    if "trust" in options:
        raise TypeError(
            "DATE has its own trust ratio: pass lower=, upper=, or use the class with trust="
        )
    solver, defaults = _SOLVERS[rule]
    return solver(params, trust=TrustRatio(lower=lower, upper=upper), **{**defaults, **options})
