"""The step in float64 NumPy: the simplest text of what every backend computes, and its judge.

One layer's step is ::

    update(layer, trust_ratio(layer).ratio)

and `step` takes it for the layers of all groups. Backends are held to `trust_ratio` by their ratio
and to `update` with that ratio given, which tells the norms' rounding from the rule's.

Sources: LARS (You, Gitman, Ginsburg 2017); LAMB (You et al. 2019); LEGW and its SC'19 version DATE
(You et al. 2019); LIMIT ("The limit of the batch size"); AdaBound (Luo et al. 2019); each rule's
paper in its docstring. Where a paper and torch differ the rule is torch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Group: TypeAlias = Mapping[str, Any]
State: TypeAlias = Mapping[str, Array]


@dataclass(frozen=True)
class Layer:
    """One parameter at one step, before it.

    Attributes
    ----------
    rule : str
        A key of `RULES`.
    weight : ndarray of float64
        The master weights where the layer has them, else the parameter.
    gradient : ndarray of float64, the weight's shape
        Unscaled, clipped and signed (`prepare`).
    state : mapping of str to ndarray
        The states that the options use, by torch's keys.
    k : int
        The layer's step, 1-based.
    group : mapping
        Its options; an excluded layer has neither trust nor weight decay.
    """

    rule: str
    weight: Array
    gradient: Array
    state: State
    k: int
    group: Group


@dataclass(frozen=True)
class TrustRatio:
    """The bounded ratio of one layer and how it came about; the defaults are an unmeasured layer's.

    Attributes
    ----------
    weight_norm : float
        ``||w||`` before the step.
    measured_norm : float
        ``||g||``, ``||g + lambda*w||`` or ``||u||``; without the ``lambda*||w||`` that
        ``trust_weight_decay="added"`` adds.
    raw_ratio : float
        Before the bounds.
    ratio : float
        As applied.
    clamp : int
        -1 where the lower bound raised it, +1 where the upper one cut it, else 0.
    """

    weight_norm: float = math.nan
    measured_norm: float = math.nan
    raw_ratio: float = math.nan
    ratio: float = 1.0
    clamp: int = 0


@dataclass(frozen=True)
class Telemetry:
    """What a step found out: an entry per layer, in the order of the parameters.

    Attributes
    ----------
    weight_norm, measured_norm, raw_ratio, ratio, clamp : ndarray of float64, shape (layers,)
        See `TrustRatio`.
    skipped : ndarray of bool, shape (layers,)
        Layers that a non-finite value kept as they were.
    total_norm : float
        Norm of all unscaled gradients together; NaN where ``max_grad_norm`` is None.
    clip : float
        The factor that ``max_grad_norm`` put on every gradient.
    """

    weight_norm: Array
    measured_norm: Array
    raw_ratio: Array
    ratio: Array
    clamp: Array
    skipped: NDArray[np.bool_]
    total_norm: float
    clip: float

    @property
    def is_known(self) -> bool:
        """Whether it can be read without waiting for a device."""
        return True

    @property
    def has_arrived(self) -> bool:
        """Whether it can be read without waiting for a device, after `start_copy`."""
        return True

    def start_copy(self) -> None:
        """Have a device send it."""

    def again(self) -> Telemetry:
        """What a step that a CUDA graph replays has found out by now; else the same."""
        return self


def norm(x: Array) -> float:
    """Return the Euclidean norm of all elements; a NaN or an infinity among them shows in it.

    The squares are of ``x / max|x|``: they overflow for no finite `x`, nor do they vanish.
    """
    largest = float(np.max(np.abs(x), initial=0.0))
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * math.sqrt(float(np.sum(np.square(x / largest))))


def clamp(x: float, lower: float, upper: float) -> tuple[float, int]:
    """Return `x` within the bounds, and -1 or +1 where one of them changed it. NaN stays NaN."""
    if x < lower:
        return lower, -1
    if x > upper:
        return upper, 1
    return x, 0


def clip_factor(total_norm: float, max_grad_norm: float) -> float:
    """Return ``min(1, max_grad_norm / G)``: NaN for a norm of NaN, 0 for infinity, as torch."""
    return 1.0 if total_norm <= max_grad_norm else max_grad_norm / total_norm


def trust_bounds(group: Group, k: int) -> tuple[float, float]:
    """Return the ratio's lower and upper bound at step `k`.

    ``"adabound"`` closes in on ``trust_final`` from [0, inf) (AdaBound, which DATE 3.5 names as the
    model of its dynamic bounds).
    """
    if group["trust_bounds"] == "constant":
        return group["trust_lower"], group["trust_upper"]
    final, gamma = group["trust_final"], group["trust_gamma"]
    return final * (1 - 1 / (gamma * k + 1)), final * (1 + 1 / (gamma * k))


def is_measured(group: Group) -> bool:
    """Tell whether a layer with these options has its norms taken."""
    exempt = group["trust_skip_without_decay"] and group["weight_decay"] == 0
    return bool(group["trust"]) and not exempt


def rate(layer: Layer) -> float:
    """Return the learning rate of the layer's step: AdaGrad's ``lr_decay`` is torch's."""
    lr: float = layer.group["lr"]
    lr_decay: float = layer.group.get("lr_decay", 0.0)
    return lr / (1 + (layer.k - 1) * lr_decay)


def decay_in(where: str, group: Group) -> float:
    """Return ``lambda`` where the group has its weight decay in that place, else 0.

    ``"gradient"`` is coupled decay (L2), ``"update"`` LAMB's, ``"weights"`` decoupled (AdamW).
    """
    decay: float = group["weight_decay"]
    return decay if group["weight_decay_in"] == where else 0.0


def add_decay(x: Array, decay: float, weight: Array) -> Array:
    """Return ``x + lambda*w``. Without decay the weights stay out of it: 0 * inf would be NaN."""
    return x if decay == 0 else x + decay * weight


def decayed(layer: Layer) -> Array:
    """Return ``d``: the gradient, and ``lambda*w`` where decay is coupled."""
    return add_decay(layer.gradient, decay_in("gradient", layer.group), layer.weight)


def place(layer: Layer, ratio: float) -> tuple[float, float]:
    """Return what multiplies the entry to a momentum buffer and what multiplies the direction.

    ``"outside"`` is DATE 3.5 and LIMIT 6.3, and all that a rule without a buffer has; ``"inside"``
    is LARS, ``"ratio_inside"`` LARC and timm.
    """
    scaling = layer.group.get("momentum_scaling", "outside")
    if scaling == "outside":
        return 1.0, rate(layer) * ratio
    if scaling == "inside":
        return rate(layer) * ratio, 1.0
    return ratio, rate(layer)


def root(square: Array, eps: float, *, inside: bool = False) -> Array:
    """Return ``sqrt(square) + eps``, or ``sqrt(square + eps)`` with `eps` inside."""
    return np.sqrt(square + eps) if inside else np.sqrt(square) + eps


def sgd(d: Array, state: State, k: int, inside: float, group: Group) -> Array:
    """SGD, momentum and Nesterov, as torch's.

    ``x = inside*d``; ``b <- mu*b + (1-dampening)*x``, the first step undamped; ``u = b``, or
    ``x + mu*b`` with Nesterov; ``u = x`` without momentum.
    """
    x = inside * d
    if group["momentum"] == 0:
        return x
    b = state["momentum_buffer"]
    b *= group["momentum"]
    b += x if k == 1 else (1 - group["dampening"]) * x
    return x + group["momentum"] * b if group["nesterov"] else b


def rmsprop(d: Array, state: State, k: int, inside: float, group: Group) -> Array:
    """RMSprop, as torch's or with TensorFlow 1's root.

    ``v <- alpha*v + (1-alpha)*d^2``; where centered, ``gbar <- gbar + (1-alpha)*(d-gbar)``;
    ``x = inside*d / (sqrt(v) + eps)``, or ``/ sqrt(v + eps)`` (TensorFlow 1), with ``v - gbar^2``
    for ``v`` where centered; ``b <- mu*b + x``; ``u = b``, or ``x`` without momentum.
    """
    v = state["square_avg"]
    v *= group["alpha"]
    v += (1 - group["alpha"]) * np.square(d)
    if group["centered"]:
        mean = state["grad_avg"]
        mean += (1 - group["alpha"]) * (d - mean)
    variance = rmsprop_variance(state, group)
    x = inside * (d / root(variance, group["eps"], inside=group["eps_inside_sqrt"]))
    if group["momentum"] == 0:
        return x
    b = state["momentum_buffer"]
    b *= group["momentum"]
    b += x
    return b


def rmsprop_variance(state: State, group: Group) -> Array:
    """Return ``v``, or ``max(v - gbar^2, 0)`` where centered (rounding may leave it below 0)."""
    if not group["centered"]:
        return state["square_avg"]
    return np.maximum(state["square_avg"] - np.square(state["grad_avg"]), 0.0)  # NaN stays NaN


def adagrad(d: Array, state: State, k: int, inside: float, group: Group) -> Array:
    """AdaGrad (Duchi, Hazan, Singer 2011), as torch's.

    ``a <- a + d^2``; ``u = d / (sqrt(a) + eps)``.
    """
    a = state["sum"]
    a += np.square(d)
    return d / root(a, group["eps"])


def adam(d: Array, state: State, k: int, inside: float, group: Group) -> Array:
    """Adam (Kingma and Ba 2015) and AMSGrad (Reddi, Kale, Kumar 2018), as torch's.

    ``m <- m + (1-beta1)*(d-m)``; ``v <- beta2*v + (1-beta2)*d^2``; AMSGrad's ``x <- max(x, v)``
    stands for ``v`` then; ``u = (m/c1) / (sqrt(v/c2) + eps)`` (`adam_corrections`).
    """
    beta1, beta2 = group["betas"]
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean += (1 - beta1) * (d - mean)
    square *= beta2
    square += (1 - beta2) * np.square(d)
    if group["amsgrad"]:
        largest = state["max_exp_avg_sq"]
        square = np.maximum(largest, square, out=largest)  # NaN stays NaN
    c1, c2 = adam_corrections(k, group)
    return (mean / c1) / root(square / c2, group["eps"])


def adam_corrections(k: int, group: Group) -> tuple[float, float]:
    """Return the bias corrections ``1 - beta1^k`` and ``1 - beta2^k``, or 1 without them."""
    if not group["bias_correction"]:
        return 1.0, 1.0
    beta1, beta2 = group["betas"]
    return 1 - beta1**k, 1 - beta2**k


def adadelta(d: Array, state: State, k: int, inside: float, group: Group) -> Array:
    """Adadelta (Zeiler 2012), as torch's.

    ``v <- rho*v + (1-rho)*d^2``; ``u = sqrt(a+eps)/sqrt(v+eps) * d``;
    ``a <- rho*a + (1-rho)*u^2``: of the rule's own ``u``, whatever multiplies it.
    """
    rho, eps = group["rho"], group["eps"]
    v, a = state["square_avg"], state["acc_delta"]
    v *= rho
    v += (1 - rho) * np.square(d)
    u = root(a, eps, inside=True) / root(v, eps, inside=True) * d
    a *= rho
    a += (1 - rho) * np.square(u)
    return u


def lion(d: Array, state: State, k: int, inside: float, group: Group) -> Array:
    """Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms").

    ``u = sign(beta1*m + (1-beta1)*d)``, and then ``m <- beta2*m + (1-beta2)*d``.
    """
    beta1, beta2 = group["betas"]
    m = state["exp_avg"]
    u: Array = np.sign(beta1 * m + (1 - beta1) * d)
    m *= beta2
    m += (1 - beta2) * d
    return u


Rule: TypeAlias = Callable[[Array, State, int, float, Group], Array]

RULES: dict[str, Rule] = {
    "sgd": sgd,
    "rmsprop": rmsprop,
    "adagrad": adagrad,
    "adam": adam,
    "adadelta": adadelta,
    "lion": lion,
}
"""Every family: ``rule(d, state, k, inside, group)`` advances the state and returns ``u``.

``inside`` is 1 for rules without a momentum buffer.
"""


def advance(layer: Layer, inside: float) -> Array:
    """Advance the layer's state and return its update ``u``, decay in the update included.

    ``u <- u + inside*lambda*w``: the decay does not enter a momentum buffer, but is scaled as what
    does, so that rate and ratio multiply it once in every form of momentum scaling.
    """
    u = RULES[layer.rule](decayed(layer), layer.state, layer.k, inside, layer.group)
    return add_decay(u, decay_in("update", layer.group), inside * layer.weight)


def measured(layer: Layer) -> Array:
    """Return what the ratio's denominator is the norm of; the layer's state stays as it is.

    ``trust_weight_decay="combined"`` counts the decay wherever the group has it.
    """
    group = layer.group
    if group["trust_of"] == "update":
        state = {key: value.copy() for key, value in layer.state.items()}
        return advance(replace(layer, state=state), 1.0)
    combined = group["weight_decay"] if group["trust_weight_decay"] == "combined" else 0.0
    return add_decay(layer.gradient, combined, layer.weight)


def trust_ratio(layer: Layer) -> TrustRatio:
    """Return the bounded trust ratio (LARS eq. 6, DATE Algorithm 1, LIMIT eq. 2); write nothing.

    It is NaN where a norm is not finite: clamping would turn ``inf / inf`` into a bound.
    """
    group = layer.group
    if not is_measured(group):
        return TrustRatio()
    with np.errstate(all="ignore"):  # what overflows shows in the norm
        weight_norm, measured_norm = norm(layer.weight), norm(measured(layer))
    added = group["weight_decay"] if group["trust_weight_decay"] == "added" else 0.0
    denominator = measured_norm + added * weight_norm
    if not (math.isfinite(weight_norm) and math.isfinite(denominator)):
        return TrustRatio(weight_norm, measured_norm, ratio=math.nan)
    if weight_norm == 0 or denominator == 0:
        raw = group["trust_zero_norm"]
    else:
        phi, _ = clamp(weight_norm, *(group["trust_weight_norm_bounds"] or (0.0, math.inf)))
        raw = group["trust_coefficient"] * phi / (denominator + group["trust_eps"])
        if group["trust_clip_by_lr"]:
            # min(raw / lr, 1), and 1 where lr is 0
            raw = raw / rate(layer) if raw < rate(layer) else 1.0
    ratio, hit = clamp(raw, *trust_bounds(group, layer.k))
    return TrustRatio(weight_norm, measured_norm, raw, ratio, hit)


def update(layer: Layer, ratio: float) -> None:
    """Take the layer's step with a given ratio, in place.

    ``w <- (1 - lr*lambda)*w`` where decay is of the weights, then ``w <- w - out*u``. A ratio of
    NaN makes the layer NaN.
    """
    with np.errstate(all="ignore"):  # a run that diverges ends in inf and NaN here as elsewhere
        inside, outside = place(layer, ratio)
        u = advance(layer, inside)
        weight = layer.weight
        weight *= 1 - rate(layer) * decay_in("weights", layer.group)
        weight -= outside * u


def common(groups: Sequence[Group], key: str) -> Any:
    """Return the option's one value, None without groups.

    Raises
    ------
    ValueError
        Where groups differ: the option is about all layers at once.
    """
    first = groups[0][key] if groups else None
    for i, group in enumerate(groups):
        if group[key] != first:
            raise ValueError(
                f"{key} must be equal in all groups, but it is {first!r} in group 0 and "
                f"{group[key]!r} in group {i}"
            )
    return first


def prepare(
    grads: Sequence[Array], groups: Sequence[Group], *, grad_scale: float | Array | None = None
) -> tuple[list[Array], float, float]:
    """Unscale, clip and sign the gradients of all layers; the given ones stay as they are.

    Returns
    -------
    gradients : list of ndarray
        As a `Layer` has them.
    total_norm, clip : float
        See `Telemetry`.
    """
    scale = 1.0 if grad_scale is None else np.asarray(grad_scale).item()
    sign = {i: -1.0 if group["maximize"] else 1.0 for group in groups for i in group["params"]}
    max_grad_norm = common(groups, "max_grad_norm")
    total_norm, clip = math.nan, 1.0
    with np.errstate(all="ignore"):  # non-finite gradients are for `step` to judge
        unscaled = [grad / np.float64(scale) for grad in grads]
        if max_grad_norm is not None:
            total_norm = norm(np.array([norm(grad) for grad in unscaled]))
            clip = clip_factor(total_norm, max_grad_norm)
        return [sign[i] * clip * grad for i, grad in enumerate(unscaled)], total_norm, clip


def layers(
    rule: str,
    params: Sequence[Array],
    gradients: Sequence[Array],
    states: Mapping[str, Sequence[Array | None]],
    steps: Sequence[Array | None],
    groups: Sequence[Group],
) -> list[Layer]:
    """Return the layers in the order of `params`; they share the arrays.

    The arguments are those of `step`, but for the gradients, which come from `prepare`.
    """
    masters = states.get("master", [None] * len(params))
    rule_states = {key: of for key, of in states.items() if key != "master"}
    made = {}
    for group in groups:
        for position, i in enumerate(group["params"]):
            excluded = "exclude" in group and group["exclude"][position]
            options = {**group, "trust": False, "weight_decay": 0.0} if excluded else group
            state = {key: array for key, of in rule_states.items() if (array := of[i]) is not None}
            weight = params[i] if (master := masters[i]) is None else master
            k = 1 if (count := steps[i]) is None else int(count) + 1
            made[i] = Layer(rule, weight, gradients[i], state, k, options)
    return [made[i] for i in range(len(params))]


def step(
    rule: str,
    params: Sequence[Array],
    grads: Sequence[Array],
    states: Mapping[str, Sequence[Array | None]],
    steps: Sequence[Array | None],
    groups: Sequence[Group],
    *,
    grad_scale: float | Array | None = None,
    found_inf: float | Array | None = None,
) -> Telemetry:
    """Take one step in place: `params`, `states` and `steps` change, `grads` never do.

    Parameters
    ----------
    rule : str
        A key of `RULES`.
    params, grads : sequence of ndarray of float64
        A layer each.
    states : mapping of str to sequence of (ndarray or None)
        By torch's keys; None where the layer's options do not use the state. ``master`` holds
        master weights: where a layer has them the step is theirs, and the parameter takes their
        values after it, for the caller to round.
    steps : sequence of (0-d ndarray or None)
        Steps taken before this one; None where the layer keeps no count, whose steps all count as
        its first.
    groups : sequence of mapping
        Options as plain scalars, all of them stated; ``params``, the indices of the group's layers;
        optionally ``exclude``, a boolean for each of these.
    grad_scale : float or ndarray of one element, optional
        What the gradients are divided by first.
    found_inf : float or ndarray of one element, optional
        Not 0 where a gradient scaler found a value that is not finite. To give it at all implies
        ``on_nonfinite="skip"``.

    Returns
    -------
    Telemetry

    Raises
    ------
    ValueError
        An unknown rule, or groups that differ in ``max_grad_norm`` or ``on_nonfinite``. Nothing was
        written then.
    """
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; take one of {', '.join(RULES)}")
    skip = common(groups, "on_nonfinite") == "skip" or found_inf is not None
    nothing = [TrustRatio()] * len(params), [True] * len(params)
    if found_inf is not None and np.asarray(found_inf).item() != 0:
        return _telemetry(*nothing, math.nan, 1.0)
    gradients, total_norm, clip = prepare(grads, groups, grad_scale=grad_scale)
    # A scaler has looked at every gradient already; the clip's norm looks again all the same.
    looks = skip and (found_inf is None or common(groups, "max_grad_norm") is not None)
    if looks and not all(np.isfinite(gradient).all() for gradient in gradients):
        return _telemetry(*nothing, total_norm, clip)
    ratios, skipped = [], []
    for layer, param, count in zip(
        layers(rule, params, gradients, states, steps, groups), params, steps, strict=True
    ):
        ratios.append(trust_ratio(layer))
        skipped.append(skip and math.isnan(ratios[-1].ratio))
        if not skipped[-1]:
            update(layer, ratios[-1].ratio)
            param[...] = layer.weight
            if count is not None:
                count[...] += 1
    return _telemetry(ratios, skipped, total_norm, clip)


def _telemetry(
    ratios: Sequence[TrustRatio], skipped: Sequence[bool], total_norm: float, clip: float
) -> Telemetry:
    return Telemetry(
        weight_norm=np.array([r.weight_norm for r in ratios]),
        measured_norm=np.array([r.measured_norm for r in ratios]),
        raw_ratio=np.array([r.raw_ratio for r in ratios]),
        ratio=np.array([r.ratio for r in ratios]),
        clamp=np.array([r.clamp for r in ratios], dtype=np.float64),
        skipped=np.array(skipped, dtype=np.bool_),
        total_norm=total_norm,
        clip=clip,
    )
