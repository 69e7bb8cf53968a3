"""The rules as Triton functions: the numbers of a row, a direction, and what concludes it.

``csrc/rules`` holds the same formulas in C++, `date_kernels.reference` in float64. A rule is three
functions and the names of its row's fields:

- ``prepare(row, k, T)`` reads the rule's own numbers at a layer's step ``k``, in the arithmetic's
  type ``T``. The first is whether the direction is a function of the advanced states alone.
- ``direction(d, s0, s1, s2, inside, numbers)`` returns ``(u, s0, s1, s2)``: the direction and the
  advanced states; ``inside`` scales what enters a momentum buffer.
- ``conclude(s0, s1, s2, numbers)`` returns the direction from advanced states.

All branches are on numbers of the row, by selection: what groups differ in is data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl


@triton.jit
def root(x):
    """sqrt(x), rounded to the nearest."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def quotient(x, y):
    """X / y, rounded to the nearest."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def average(v, x, decay, one_minus_decay):
    """An average of squares, advanced; multiplied as torch does, which overflows later."""
    return decay * v + one_minus_decay * x * x


@triton.jit
def power(base, k):
    """base**k of a float64, by squaring."""
    result = base * 0 + 1
    while k > 0:
        result = tl.where(k & 1 == 1, result * base, result)
        base = base * base
        k = k >> 1
    return result


@triton.jit
def no_conclusion(s0, s1, s2, numbers):
    """For rules whose states do not tell the direction; never reached."""
    return s0


@triton.jit
def sgd_prepare(row, k, T: tl.constexpr):
    momentum = tl.load(row)
    damped = tl.where(k == 1, 1.0, tl.load(row + 1))  # the first step's b = d
    nesterov = tl.load(row + 2) != 0
    return (momentum != 0) & (nesterov == 0), momentum.to(T), damped.to(T), nesterov


@triton.jit
def sgd_direction(d, s0, s1, s2, inside, numbers):
    """SGD, momentum and Nesterov with torch's semantics."""
    _, momentum, damped, nesterov = numbers
    x = inside * d
    s0 = momentum * s0 + damped * x
    u = tl.where(nesterov, x + momentum * s0, s0)
    return tl.where(momentum == 0, x, u), s0, s1, s2


@triton.jit
def sgd_conclude(s0, s1, s2, numbers):
    return s0


@triton.jit
def rmsprop_prepare(row, k, T: tl.constexpr):
    alpha = tl.load(row).to(T)
    one_minus_alpha = tl.load(row + 1).to(T)
    eps_inside = tl.load(row + 2).to(T)
    eps_outside = tl.load(row + 3).to(T)
    momentum = tl.load(row + 4)
    centered = tl.load(row + 5) != 0
    return (
        momentum != 0,
        alpha,
        one_minus_alpha,
        eps_inside,
        eps_outside,
        momentum.to(T),
        centered,
    )


@triton.jit
def rmsprop_direction(d, s0, s1, s2, inside, numbers):
    """RMSprop with torch's semantics, and TensorFlow 1's root."""
    has_momentum, alpha, one_minus_alpha, eps_inside, eps_outside, momentum, centered = numbers
    s0 = average(s0, d, alpha, one_minus_alpha)
    s1 = s1 + one_minus_alpha * (d - s1)
    variance = s0 - s1 * s1
    variance = tl.where(variance < 0, 0.0, variance)  # rounding may leave it below 0
    variance = tl.where(centered, variance, s0)
    x = inside * quotient(d, root(variance + eps_inside) + eps_outside)
    s2 = momentum * s2 + x
    return tl.where(has_momentum, s2, x), s0, s1, s2


@triton.jit
def rmsprop_conclude(s0, s1, s2, numbers):
    return s2


@triton.jit
def adagrad_prepare(row, k, T: tl.constexpr):
    return k < 0, tl.load(row).to(T)


@triton.jit
def adagrad_direction(d, s0, s1, s2, inside, numbers):
    """AdaGrad with torch's semantics; the rate has its decay in it."""
    _, eps = numbers
    s0 = s0 + d * d
    return quotient(d, root(s0) + eps), s0, s1, s2


@triton.jit
def adam_prepare(row, k, T: tl.constexpr):
    beta1 = tl.load(row)
    beta2 = tl.load(row + 1)
    eps = tl.load(row + 4).to(T)
    amsgrad = tl.load(row + 5) != 0
    mean_scale = 1 + beta1 * 0
    root_scale = 1 + beta2 * 0
    if tl.load(row + 6) != 0:
        mean_scale = 1 / (1 - power(beta1, k))
        root_scale = 1 / tl.sqrt(1 - power(beta2, k))
    return (
        k > 0,
        tl.load(row + 2).to(T),
        beta2.to(T),
        tl.load(row + 3).to(T),
        mean_scale.to(T),
        root_scale.to(T),
        eps,
        amsgrad,
    )


@triton.jit
def adam_direction(d, s0, s1, s2, inside, numbers):
    """Adam and AMSGrad with torch's semantics."""
    _, one_minus_beta1, beta2, one_minus_beta2, _, _, _, _ = numbers
    s0 = s0 + one_minus_beta1 * (d - s0)
    s1 = average(s1, d, beta2, one_minus_beta2)
    s2 = tl.where((s1 > s2) | (s1 != s1), s1, s2)  # torch.maximum: a NaN on either side stays one
    return adam_conclude(s0, s1, s2, numbers), s0, s1, s2


@triton.jit
def adam_conclude(s0, s1, s2, numbers):
    _, _, _, _, mean_scale, root_scale, eps, amsgrad = numbers
    return quotient(mean_scale * s0, root_scale * root(tl.where(amsgrad, s2, s1)) + eps)


@triton.jit
def adadelta_prepare(row, k, T: tl.constexpr):
    return k < 0, tl.load(row).to(T), tl.load(row + 1).to(T), tl.load(row + 2).to(T)


@triton.jit
def adadelta_direction(d, s0, s1, s2, inside, numbers):
    """Adadelta with torch's semantics."""
    _, rho, one_minus_rho, eps = numbers
    s0 = average(s0, d, rho, one_minus_rho)
    u = quotient(root(s1 + eps), root(s0 + eps)) * d
    s1 = average(s1, u, rho, one_minus_rho)
    return u, s0, s1, s2


@triton.jit
def lion_prepare(row, k, T: tl.constexpr):
    return (
        k < 0,
        tl.load(row).to(T),
        tl.load(row + 1).to(T),
        tl.load(row + 2).to(T),
        tl.load(row + 3).to(T),
    )


@triton.jit
def lion_direction(d, s0, s1, s2, inside, numbers):
    """Lion: the sign of one average of the gradient, while a slower one is kept."""
    _, beta1, one_minus_beta1, beta2, one_minus_beta2 = numbers
    c = beta1 * s0 + one_minus_beta1 * d
    s0 = beta2 * s0 + one_minus_beta2 * d
    return tl.where(c > 0, 1.0, tl.where(c < 0, -1.0, c)), s0, s1, s2


@dataclass(frozen=True)
class TritonRule:
    """A rule's functions, and what goes with them.

    Attributes
    ----------
    fields : tuple of str
        What ``prepare`` reads of a row, in order.
    prepare, direction, conclude : jit functions
    light : bool
        Whether a thread's registers hold 16 elements of weights, gradient and states at once.
    """

    fields: tuple[str, ...]
    prepare: Any
    direction: Any
    conclude: Any = no_conclusion
    light: bool = False


TRITON_RULES: Mapping[str, TritonRule] = {
    "sgd": TritonRule(
        ("momentum", "one_minus_dampening", "nesterov"),
        sgd_prepare,
        sgd_direction,
        sgd_conclude,
        light=True,
    ),
    "rmsprop": TritonRule(
        ("alpha", "one_minus_alpha", "eps_inside", "eps_outside", "momentum", "centered"),
        rmsprop_prepare,
        rmsprop_direction,
        rmsprop_conclude,
    ),
    "adagrad": TritonRule(("eps",), adagrad_prepare, adagrad_direction, light=True),
    "adam": TritonRule(
        (
            "beta1",
            "beta2",
            "one_minus_beta1",
            "one_minus_beta2",
            "eps",
            "amsgrad",
            "bias_correction",
        ),
        adam_prepare,
        adam_direction,
        adam_conclude,
    ),
    "adadelta": TritonRule(("rho", "one_minus_rho", "eps"), adadelta_prepare, adadelta_direction),
    "lion": TritonRule(
        ("beta1", "one_minus_beta1", "beta2", "one_minus_beta2"),
        lion_prepare,
        lion_direction,
        light=True,
    ),
}
"""By the names of `date_kernels.rules.RULES`."""
