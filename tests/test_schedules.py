"""The curves alone: golden columns in real iterations, and what each formula promises."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from date_optim.schedules import (
    WARMUPS,
    Constant,
    ConstantWarmup,
    Cosine,
    Cyclical,
    Decay,
    Exponential,
    MultiStep,
    Polynomial,
    RollerCoaster,
    cosine_warmup,
    linear_warmup,
    quadratic_warmup,
)

ROOT = Path(__file__).parents[1]
GOLDEN = json.loads((ROOT / "tests/golden/schedules.json").read_text())
POSITIVE = st.floats(1e-3, 1e6)
SHARE = st.floats(0.0, 1.0)

FALLING: list[Decay] = [
    Polynomial(0.5),
    Polynomial(2.0, shifted=False),
    RollerCoaster(floor=1e-9),
    Constant(),
    MultiStep([30, 60, 80]),
    MultiStep((5.5,), gamma=0.5, inclusive=False),
    Exponential(0.9, hold=7),
    Cosine(),
]
CYCLING: list[Decay] = [
    Cosine(period=7),
    Cyclical(base=0.1, half_period=3.5),
    Cyclical(base=0.1, half_period=3.5, from_peak=True),
]


def golden(value: float) -> Any:
    return pytest.approx(value, rel=1e-12, abs=0.0)


@pytest.mark.parametrize(
    ("column", "warmup", "W", "decay"),
    [
        (1, None, 0.0, Cosine()),
        (2, linear_warmup, 10.0, Cosine()),
        (3, cosine_warmup, 10.0, Cosine()),
        (4, linear_warmup, 10.0, Polynomial(0.5)),
        (5, linear_warmup, 10.0, Polynomial(1.0)),
        (6, linear_warmup, 10.0, Polynomial(2.0)),
        (7, None, 0.0, Cosine(period=25)),
        (8, None, 0.0, Cyclical(base=0.1, half_period=40)),
    ],
)
def test_generic_golden_column(column: int, warmup: Any, W: float, decay: Decay) -> None:
    for row in GOLDEN["generic"]:
        i = row[0]
        eta = warmup(i, W) if i < W else decay(i, W, 100.0)
        assert eta == golden(row[column])


@pytest.mark.parametrize(
    ("decay", "column"),
    [
        (MultiStep((30, 60, 80)), "multistep"),
        (Polynomial(2.0, shifted=False), "poly_global"),
        (Polynomial(2.0), "poly_shift"),
    ],
)
def test_legw_imagenet_in_epochs(decay: Decay, column: str) -> None:
    tables = {row["B"]: row for row in GOLDEN["imagenet"]}
    for row in GOLDEN["legw_imagenet"]:
        table = tables[row["B"]]
        e, w, peak = row["e"], table["w_epochs"], table["lr"]
        eta = peak * linear_warmup(e, w) if e < w else decay(e, w, 90.0, peak)
        assert eta == golden(row[column])


@pytest.mark.parametrize(("warm_epochs", "column"), [(16.0, "target"), (2.0, "printed")])
def test_date_mnist_in_iterations(warm_epochs: float, column: str) -> None:
    """Line 8 of Algorithm 1: the denominator is I - W for W = I * w/E."""
    total, peak, W = 220.0, 1.25e-3 * math.sqrt(8), 2 * 60_000 / 1024
    for row in GOLDEN["date_mnist_8192_I220"]:
        i = row["i"]
        start = total * warm_epochs / 30
        eta = peak * linear_warmup(i, W) if i < W else RollerCoaster()(i, start, total, peak)
        assert eta == golden(row[column])


def test_exponential_of_ptb() -> None:
    """LEGW's PTB-small, 13 epochs in 2 steps each: the factors written out."""
    factors = [1.0] * 7 + [0.4, 0.16, 0.064, 0.0256, 0.01024, 0.004096]
    steps = [Exponential(0.4, hold=7)(i, 0.0, 26.0, 0.5, epoch=2.0) for i in range(1, 27)]
    assert steps == [golden(0.5 * factor) for factor in factors for _ in range(2)]
    assert Exponential(0.4)(1.0, 0.0, 13.0) == 0.4  # nothing held: the first epoch has fallen


@pytest.mark.parametrize(("inclusive", "at_boundary"), [(True, 0.5), (False, 1.0)])
def test_multi_step_at_its_boundary(inclusive: bool, at_boundary: float) -> None:
    decay = MultiStep([3, 6], gamma=0.5, inclusive=inclusive)
    before, after = math.nextafter(3.0, 0.0), math.nextafter(3.0, 4.0)
    assert [decay(e, 0.0, 9.0) for e in (before, 3.0, after)] == [1.0, at_boundary, 0.5]
    assert decay(9.0, 0.0, 9.0, 8.0) == 2.0


@given(i=POSITIVE, factor=st.sampled_from([0.25, 1024.0]), W=SHARE)
@pytest.mark.parametrize("decay", [*FALLING, *CYCLING])
def test_any_unit_gives_the_same_rate(decay: Decay, i: float, factor: float, W: float) -> None:
    """Powers of 2, which round nothing."""
    end = i * (1 + W)
    assume(W * i < end)
    scaled = decay(factor * i, factor * (W * i), factor * end, 0.3, epoch=factor)
    assert scaled == decay(i, W * i, end, 0.3)


@given(share=SHARE, W=POSITIVE, length=POSITIVE, peak=POSITIVE)
@pytest.mark.parametrize("decay", [*FALLING, *CYCLING])
def test_decay_stays_within_the_peak(
    decay: Decay, share: float, W: float, length: float, peak: float
) -> None:
    end = W + length
    i = min(W + share * length, end)
    assert 0.0 <= decay(i, W, end, peak) <= peak


@given(first=SHARE, second=SHARE, W=st.floats(0.0, 20.0))
@pytest.mark.parametrize("decay", FALLING)
def test_decay_falls(decay: Decay, first: float, second: float, W: float) -> None:
    early, late = (min(W + (100.0 - W) * share, 100.0) for share in sorted((first, second)))
    assert decay(early, W, 100.0) >= decay(late, W, 100.0)


STARTS_AT_THE_PEAK: list[Decay] = [
    Polynomial(0.5),
    Polynomial(2.0),
    RollerCoaster(),
    Constant(),
    Cosine(),
    Cosine(period=7),
    Cyclical(base=0.1, half_period=3.5, from_peak=True),
]


@pytest.mark.parametrize("decay", STARTS_AT_THE_PEAK)
@given(W=st.floats(0.0, 200.0))
def test_decay_starts_at_the_peak(decay: Decay, W: float) -> None:
    assert decay(W, W, 220.0, 0.5) == 0.5


@pytest.mark.parametrize("decay", STARTS_AT_THE_PEAK)
@given(W=st.floats(0.0, 200.0), after=st.floats(0.0, 1e-6))
def test_decay_is_continuous_at_its_start(decay: Decay, W: float, after: float) -> None:
    """The steepest is a square root: it loses sqrt(x) at most, and 20 epochs are left."""
    assert decay(W + after, W, 220.0) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("decay", [Polynomial(2.0), Polynomial(0.5, shifted=False), Cosine()])
def test_decay_without_a_floor_ends_at_zero(decay: Decay) -> None:
    assert decay(220.0, 117.1875, 220.0, 0.5) == 0.0


@pytest.mark.parametrize("decay", [Cosine(period=7), CYCLING[1], CYCLING[2]])
@given(eighths=st.integers(0, 55), periods=st.integers(1, 50), W=st.integers(0, 20))
def test_cycles_repeat(decay: Decay, eighths: int, periods: int, W: int) -> None:
    """In eighths, which are exact: 7 is Smith's whole cycle, a rise and a fall of 3.5 each."""
    i = W + eighths / 8
    assert decay(i + 7 * periods, W, 1000.0) == decay(i, W, 1000.0)


def test_cosine_restarts_at_the_peak_from_almost_nothing() -> None:
    decay = Cosine(period=7)
    assert decay(14.0, 0.0, 100.0, 0.5) == 0.5
    assert 0.0 < decay(math.nextafter(14.0, 0.0), 0.0, 100.0, 0.5) < 1e-30


@given(i=st.floats(0.0, 1e4), base=st.floats(1e-3, 1.0), half_period=st.floats(1e-2, 1e3))
def test_triangular_range(i: float, base: float, half_period: float) -> None:
    up = Cyclical(base, half_period)(i, 0.0, 1e4)
    down = Cyclical(base, half_period, from_peak=True)(i, 0.0, 1e4)
    assert base * (1 - 1e-15) <= min(up, down)
    assert max(up, down) <= 1.0
    assert up + down == pytest.approx(1.0 + base, rel=1e-14)  # the one rises as the other falls


def test_triangular_corners() -> None:
    decay = Cyclical(base=0.25, half_period=4)
    assert [decay(i, 2.0, 99.0, 8.0) for i in (2, 4, 6, 8, 10)] == [2.0, 5.0, 8.0, 5.0, 2.0]


@pytest.mark.parametrize("name", ["linear", "quadratic", "cosine"])
@given(first=SHARE, second=SHARE, W=POSITIVE)
def test_warmup_rises_from_zero_to_one(name: str, first: float, second: float, W: float) -> None:
    warmup = WARMUPS[name]
    early, late = sorted((first, second))
    assert warmup(0.0, W) == 0.0
    assert 0.0 <= warmup(early * W, W) <= warmup(late * W, W) <= 1.0
    assert warmup(W, W) == 1.0


@given(W=POSITIVE, share=SHARE)
def test_cosine_warmup_is_half_a_wave(W: float, share: float) -> None:
    wave = (1 - math.cos(math.pi * share)) / 2
    assert cosine_warmup(share * W, W) == pytest.approx(wave, rel=0.0, abs=4e-16)


@given(W=POSITIVE, share=SHARE, fraction=st.floats(1e-3, 1.0))
def test_constant_warmup(W: float, share: float, fraction: float) -> None:
    assert ConstantWarmup(fraction)(share * W, W) == fraction


def test_constant_warmup_by_name() -> None:
    assert WARMUPS["constant"] == ConstantWarmup() == ConstantWarmup(0.1)


@given(W=POSITIVE, share=SHARE)
def test_quadratic_warmup_is_the_linear_one_squared(W: float, share: float) -> None:
    assert quadratic_warmup(share * W, W) == linear_warmup(share * W, W) ** 2


@given(peak=POSITIVE, i=SHARE)
def test_roller_coaster_is_a_polynomial(peak: float, i: float) -> None:
    assert RollerCoaster()(i, 0.25, 1.0, peak) == Polynomial(1.0, floor=1e-6)(i, 0.25, 1.0, peak)


def test_global_polynomial_jumps_where_it_starts() -> None:
    assert Polynomial(2.0, shifted=False)(25.0, 25.0, 100.0) == 0.75**2


@pytest.mark.parametrize("decay", [Polynomial(2.0, floor=1e-3), RollerCoaster(floor=1e-3)])
def test_floor_is_a_rate_and_not_a_share_of_the_peak(decay: Decay) -> None:
    assert decay(100.0, 10.0, 100.0, 0.1) == 1e-3


@pytest.mark.parametrize(
    ("curve", "arguments", "error", "message"),
    [
        (Polynomial, {"power": 0.0}, ValueError, "power must be finite and above 0, got 0.0"),
        (Polynomial, {"power": math.nan}, ValueError, "power must be finite and above 0, got nan"),
        (Polynomial, {"power": True}, TypeError, "power must be a number, got True of type bool"),
        (Polynomial, {"power": 1.0, "floor": -1.0}, ValueError, "floor must be .* at least 0, got"),
        (Polynomial, {"power": 1.0, "shifted": 1}, TypeError, "shifted must be True or False, got"),
        (RollerCoaster, {"floor": "0"}, TypeError, "floor must be a number, got '0'"),
        (RollerCoaster, {"paper_printed": None}, TypeError, "paper_printed must be True or False"),
        (MultiStep, {"boundaries": 30}, TypeError, "boundaries must be a list or tuple .*, got 30"),
        (MultiStep, {"boundaries": "36"}, TypeError, "boundaries must be a list or tuple"),
        (MultiStep, {"boundaries": []}, ValueError, r"must be one number or more .*, got \[\]"),
        (MultiStep, {"boundaries": [3, 2]}, ValueError, r"that increase, got \[3, 2\]"),
        (MultiStep, {"boundaries": [3, 3.0]}, ValueError, r"that increase, got \[3, 3.0\]"),
        (MultiStep, {"boundaries": [3, None]}, TypeError, r"boundaries\[1\] must be a number, got"),
        (MultiStep, {"boundaries": [0]}, ValueError, r"boundaries\[0\] must be .* above 0, got 0"),
        (MultiStep, {"boundaries": [3], "gamma": 1.5}, ValueError, "gamma must be at most 1, got"),
        (MultiStep, {"boundaries": [3], "gamma": 0}, ValueError, "gamma must be .* above 0, got 0"),
        (MultiStep, {"boundaries": [3], "inclusive": ">="}, TypeError, "inclusive must be True or"),
        (Exponential, {"gamma": 2}, ValueError, "gamma must be at most 1, got 2"),
        (Exponential, {"gamma": 0.4, "hold": -1}, ValueError, "hold must be at least 0, got -1"),
        (Exponential, {"gamma": 0.4, "hold": 1.5}, TypeError, "hold must be an int, got 1.5"),
        (Cosine, {"period": 0.0}, ValueError, "period must be finite and above 0, got 0.0"),
        (Cosine, {"period": "7"}, TypeError, "period must be a number, got '7'"),
        (Cyclical, {"base": 0, "half_period": 4}, ValueError, "base must be .* above 0, got 0"),
        (Cyclical, {"base": 1.1, "half_period": 4}, ValueError, "base must be at most 1, got 1.1"),
        (Cyclical, {"base": 0.1, "half_period": -4}, ValueError, "half_period must be .* got -4"),
        (
            Cyclical,
            {"base": 0.1, "half_period": 4, "from_peak": 1},
            TypeError,
            "from_peak must be True or False, got 1",
        ),
        (ConstantWarmup, {"fraction": 0.0}, ValueError, "fraction must be .* above 0, got 0.0"),
        (ConstantWarmup, {"fraction": 1.01}, ValueError, "fraction must be at most 1, got 1.01"),
        (ConstantWarmup, {"fraction": True}, TypeError, "fraction must be a number, got True"),
    ],
)
def test_invalid_argument(
    curve: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        curve(**arguments)


def test_boundaries_become_a_tuple_of_floats() -> None:
    decay = MultiStep([30, np.float64(60.5), 80.0])
    assert decay.boundaries == (30.0, 60.5, 80.0)
    assert {type(boundary) for boundary in decay.boundaries} == {float}
    assert hash(decay) == hash(MultiStep((30, 60.5, 80)))


def test_recipe_and_schedules_import_without_torch() -> None:
    code = f"""
import sys, types
package = types.ModuleType("date_optim")
package.__path__ = [{str(ROOT / "python/date_optim")!r}]
sys.modules["date_optim"] = package
sys.modules["torch"] = None
from date_optim.recipe import Recipe
Recipe(32, 0.1, 1, 10, 1000).at(64).lr(1)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
