"""The curves alone: golden columns in real iterations, and what each formula promises."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from date_optim.schedules import (
    Constant,
    Decay,
    Polynomial,
    RollerCoaster,
    linear_warmup,
    quadratic_warmup,
)

ROOT = Path(__file__).parents[1]
GOLDEN = json.loads((ROOT / "tests/golden/schedules.json").read_text())
POSITIVE = st.floats(1e-3, 1e6)
SHARE = st.floats(0.0, 1.0)


def golden(value: float) -> Any:
    return pytest.approx(value, rel=1e-12, abs=0.0)


@pytest.mark.parametrize(("power", "column"), [(0.5, 4), (1.0, 5), (2.0, 6)])
def test_polynomial_matches_golden(power: float, column: int) -> None:
    W, end = 10.0, 100.0
    for row in GOLDEN["generic"]:
        i = row[0]
        eta = linear_warmup(i, W) if i < W else Polynomial(power)(i, W, end)
        assert eta == golden(row[column])


@pytest.mark.parametrize(("shifted", "column"), [(True, "poly_shift"), (False, "poly_global")])
def test_polynomial_matches_legw_imagenet_in_epochs(shifted: bool, column: str) -> None:
    epochs = 90.0
    tables = {row["B"]: row for row in GOLDEN["imagenet"]}
    for row in GOLDEN["legw_imagenet"]:
        table = tables[row["B"]]
        e, w, peak = row["e"], table["w_epochs"], table["lr"]
        decay = Polynomial(2.0, shifted=shifted)
        eta = peak * linear_warmup(e, w) if e < w else decay(e, w, epochs, peak)
        assert eta == golden(row[column])


@given(W=POSITIVE, share=SHARE)
def test_quadratic_warmup_is_the_linear_one_squared(W: float, share: float) -> None:
    assert quadratic_warmup(share * W, W) == linear_warmup(share * W, W) ** 2


@given(peak=POSITIVE, i=SHARE)
def test_roller_coaster_is_a_polynomial(peak: float, i: float) -> None:
    assert RollerCoaster()(i, 0.25, 1.0, peak) == Polynomial(1.0, floor=1e-6)(i, 0.25, 1.0, peak)


@given(decay=st.sampled_from([Polynomial(0.5), Polynomial(2.0), RollerCoaster(), Constant()]))
def test_decay_starts_at_the_peak(decay: Decay) -> None:
    assert decay(117.1875, 117.1875, 220.0, 0.5) == 0.5


def test_global_polynomial_jumps_where_it_starts() -> None:
    assert Polynomial(2.0, shifted=False)(25.0, 25.0, 100.0) == 0.75**2


@pytest.mark.parametrize("decay", [Polynomial(2.0, floor=1e-3), RollerCoaster(floor=1e-3)])
def test_floor_is_a_rate_and_not_a_share_of_the_peak(decay: Decay) -> None:
    assert decay(100.0, 10.0, 100.0, 0.1) == 1e-3


@pytest.mark.parametrize(
    ("decay", "arguments", "error", "message"),
    [
        (Polynomial, {"power": 0.0}, ValueError, "power must be finite and above 0, got 0.0"),
        (Polynomial, {"power": math.nan}, ValueError, "power must be finite and above 0, got nan"),
        (Polynomial, {"power": True}, TypeError, "power must be a number, got True of type bool"),
        (Polynomial, {"power": 1.0, "floor": -1.0}, ValueError, "floor must be .* at least 0, got"),
        (Polynomial, {"power": 1.0, "shifted": 1}, TypeError, "shifted must be True or False, got"),
        (RollerCoaster, {"floor": "0"}, TypeError, "floor must be a number, got '0'"),
        (RollerCoaster, {"paper_printed": None}, TypeError, "paper_printed must be True or False"),
    ],
)
def test_invalid_decay(
    decay: type[Decay], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        decay(**arguments)


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
