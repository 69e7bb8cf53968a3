"""What holds of every step of the kernels, whatever the numbers in it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from helpers import DTYPES, Call, Options, bits, make_call, random_tensors
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from variants import VARIANTS

from date_kernels import MASTER, Telemetry, reference
from date_kernels.items import LEAF
from date_kernels.layers import HALF
from date_kernels.plan import Plan
from date_kernels.rules import RULES

many = settings(max_examples=300)

SIZES = st.sampled_from([1, 2, 15, 16, 17, 100, LEAF + 1])
EXPONENTS: dict[torch.dtype, tuple[int, int]] = {
    torch.float32: (-149, 125),
    torch.float64: (-500, 500),  # squares are taken in float64
    torch.bfloat16: (-133, 125),
    torch.float16: (-24, 13),
}
"""Scales of normal numbers that a dtype can hold, its subnormal ones included."""


@dataclass(frozen=True)
class Case:
    """A step of one layer: its rule's variant, dtypes, size and random numbers.

    Attributes
    ----------
    variant : str
        A key of `VARIANTS`.
    dtypes : pair of torch.dtype
        The parameter's and the gradient's.
    master : bool
        Whether master weights are asked for.
    size, seed : int
    taken : int or None
        Steps taken before; None is a fresh state.
    options : dict
        Beyond the variant's.
    """

    variant: str
    dtypes: tuple[torch.dtype, torch.dtype]
    master: bool
    size: int
    seed: int
    taken: int | None
    options: Options

    def numbers(self) -> tuple[Tensor, Tensor]:
        """Standard normal weights and gradient in their dtypes."""
        w, g = random_tensors([self.size, self.size], self.seed)
        return w.to(self.dtypes[0]), g.to(self.dtypes[1])

    def call(self, weight: Tensor, gradient: Tensor) -> Call:
        rule, options = VARIANTS[self.variant]
        group = {"trust": True, **options, "master_weights": self.master, **self.options}
        return make_call(rule, [weight.clone()], [gradient], group, taken=self.taken)

    def step(self, weight: Tensor, gradient: Tensor) -> Telemetry:
        """Take the step on copies."""
        return take(self.call(weight, gradient))


def take(call: Call, **kwargs: Any) -> Telemetry:
    return call.take(Plan(call.rule, chunk=LEAF).step, **kwargs)


def cases(
    options: st.SearchStrategy[Options],
    *,
    outside: bool = False,
    taken: st.SearchStrategy[int | None] | None = None,
) -> st.SearchStrategy[Case]:
    """Return steps of any kind, or of those rates and ratios alone that stand outside a buffer."""
    names = [
        name
        for name, (_, chosen) in VARIANTS.items()
        if not outside or chosen["momentum_scaling"] == "outside"
    ]
    return st.builds(
        Case,
        variant=st.sampled_from(names),
        dtypes=st.sampled_from(DTYPES),
        master=st.booleans(),
        size=SIZES,
        seed=st.integers(0, 1000),
        taken=st.sampled_from([None, 0, 1, 30]) if taken is None else taken,
        options=options,
    ).map(possible)


def possible(case: Case) -> Case:
    """Return the case with the update's ratio only where that is not circular."""
    options = case.options
    if VARIANTS[case.variant][1]["momentum_scaling"] != "outside":
        options = {**options, "trust_of": "gradient"}
    if options.get("trust_of") == "update":
        options = {**options, "trust_weight_decay": "ignored"}
    return replace(case, options=options)


OF = st.sampled_from(["gradient", "update"])
PLACES = st.sampled_from(["gradient", "update", "weights"])
BOUNDS = st.lists(st.floats(0, allow_nan=False), min_size=2, max_size=2).map(sorted)
RATIO = {
    "trust_of": OF,
    "trust_weight_decay": st.sampled_from(["ignored", "added", "combined"]),
    "trust_coefficient": st.sampled_from([0.0, 1e-3, 1.0, 1e6]),
    "trust_eps": st.sampled_from([0.0, 1e-8]),
    "trust_zero_norm": st.sampled_from([0.0, 1.0, 1e3]),
    "trust_weight_norm_bounds": st.sampled_from([None, (0.0, 10.0), (1.0, math.inf)]),
    "trust_clip_by_lr": st.booleans(),
    "weight_decay": st.sampled_from([0.0, 1e-4, 0.5]),
    "weight_decay_in": PLACES,
    "maximize": st.booleans(),
}


def scaled(tensor: Tensor, place: float) -> Tensor:
    """Return the tensor times a power of two somewhere between the ends of its dtype's range."""
    low, high = EXPONENTS[tensor.dtype]
    exponent = round(low + place * (high - low))
    return (tensor.double() * 2.0**exponent).to(tensor.dtype)


@many
@given(
    cases(
        st.fixed_dictionaries(
            {
                **RATIO,
                "lr": st.sampled_from([0.0, 1e-3, 1.0]),
                "trust_bounds": st.sampled_from(["constant", "adabound"]),
                "trust_final": st.sampled_from([1e-3, 1.0]),
                "trust_gamma": st.sampled_from([1e-3, 1.0]),
            }
        )
    ),
    BOUNDS,
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_the_ratio_is_within_its_bounds(
    case: Case, bounds: list[float], weight_place: float, gradient_place: float
) -> None:
    """Of data of any scale: a NaN there is only for a norm that is not finite."""
    lower, upper = bounds
    assume(lower < math.inf)
    case = replace(case, options={**case.options, "trust_lower": lower, "trust_upper": upper})
    weight, gradient = case.numbers()
    call = case.call(scaled(weight, weight_place), scaled(gradient, gradient_place))
    k = 1 + (case.taken or 0)
    rule = RULES[call.rule]
    lower, upper = reference.trust_bounds(rule.complete(call.groups[0]), k)
    telemetry = take(call)
    ratio, raw = telemetry.ratio[0], telemetry.raw_ratio[0]
    norms = telemetry.weight_norm[0], telemetry.measured_norm[0]
    assert math.isfinite(norms[0])
    if not math.isfinite(norms[1]):
        assert case.options["trust_of"] == "update" or case.options["weight_decay"] > 0
        assert math.isnan(ratio)
        return
    assert lower <= ratio <= upper
    assert telemetry.clamp[0] == (raw > upper) * 1 - (raw < lower) * 1
    assert ratio == raw or telemetry.clamp[0] != 0


@many
@given(
    cases(st.fixed_dictionaries({"trust_of": OF})),
    st.integers(-8, 8),
    st.integers(-8, 8),
)
def test_the_ratio_scales_with_the_weights_and_against_the_gradient(
    case: Case, a: int, b: int
) -> None:
    """By powers of two exactly: the norms are of the numbers, whatever arithmetic steps them."""
    # Numbers that stay normal in float16: subnormal ones lose bits.
    weight, gradient = (x.where(x.abs() >= 2.0**-6, 0.0) for x in case.numbers())
    assume(weight.any() and gradient.any())
    one, other = case.step(weight, gradient), case.step(weight * 2.0**a, gradient)
    if not case.master or case.dtypes[0] not in HALF or case.taken is None:
        assert other.weight_norm[0] == one.weight_norm[0] * 2.0**a
        assert other.raw_ratio[0] == one.raw_ratio[0] * 2.0**a
    assert other.measured_norm[0] == one.measured_norm[0]
    if case.options["trust_of"] == "gradient":
        other = case.step(weight, gradient * 2.0**b)
        assert other.measured_norm[0] == one.measured_norm[0] * 2.0**b
        assert other.raw_ratio[0] == one.raw_ratio[0] / 2.0**b


def assert_still(call: Call, weight: Tensor) -> None:
    """Assert that weights, and a master, are what they were; the sign of a zero may differ."""
    assert torch.equal(call.params[0], weight)
    master = call.states[MASTER][0]
    assert master is None or bits(call.params[0]) == bits(master.to(weight.dtype))


@many
@given(
    cases(
        st.fixed_dictionaries({**RATIO, "weight_decay": st.just(0.0)}),
        taken=st.none(),
    ),
    st.integers(1, 3),
    st.floats(0, 1),
)
def test_gradients_of_zero_move_nothing_from_a_fresh_state(
    case: Case, steps: int, place: float
) -> None:
    weight = scaled(case.numbers()[0], place)
    call = case.call(weight, torch.zeros(case.size, dtype=case.dtypes[1]))
    for _ in range(steps):
        telemetry = take(call)
        assert_still(call, weight)
        assert telemetry.measured_norm[0] == 0
        assert telemetry.raw_ratio[0] == case.options["trust_zero_norm"]
    assert call.steps[0] == steps


@many
@given(
    cases(st.fixed_dictionaries({**RATIO, "lr": st.just(0.0), "trust": st.booleans()})),
    st.integers(1, 3),
    st.floats(0, 100),
)
def test_a_rate_of_zero_moves_nothing(case: Case, steps: int, upper: float) -> None:
    """In any state, but for a buffer that holds earlier rates: from a fresh state then."""
    case = replace(case, options={**case.options, "trust_upper": upper})
    if VARIANTS[case.variant][1]["momentum_scaling"] == "inside":
        case = replace(case, taken=None)
    weight, gradient = case.numbers()
    call = case.call(weight, gradient)
    master = call.states[MASTER][0]
    kept = None if master is None else master.clone()
    for _ in range(steps):
        take(call)
        assert_still(call, weight)
        assert master is None or kept is None or torch.equal(master, kept)
    assert call.steps[0] == (case.taken or 0) + steps


@many
@given(cases(st.fixed_dictionaries(RATIO)), st.integers(0, 60), st.booleans())
def test_a_power_of_two_is_scaled_away(case: Case, exponent: int, maximize: bool) -> None:
    """A gradient times the scale that it is divided by is the gradient, in every bit."""
    assume(case.dtypes[1] != torch.float16)
    case = replace(case, options={**case.options, "maximize": maximize})
    weight, gradient = case.numbers()
    one, other = case.call(weight, gradient), case.call(weight, gradient * 2.0**exponent)
    telemetry, others = take(one), take(other, grad_scale=2.0**exponent)
    for a, b in zip(one.written(), other.written(), strict=True):
        assert bits(a) == bits(b)
    for key in ("weight_norm", "measured_norm", "raw_ratio", "ratio", "clamp"):
        np.testing.assert_array_equal(getattr(telemetry, key), getattr(others, key))
