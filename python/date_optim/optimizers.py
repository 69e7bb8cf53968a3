"""torch.optim's classes on the fused layer-wise step.

Parameters are float32, float64, bfloat16 or float16; arithmetic and states are float64 for float64,
else float32, unless `state_dtype` says another. A gradient has its parameter's dtype, or float32
beside a 16-bit parameter.

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
weight_decay_in : {"gradient", "update", "weights"}
    Where weight decay stands: added to the gradient (L2), added to the update as in LAMB, or taken
    off the weights by themselves, ``w -= lr * weight_decay * w``, as in AdamW.
master_weights : bool
    Keep a float32 copy of 16-bit parameters under the state key ``master``: norms and updates are
    of the copy, the parameter is its rounding. What else writes to such a parameter (weights
    loaded or swapped in, say) lasts one step at most, unless ``state[param]["master"]`` is deleted
    or written, too.
state_dtype : torch.dtype, optional
    What states are kept in: the dtype of the arithmetic (None), or of 16-bit parameters their own,
    which saves half of it; parameters of other dtypes need a param group without it. Each step
    computes in float32 and rounds what it stores, so that changes of a state smaller than its last
    bit are lost: an average of squares in bfloat16 with a decay of 0.999 hardly moves. Squares do
    not fit float16 and are refused. Master weights stay float32.
momentum_scaling : {"outside", "inside", "ratio_inside"}
    For rules with a momentum buffer: where learning rate and ratio stand. Both outside it
    (TensorFlow), both inside it (LARS paper, TPU, optax), or the ratio alone inside (timm, LARC).
    They differ where the rate or the ratio changes.
on_nonfinite : {"propagate", "skip"}
    ``"propagate"`` does as torch. ``"skip"``: a non-finite gradient anywhere changes nothing at
    all, and a layer whose norm is not finite for another reason stays as it is.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .optimizer import Layerwise, LayerwiseOptimizer

if sys.version_info >= (3, 11):
    from typing import Unpack
else:
    from typing_extensions import Unpack  # torch needs it


class SGD(LayerwiseOptimizer):
    """SGD, momentum and Nesterov with the bounded trust ratio.

    torch.optim.SGD's arguments, defaults and state keys (its documentation gives the formulas),
    with ``w -= lr * r * u`` for the layer's trust ratio r. A step moves at least 12 bytes per
    parameter, 20 with momentum; 8 more with trust where a layer does not stay in the cache.

    Parameters
    ----------
    params : iterable
        Tensors, (name, tensor) pairs, or dicts of a param group.
    lr : float or one-element Tensor
        Learning rate, at least 0.
    momentum : float
        At least 0.
    dampening : float
        The buffer takes ``(1 - dampening)`` of the gradient, after the first step.
    weight_decay : float
        Added to the gradient as ``weight_decay * w``, or see `weight_decay_in`.
    nesterov : bool
        Needs momentum and no dampening.
    maximize : bool
        Ascend.
    foreach, fused : bool, optional
        Accepted as torch does; the step is always one native call.
    capturable : bool
        Allow a CUDA graph to capture steps; refused on the CPU.
    differentiable : bool
        Refused where true.
    **layerwise
        ``trust=``, ``exclude=`` and others: Note [Layer-wise arguments] in `date_optim.optimizers`.

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
        **layerwise: Unpack[Layerwise],
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
            },
            layerwise,
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
        Tensors, (name, tensor) pairs, or dicts of a param group.
    lr : float or one-element Tensor
        Learning rate, at least 0.
    alpha : float
        Smoothing constant of the squared gradient, in [0, 1).
    eps : float
        Added to the root, or inside it with `eps_inside_sqrt`.
    weight_decay : float
        Added to the gradient as ``weight_decay * w``, or see `weight_decay_in`.
    momentum : float
        At least 0.
    centered : bool
        Divide by the root of the gradient's variance.
    capturable : bool
        Allow a CUDA graph to capture steps; refused on the CPU.
    differentiable : bool
        Refused where true.
    foreach, fused : bool, optional
        Accepted as torch does; the step is always one native call.
    maximize : bool
        Ascend.
    eps_inside_sqrt : bool
        ``sqrt(v + eps)`` instead of ``sqrt(v) + eps``.
    initial_square_avg : float
        What v starts from.
    **layerwise
        ``trust=``, ``exclude=`` and others: Note [Layer-wise arguments] in `date_optim.optimizers`.

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
        **layerwise: Unpack[Layerwise],
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
            },
            layerwise,
        )


class Adagrad(LayerwiseOptimizer):
    """AdaGrad (Duchi, Hazan, Singer 2011) with the bounded trust ratio.

    torch.optim.Adagrad's arguments, defaults and state keys, with ``w -= lr * r * u`` for
    ``u = d / (sqrt(sum) + eps)``. A step moves at least 20 bytes per parameter; where a layer does
    not stay in the cache 8 more with the ratio of the gradient, 12 with that of the update.
    TensorFlow 1's rule, which the papers ran, is ``initial_accumulator_value=0.1, eps=0``.

    Parameters
    ----------
    params : iterable
        Tensors, (name, tensor) pairs, or dicts of a param group.
    lr : float or one-element Tensor
        Learning rate, at least 0.
    lr_decay : float
        The rate of step k is ``lr / (1 + (k - 1) * lr_decay)``.
    weight_decay : float
        Added to the gradient as ``weight_decay * w``, or see `weight_decay_in`.
    initial_accumulator_value : float
        What the sum of squares starts from.
    eps : float
        Added to the root.
    maximize : bool
        Ascend.
    foreach, fused : bool, optional
        Accepted as torch does; the step is always one native call.
    capturable : bool
        Allow a CUDA graph to capture steps; refused on the CPU.
    differentiable : bool
        Refused where true.
    **layerwise
        ``trust=``, ``exclude=`` and others: Note [Layer-wise arguments] in `date_optim.optimizers`.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        For arguments out of their range or at odds with each other.
    """

    rule = "adagrad"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        **layerwise: Unpack[Layerwise],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "lr_decay": lr_decay,
                "weight_decay": weight_decay,
                "initial_accumulator_value": initial_accumulator_value,
                "eps": eps,
                "foreach": foreach,
                "maximize": maximize,
                "differentiable": differentiable,
                "fused": fused,
                "capturable": capturable,
            },
            layerwise,
        )


class Adam(LayerwiseOptimizer):
    """Adam (Kingma and Ba 2015) with the bounded trust ratio.

    torch.optim.Adam's arguments, defaults and state keys, with ``w -= lr * r * u`` for
    ``u = m_hat / (sqrt(v_hat) + eps)``. A step moves at least 28 bytes per parameter, 8 more with
    amsgrad; with trust, where a layer does not stay in the cache, 8 more for the ratio of the
    gradient and 12 for that of the update.

    Parameters
    ----------
    params : iterable
        Tensors, (name, tensor) pairs, or dicts of a param group.
    lr : float or one-element Tensor
        Learning rate, at least 0.
    betas : (float, float)
        Smoothing constants of the gradient and of its square, in [0, 1).
    eps : float
        Added to the root.
    weight_decay : float
        Added to the gradient as ``weight_decay * w``, or see `weight_decay_in`.
    amsgrad : bool
        Divide by the largest average of squares so far (Reddi, Kale, Kumar 2018).
    maximize : bool
        Ascend.
    decoupled_weight_decay : bool
        torch's word for ``weight_decay_in="weights"``.
    bias_correction : bool
        Divide the averages by ``1 - beta**k``; without it, and with the ratio of the update, the
        rule is the LAMB of ALBERT.
    foreach, fused : bool, optional
        Accepted as torch does; the step is always one native call.
    capturable : bool
        Allow a CUDA graph to capture steps; refused on the CPU.
    differentiable : bool
        Refused where true.
    **layerwise
        ``trust=``, ``exclude=`` and others: Note [Layer-wise arguments] in `date_optim.optimizers`.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        For arguments out of their range or at odds with each other.
    """

    rule = "adam"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        bias_correction: bool = True,
        **layerwise: Unpack[Layerwise],
    ) -> None:
        if decoupled_weight_decay:
            _decouple(layerwise)
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "amsgrad": amsgrad,
                "foreach": foreach,
                "maximize": maximize,
                "capturable": capturable,
                "differentiable": differentiable,
                "fused": fused,
                "bias_correction": bias_correction,
            },
            layerwise,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as every class here; it may say ``decoupled_weight_decay``, as torch's.

        Parameters
        ----------
        param_group : dict
            As `LayerwiseOptimizer.add_param_group`.
        """
        group = dict(param_group)
        decoupled = group.pop("decoupled_weight_decay", None)
        if decoupled:
            _decouple(group)
        elif decoupled is not None and self.defaults["weight_decay_in"] == "weights":
            group.setdefault("weight_decay_in", "gradient")
        super().add_param_group(group)

    def state_dict(self) -> dict[str, Any]:
        """Return the state; its groups say ``decoupled_weight_decay``, too, for torch.optim.Adam.

        Returns
        -------
        dict
            As torch.optim.
        """
        state: dict[str, Any] = super().state_dict()
        for group in state["param_groups"]:
            group["decoupled_weight_decay"] = group["weight_decay_in"] == "weights"
        return state


def _decouple(options: Any) -> None:
    """Say ``decoupled_weight_decay=True`` in our words."""
    if options.setdefault("weight_decay_in", "weights") != "weights":
        raise ValueError(
            "decoupled_weight_decay=True says weight_decay_in='weights', but it is "
            f"{options['weight_decay_in']!r}; leave one of the two out"
        )


class AdamW(Adam):
    """AdamW (Loshchilov and Hutter 2019): Adam with its weight decay taken off the weights.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable
        As `Adam`; weight_decay is 0.01.
    fused, bias_correction, **layerwise
        As `Adam`; ``weight_decay_in`` is ``"weights"``.

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
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        bias_correction: bool = True,
        **layerwise: Unpack[Layerwise],
    ) -> None:
        if "decoupled_weight_decay" in layerwise:  # Adam would take it
            raise TypeError("AdamW() got an unexpected keyword argument 'decoupled_weight_decay'")
        layerwise.setdefault("weight_decay_in", "weights")
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            bias_correction=bias_correction,
            **layerwise,
        )


class Adadelta(LayerwiseOptimizer):
    """Adadelta (Zeiler 2012) with the bounded trust ratio.

    torch.optim.Adadelta's arguments, defaults and state keys, with ``w -= lr * r * u`` for
    ``u = sqrt(acc_delta + eps) / sqrt(square_avg + eps) * d``; the average of ``u`` knows neither
    rate nor ratio. A step moves at least 28 bytes per parameter; with trust, where a layer does not
    stay in the cache, 8 more for the ratio of the gradient and 16 for that of the update.

    Parameters
    ----------
    params : iterable
        Tensors, (name, tensor) pairs, or dicts of a param group.
    lr : float or one-element Tensor
        Learning rate, at least 0.
    rho : float
        Smoothing constant of both averages, in [0, 1].
    eps : float
        Added inside both roots.
    weight_decay : float
        Added to the gradient as ``weight_decay * w``, or see `weight_decay_in`.
    maximize : bool
        Ascend.
    foreach, fused : bool, optional
        Accepted as torch does; the step is always one native call.
    capturable : bool
        Allow a CUDA graph to capture steps; refused on the CPU.
    differentiable : bool
        Refused where true.
    **layerwise
        ``trust=``, ``exclude=`` and others: Note [Layer-wise arguments] in `date_optim.optimizers`.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        For arguments out of their range or at odds with each other.
    """

    rule = "adadelta"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **layerwise: Unpack[Layerwise],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "rho": rho,
                "eps": eps,
                "weight_decay": weight_decay,
                "foreach": foreach,
                "capturable": capturable,
                "maximize": maximize,
                "differentiable": differentiable,
                "fused": fused,
            },
            layerwise,
        )


class Lion(LayerwiseOptimizer):
    """Lion (Chen et al. 2023) with the bounded trust ratio.

    ``w -= lr * r * u`` for ``u = sign(beta1 * m + (1 - beta1) * d)``, a direction of equal steps
    for all elements, whose norm alone says little: take the ratio of the update, as
    ``trust=TrustRatio(of="update")``. A step moves at least 20 bytes per parameter, 12 more with
    that ratio where a layer does not stay in the cache.

    Parameters
    ----------
    params : iterable
        Tensors, (name, tensor) pairs, or dicts of a param group.
    lr : float or one-element Tensor
        Learning rate, at least 0.
    betas : (float, float)
        Weights of the average in the direction and in its own update, in [0, 1).
    weight_decay : float
        Taken off the weights as in AdamW, or see `weight_decay_in`.
    maximize : bool
        Ascend.
    foreach, fused : bool, optional
        Accepted as torch does; the step is always one native call.
    capturable : bool
        Allow a CUDA graph to capture steps; refused on the CPU.
    differentiable : bool
        Refused where true.
    **layerwise
        ``trust=``, ``exclude=`` and others: Note [Layer-wise arguments] in `date_optim.optimizers`.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        For arguments out of their range or at odds with each other.
    """

    rule = "lion"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **layerwise: Unpack[Layerwise],
    ) -> None:
        layerwise.setdefault("weight_decay_in", "weights")
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "foreach": foreach,
                "capturable": capturable,
                "differentiable": differentiable,
                "fused": fused,
            },
            layerwise,
        )
