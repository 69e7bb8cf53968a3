"""Error bounds of a step, derived from its formulas' terms, and the comparison that uses them.

A rounding errs by at most half an eps of its result. Every bound counts the roundings that a term
passes through and adds up the terms' absolute values: what cancels (``g`` against ``lambda*w``, a
gradient against the buffer) keeps the error of its terms. Quotients and roots carry errors on.

The count takes the options as the backend has them. One that its dtype has to round (0.1 in
float32) adds half an eps to its terms; only roundings that all agree in sign would need it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from . import reference
from .reference import Array, Layer

Bound: TypeAlias = Callable[[Layer, Layer, float, float, float], tuple[Array, dict[str, Array]]]


def tolerance(
    layer: Layer, ratio: float, dtype: DTypeLike = np.float32
) -> tuple[Array, dict[str, Array]]:
    """Return how far a backend's step may lie from the reference's, given the same ratio.

    Parameters
    ----------
    layer : Layer
        Before the step, its values exact in `dtype`. It stays as it is.
    ratio : float
        What both multiply the rate by.
    dtype : dtype
        The backend's arithmetic.

    Returns
    -------
    weight : ndarray of float64, the weight's shape
        ``eps*|w| + |out|*bound(u)``: the one subtraction rounds `w` once.
    states : dict of str to ndarray of float64
        By torch's keys.
    """
    eps = float(np.finfo(dtype).eps)
    # What underflows, or is flushed to zero, errs by less than the smallest normal number, once a
    # product; four stand in the longest chain.
    tiny = 4 * float(np.finfo(dtype).smallest_normal)
    state = {key: array.copy() for key, array in layer.state.items()}
    after = replace(layer, weight=layer.weight.copy(), state=state)
    reference.update(after, ratio)
    inside, outside = reference.place(ratio, layer.group)
    with np.errstate(all="ignore"):  # infinite and NaN where the step is
        bound, states = BOUNDS[layer.rule](layer, after, inside, eps, tiny)
        weight: Array = eps * np.abs(layer.weight) + abs(outside) * bound + tiny
    return weight, states


def gradient_terms(layer: Layer) -> Array:
    """Return ``|g| + |lambda*w|``, the terms of ``d``.

    ``d`` carries three roundings of them: the gradient's scale and its product (the decay's product
    likewise), and the sum.
    """
    decay: float = layer.group["weight_decay"]
    return np.abs(layer.gradient) + decay * np.abs(layer.weight)


def sgd_bound(
    layer: Layer, after: Layer, inside: float, eps: float, tiny: float
) -> tuple[Array, dict[str, Array]]:
    """Bound the errors of ``u`` and of the buffer.

    b: eight roundings (3 of d, 2 of inside*d, 2 of (1-dampening)*x, 1 of the sum) = 4 eps.
    u: b's eight (with Nesterov, which has no dampening: 6, 2 of mu*b and 1 of the sum) and three
    where it is applied (out, out*u, the subtraction) = 6 eps.
    """
    group = layer.group
    u = abs(inside) * gradient_terms(layer)
    if group["momentum"] == 0:
        return 6 * eps * u, {}
    damped = 1.0 if layer.k == 1 else abs(1 - group["dampening"])
    b = group["momentum"] * np.abs(layer.state["momentum_buffer"]) + damped * u
    u = u + group["momentum"] * b if group["nesterov"] else b
    return 6 * eps * u, {"momentum_buffer": 4 * eps * b + tiny}


def rmsprop_bound(
    layer: Layer, after: Layer, inside: float, eps: float, tiny: float
) -> tuple[Array, dict[str, Array]]:
    """Bound the errors of ``u`` and of the three states.

    square_avg: eight roundings (2 of d where its scale is exact, doubled by the square, 1 of the
    square, 1-alpha, its product, the sum) = 4 eps of ``alpha*v + (1-alpha)*(|g| + |lambda*w|)^2``.
    grad_avg: seven (3 of d, d-gbar, 1-alpha, its product, the sum) <= 4 eps.
    variance: the errors of v and of gbar^2, and 1 rounding each of gbar^2 and of the difference.
    """
    group = layer.group
    d, d_terms = reference.decayed(layer), gradient_terms(layer)
    rest = 1 - group["alpha"]
    v_terms = group["alpha"] * layer.state["square_avg"] + rest * np.square(d_terms)
    states = {"square_avg": 4 * eps * v_terms + tiny}
    variance_error = states["square_avg"]
    if group["centered"]:
        before, mean = np.abs(layer.state["grad_avg"]), np.abs(after.state["grad_avg"])
        states["grad_avg"] = e = 4 * eps * (before + rest * (d_terms + before)) + tiny
        squares = after.state["square_avg"] + np.square(mean)
        variance_error = variance_error + e * (2 * mean + e) + eps * squares

    root, least = reference.rmsprop_root(after.state, group), group["eps"]
    radicand = reference.rmsprop_variance(after.state, group)
    if group["eps_inside_sqrt"]:
        radicand, least = radicand + least, np.sqrt(least)
        variance_error = variance_error + eps * radicand  # eps and the sum
    root_error = sqrt_error(radicand, variance_error) + eps * root  # the root; eps and the sum

    # |d'/root' - d/root| <= (|d'-d| + |d/root|*|root'-root|) / root', and root' is never below eps.
    smallest = np.maximum(root - root_error, (1 - eps) * least)
    x = np.abs(d / root)
    error = (2 * eps * d_terms + tiny + x * root_error) / smallest
    # The quotient, inside and their product round once each.
    x, error = abs(inside) * (x + error), abs(inside) * (error + 2 * eps * (x + error))
    if group["momentum"] == 0:
        return error + 2 * eps * x, states  # out, out*u and the subtraction
    b = group["momentum"] * np.abs(layer.state["momentum_buffer"]) + x
    error = error + 2 * eps * b  # mu, mu*b and the sum
    states["momentum_buffer"] = error + tiny
    return error + 2 * eps * b, states


def sqrt_error(x: Array, error: Array) -> Array:
    """Bound ``|sqrt(x') - sqrt(x)|`` for ``|x' - x| <= error``, both at least 0.

    It is ``|x'-x| / (sqrt(x') + sqrt(x))``, and never more than the root of the error.
    """
    quotient: Array = error / (np.sqrt(x) + np.sqrt(np.maximum(x - error, 0.0)))
    return np.minimum(np.sqrt(error), quotient)


BOUNDS: dict[str, Bound] = {"sgd": sgd_bound, "rmsprop": rmsprop_bound}
"""By rule: ``bound(layer, after, inside, eps, tiny) -> (bound of u, bounds of the states)``."""


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
