"""Error bounds of a step, derived from its formulas' terms, and the comparison that uses them.

A rounding errs by at most half an eps of its result. Every bound counts the roundings that a term
passes through and adds up the terms' absolute values: what cancels (``g`` against ``lambda*w``, a
gradient against the buffer) keeps the error of its terms. Products, quotients and roots carry
errors on. `Rounding` holds what one operation does to them; a rule's bound lists its operations.

A bound holds for kernels that round no more often than it counts, whatever they contract into fused
multiply-adds, and whose options are rounded once from float64. The roundings' products, less than
a millionth of their sum, are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from . import reference
from .reference import Array, Layer


class Term(NamedTuple):
    """A number of the reference as a backend may have it.

    Attributes
    ----------
    size : ndarray or float
        Its absolute value, or a bound of it.
    error : ndarray or float
        How far the backend's may lie from it.
    least : float
        What the backend's is never below.
    """

    size: Array
    error: Array
    least: float = 0.0

    @property
    def most(self) -> Array:
        """Bound the backend's absolute value."""
        return self.size + self.error


def exact(x: Array) -> Term:
    """Return what a backend has as it is."""
    return Term(np.abs(x), np.zeros_like(x))


@dataclass(frozen=True)
class Rounding:
    """What an arithmetic's operations do to errors.

    Attributes
    ----------
    half : float
        Half an eps: the relative error of one rounding.
    tiny : float
        The smallest normal number: what is smaller may be flushed to zero.
    """

    half: float
    tiny: float

    def sum(self, *parts: tuple[float, Term]) -> Array:
        """Bound the error of ``c1*x1 + c2*x2 + ...``, or of ``c*x`` alone.

        Three roundings of each part: its constant, their product (neither where the constant is 1
        or -1) and the sum.
        """
        sums = len(parts) - 1
        error: Array = np.asarray((len(parts) + sums) * self.tiny)
        for constant, x in parts:
            roundings = (0 if abs(constant) == 1 else 2) + sums
            each = abs(constant) * roundings * self.half + self.tiny
            error = error + abs(constant) * x.error + each * x.most
        return error

    def product(self, x: Term, y: Term) -> Term:
        """Return ``x*y``, which rounds once."""
        carried = x.size * y.error + y.size * x.error + x.error * y.error
        return Term(x.size * y.size, carried + self.half * x.most * y.most + self.tiny)

    def quotient(self, x: Term, y: Term) -> Term:
        """Return ``x/y``, which rounds once.

        ``|x'/y' - x/y| <= (|x'-x| + |x/y|*|y'-y|) / y'``.
        """
        size = x.size / y.size
        carried = (x.error + size * y.error) / np.maximum(y.size - y.error, y.least)
        return Term(size, carried + self.half * (size + carried) + self.tiny)

    def root(self, square: Term, eps: float, *, inside: bool = False, scaled: bool = False) -> Term:
        """Return ``sqrt(square) + eps``, or ``sqrt(square + eps)``, of what is not below 0.

        `eps` is rounded once, as are the sum and the root; a `scaled` root, whose scale is in
        `square`, by its scale and their product, too.
        """
        size = reference.root(square.size, eps, inside=inside)
        option = Term(np.asarray(eps), np.asarray(self.half * eps + self.tiny))
        least = max(eps - float(option.error), 0.0)
        if inside:
            square = Term(square.size + eps, self.sum((1.0, square), (1.0, option)))
            error = root_error(square)
            return Term(size, error + self.half * (size + error), (1 - self.half) * np.sqrt(least))
        bare = np.sqrt(square.size)
        error = root_error(square)
        error = error + (3 if scaled else 1) * self.half * (bare + error)
        return Term(size, self.sum((1.0, Term(bare, error)), (1.0, option)), least)


def root_error(square: Term) -> Array:
    """Bound ``|sqrt(x') - sqrt(x)|``, neither below 0.

    It is ``|x'-x| / (sqrt(x') + sqrt(x))``, and never more than the root of the error.
    """
    lowest = np.sqrt(np.maximum(square.size - square.error, 0.0))
    quotient: Array = square.error / (np.sqrt(square.size) + lowest)
    return np.minimum(np.sqrt(square.error), quotient)


STORAGE: dict[str, tuple[float, float]] = {
    "float16": (2.0**-11, 2.0**-25),
    "bfloat16": (2.0**-8, 2.0**-134),
}
"""By a 16-bit format's name: half its eps, and half its smallest subnormal number."""

States: TypeAlias = dict[str, Array]
Bound: TypeAlias = Callable[[Layer, Layer, float, Rounding], tuple[Term, States]]


def tolerance(
    layer: Layer, ratio: float, dtype: DTypeLike = np.float32, storage: str | None = None
) -> tuple[Array, States]:
    """Return how far a backend's step may lie from the reference's, given the same ratio.

    Parameters
    ----------
    layer : Layer
        Before the step, its values exact in `dtype`. It stays as it is.
    ratio : float
        What both multiply the rate by.
    dtype : dtype
        The backend's arithmetic, and what it keeps states in.
    storage : {"float16", "bfloat16"}, optional
        What the weights are rounded to, once more, where they have no master. A weight that leaves
        its range leaves the bound.

    Returns
    -------
    weight : ndarray of float64, the weight's shape
    states : dict of str to ndarray of float64
        By torch's keys.
    """
    rounding = _rounding(dtype)
    after = _after(layer, ratio)
    inside, outside = reference.place(layer, ratio)
    with np.errstate(all="ignore"):  # infinite and NaN where the step is
        u, states = BOUNDS[layer.rule](layer, after, inside, rounding)
        u = decayed_update(layer, u, inside, rounding)
        scale = 1 - reference.rate(layer) * reference.decay_in("weights", layer.group)
        error = rounding.sum((scale, exact(layer.weight)), (-outside, u))
        if storage is not None:
            error = storage_error(storage, after.weight, error)
    return error, states


def storage_error(storage: str, values: Array, error: Array) -> Array:
    """Return the error of values that are rounded to 16 bits.

    The rounding errs by half an ulp of the backend's own result.

    Parameters
    ----------
    storage : {"float16", "bfloat16"}
    values, error : ndarray of float64
        The reference's, and how far the backend's may lie from them before.
    """
    half, subnormal = STORAGE[storage]
    rounded: Array = error + half * (np.abs(values) + error) + subnormal
    return rounded


def norm_tolerance(layer: Layer, dtype: DTypeLike = np.float32) -> float:
    """Return how far the measured norm of a layer may lie from the reference's.

    A norm errs by no more than the norm of its elements' errors; its sums in double add nothing
    that counts. What cancels (a gradient against its decay, two averages' difference in an update)
    may leave a norm that is mostly error.

    Parameters
    ----------
    layer : Layer
        Before the step, its ratio's denominator the norm of an update or of ``g + decay*w``.
    dtype : dtype
        The backend's arithmetic.
    """
    rounding = _rounding(dtype)
    if layer.group["trust_of"] == "gradient":
        g, decay = scaled_gradient(layer, rounding), layer.group["weight_decay"]
        return reference.norm(rounding.sum((1.0, g), (decay, exact(layer.weight))))
    with np.errstate(all="ignore"):
        u, _ = BOUNDS[layer.rule](layer, _after(layer, 1.0), 1.0, rounding)
        return reference.norm(decayed_update(layer, u, 1.0, rounding).error)


def _rounding(dtype: DTypeLike) -> Rounding:
    finfo = np.finfo(dtype)
    return Rounding(float(finfo.eps) / 2, float(finfo.smallest_normal))


def _after(layer: Layer, ratio: float) -> Layer:
    state = {key: array.copy() for key, array in layer.state.items()}
    after = replace(layer, weight=layer.weight.copy(), state=state)
    reference.update(after, ratio)
    return after


def scaled_gradient(layer: Layer, rounding: Rounding) -> Term:
    """Return ``g``: two roundings, its scale's and their product's."""
    size = np.abs(layer.gradient)
    return Term(size, 2 * rounding.half * size + rounding.tiny)


def decayed_gradient(layer: Layer, rounding: Rounding) -> Term:
    """Return ``d``, which is ``g + lambda*w`` where weight decay is coupled."""
    g = scaled_gradient(layer, rounding)
    decay = reference.decay_in("gradient", layer.group)
    if decay == 0:
        return g
    error = rounding.sum((1.0, g), (decay, exact(layer.weight)))
    return Term(np.abs(reference.decayed(layer)), error)


def decayed_update(layer: Layer, u: Term, inside: float, rounding: Rounding) -> Term:
    """Return ``u + inside*lambda*w``: two constants and two products round the decay."""
    decay = reference.decay_in("update", layer.group)
    if decay == 0:
        return u
    w = exact(layer.weight)
    added = Term(decay * w.size, rounding.sum((decay, w)))
    return Term(u.size + abs(inside) * added.size, rounding.sum((1.0, u), (inside, added)))


def average(
    layer: Layer, after: Layer, key: str, decay: float, square: Term, rounding: Rounding
) -> Term:
    """Return the state ``v <- decay*v + (1-decay)*square``."""
    before = exact(layer.state[key])
    error = rounding.sum((decay, before), (1 - decay, square))
    return Term(np.abs(after.state[key]), error)


def mean(layer: Layer, after: Layer, key: str, decay: float, d: Term, rounding: Rounding) -> Term:
    """Return the state ``m <- m + (1-decay)*(d-m)``."""
    before = exact(layer.state[key])
    difference = Term(d.size + before.size, rounding.sum((1.0, d), (-1.0, before)))
    error = rounding.sum((1.0, before), (1 - decay, difference))
    return Term(np.abs(after.state[key]), error)


def sgd_bound(layer: Layer, after: Layer, inside: float, rounding: Rounding) -> tuple[Term, States]:
    """Bound the errors of SGD, of momentum and of Nesterov's."""
    group = layer.group
    d = decayed_gradient(layer, rounding)
    x = Term(abs(inside) * d.size, rounding.sum((inside, d)))
    if group["momentum"] == 0:
        return x, {}
    damped = 1.0 if layer.k == 1 else 1 - group["dampening"]
    before = exact(layer.state["momentum_buffer"])
    error = rounding.sum((group["momentum"], before), (damped, x))
    b = Term(np.abs(after.state["momentum_buffer"]), error)
    u = b
    if group["nesterov"]:
        size = x.size + group["momentum"] * b.size
        u = Term(size, rounding.sum((1.0, x), (group["momentum"], b)))
    return u, {"momentum_buffer": b.error}


def rmsprop_bound(
    layer: Layer, after: Layer, inside: float, rounding: Rounding
) -> tuple[Term, States]:
    """Bound the errors of RMSprop in all its forms."""
    group = layer.group
    d = decayed_gradient(layer, rounding)
    v = average(layer, after, "square_avg", group["alpha"], rounding.product(d, d), rounding)
    states = {"square_avg": v.error}
    variance = v
    if group["centered"]:
        gbar = mean(layer, after, "grad_avg", group["alpha"], d, rounding)
        states["grad_avg"] = gbar.error
        # max(., 0) brings nothing farther apart.
        error = rounding.sum((1.0, v), (-1.0, rounding.product(gbar, gbar)))
        variance = Term(reference.rmsprop_variance(after.state, group), error)
    root = rounding.root(variance, group["eps"], inside=group["eps_inside_sqrt"])
    quotient = rounding.quotient(d, root)
    x = Term(abs(inside) * quotient.size, rounding.sum((inside, quotient)))
    if group["momentum"] == 0:
        return x, states
    before = exact(layer.state["momentum_buffer"])
    b = Term(
        np.abs(after.state["momentum_buffer"]),
        rounding.sum((group["momentum"], before), (1.0, x)),
    )
    return b, {**states, "momentum_buffer": b.error}


def adagrad_bound(
    layer: Layer, after: Layer, inside: float, rounding: Rounding
) -> tuple[Term, States]:
    """Bound the errors of AdaGrad."""
    d = decayed_gradient(layer, rounding)
    error = rounding.sum((1.0, exact(layer.state["sum"])), (1.0, rounding.product(d, d)))
    a = Term(after.state["sum"], error)
    return rounding.quotient(d, rounding.root(a, layer.group["eps"])), {"sum": a.error}


def adam_bound(
    layer: Layer, after: Layer, inside: float, rounding: Rounding
) -> tuple[Term, States]:
    """Bound the errors of Adam and of AMSGrad."""
    group = layer.group
    beta1, beta2 = group["betas"]
    d = decayed_gradient(layer, rounding)
    m = mean(layer, after, "exp_avg", beta1, d, rounding)
    v = average(layer, after, "exp_avg_sq", beta2, rounding.product(d, d), rounding)
    states = {"exp_avg": m.error, "exp_avg_sq": v.error}
    if group["amsgrad"]:
        states["max_exp_avg_sq"] = v.error  # max(x, .) brings nothing farther apart
        v = Term(after.state["max_exp_avg_sq"], v.error)
    c1, c2 = reference.adam_corrections(layer.k, group)
    numerator = Term(m.size / c1, rounding.sum((1 / c1, m)))
    denominator = rounding.root(Term(v.size / c2, v.error / c2), group["eps"], scaled=c2 != 1)
    return rounding.quotient(numerator, denominator), states


def adadelta_bound(
    layer: Layer, after: Layer, inside: float, rounding: Rounding
) -> tuple[Term, States]:
    """Bound the errors of Adadelta."""
    rho, eps = layer.group["rho"], layer.group["eps"]
    d = decayed_gradient(layer, rounding)
    v = average(layer, after, "square_avg", rho, rounding.product(d, d), rounding)
    delta = rounding.root(exact(layer.state["acc_delta"]), eps, inside=True)
    u = rounding.product(rounding.quotient(delta, rounding.root(v, eps, inside=True)), d)
    a = average(layer, after, "acc_delta", rho, rounding.product(u, u), rounding)
    return u, {"square_avg": v.error, "acc_delta": a.error}


def lion_bound(
    layer: Layer, after: Layer, inside: float, rounding: Rounding
) -> tuple[Term, States]:
    """Bound the errors of Lion: a sign errs by 2 where errors may turn it, else not at all."""
    beta1, beta2 = layer.group["betas"]
    d, m = decayed_gradient(layer, rounding), exact(layer.state["exp_avg"])
    mixed = beta1 * layer.state["exp_avg"] + (1 - beta1) * reference.decayed(layer)
    turns = np.abs(mixed) <= rounding.sum((beta1, m), (1 - beta1, d))
    u = Term(np.abs(np.sign(mixed)), np.where(turns, 2.0, 0.0))
    return u, {"exp_avg": rounding.sum((beta2, m), (1 - beta2, d))}


BOUNDS: dict[str, Bound] = {
    "sgd": sgd_bound,
    "rmsprop": rmsprop_bound,
    "adagrad": adagrad_bound,
    "adam": adam_bound,
    "adadelta": adadelta_bound,
    "lion": lion_bound,
}
"""By rule: ``bound(layer, after, inside, rounding) -> (u, errors of the states)``.

`layer` is before the step, `after` the same layer after it.
"""


def assert_close(actual: ArrayLike, expected: ArrayLike, tolerance: ArrayLike, what: str) -> None:
    """Assert ``|actual - expected| <= tolerance`` everywhere, and show the worst error if not.

    NaN equals NaN and an infinity itself; where `expected` is finite the tolerance must be, too.

    Parameters
    ----------
    actual, expected : array_like, one shape
    tolerance : array_like
        A scalar, or one bound per element.
    what : str
        What is compared, for the message.

    Raises
    ------
    AssertionError
        It names the element whose error is the largest multiple of its threshold.
    """
    a, e = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert a.shape == e.shape, f"{what}: shape {a.shape}, expected {e.shape}"
    if a.size == 0:
        return
    threshold = np.broadcast_to(np.asarray(tolerance, dtype=np.float64), a.shape)
    assert np.isfinite(threshold[np.isfinite(e)]).all(), f"{what}: a tolerance is not finite"
    with np.errstate(all="ignore"):
        error = np.abs(a - e)
        excess = np.where(error == 0, 0.0, error / threshold)
    same = (a == e) | (np.isnan(a) & np.isnan(e))
    excess = np.where(same, 0.0, np.where(np.isnan(excess), np.inf, excess))
    worst = np.unravel_index(int(np.argmax(excess)), a.shape)
    assert excess[worst] <= 1, (
        f"{what}: error {error[worst]:.3g} exceeds {threshold[worst]:.3g} at index "
        f"{tuple(int(i) for i in worst)}: {a[worst]!r}, expected {e[worst]!r} "
        f"({int((excess > 1).sum())} of {a.size} elements)"
    )
