"""The bounded trust ratio as users write it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class TrustRatio:
    """The layer-wise factor on a step: a layer's weights beside its gradient, within bounds.

    ``r = clamp(coefficient * phi(||w||) / denominator, lower, upper)`` for each parameter tensor,
    with Euclidean norms of the whole tensor; the step is ``w -= lr * r * u``. ``TrustRatio()`` is
    DATE's ratio without bounds (You et al. 2019, "Large-Batch Training for LSTM and Beyond"); LARS
    (You, Gitman, Ginsburg 2017) is ``coefficient=0.001, weight_decay="added"``.

    It is a convenience of constructors: a param group stores each field as a plain scalar
    ``trust_<field>``, which may be changed between steps like a learning rate.

    Parameters
    ----------
    coefficient : float
        1 in DATE, 0.001 in LARS.
    lower, upper : float
        Constant bounds of the ratio, ``0 <= lower <= upper``.
    of : {"gradient", "update"}
        What the denominator is the norm of: LARS and DATE take the gradient, LAMB the whole update,
        weight decay in it included.
    weight_decay : {"ignored", "added", "combined"}
        How weight decay enters the denominator, for ``of="gradient"``: ``||g||`` (DATE), ``||g|| +
        decay*||w||`` (LARS), or ``||g + decay*w||`` (optax).
    bounds : {"constant", "adabound"}
        ``"adabound"`` moves them with the layer's step k: ``final*(1 - 1/(gamma*k + 1))`` and
        ``final*(1 + 1/(gamma*k))``.
    final, gamma : float, optional
        For ``bounds="adabound"``.
    eps : float
        Added to the denominator, after it was compared with zero.
    zero_norm : float
        The ratio, before bounding, of a layer whose weights or whose denominator have norm 0.
    weight_norm_bounds : (float, float), optional
        phi: bounds on ``||w||`` itself, as LAMB's paper allows; some implementations take (0, 10).
    clip_by_lr : bool
        Take ``min(r / lr, 1)`` before bounding, as LARC.
    skip_without_decay : bool
        Take ``r = 1`` where the weight decay is 0, as apex and timm.

    Raises
    ------
    ValueError
        By the optimizer that takes it, for values out of their range or at odds with each other.

    Examples
    --------
    >>> TrustRatio(lower=0.1, upper=1.0).upper
    1.0
    """

    coefficient: float = 1.0
    lower: float = 0.0
    upper: float = math.inf
    of: str = "gradient"
    weight_decay: str = "ignored"
    bounds: str = "constant"
    final: float | None = None
    gamma: float | None = None
    eps: float = 0.0
    zero_norm: float = 1.0
    weight_norm_bounds: tuple[float, float] | None = None
    clip_by_lr: bool = False
    skip_without_decay: bool = False


def group_options(trust: TrustRatio | None) -> dict[str, Any]:
    """Return the plain scalars of a param group that say the same; None turns trust off."""
    values = TrustRatio() if trust is None else trust
    return {
        "trust": trust is not None,
        **{f"trust_{field.name}": getattr(values, field.name) for field in fields(TrustRatio)},
    }
