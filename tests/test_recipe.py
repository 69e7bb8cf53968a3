"""A recipe against the papers' tables, and what scaling must and must not change."""

import doctest
import json
import math
import pickle
from dataclasses import FrozenInstanceError
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from date_optim import recipe as recipe_module
from date_optim.recipe import Recipe
from date_optim.schedules import (
    Constant,
    ConstantWarmup,
    Cosine,
    Cyclical,
    Decay,
    Exponential,
    MultiStep,
    Polynomial,
    RollerCoaster,
)

GOLDEN = json.loads((Path(__file__).parent / "golden/schedules.json").read_text())
DATE_MNIST: dict[str, Any] = {
    "batch_size": 1024,
    "lr": 1.25e-3,
    "warmup_epochs": 2,
    "epochs": 30,
    "samples": 60_000,
    "iterations": 1755,
}
FALLING: list[Decay] = [
    RollerCoaster(),
    Polynomial(2.0),
    Polynomial(0.5, shifted=False),
    Constant(),
    MultiStep((30, 60, 80)),
    Exponential(0.9, hold=7),
    Cosine(),
]
DECAYS: list[Decay] = [
    *FALLING,
    Cosine(period=2.5),
    Cyclical(base=0.1, half_period=1.25),
    Cyclical(base=0.1, half_period=1.25, from_peak=True),
]
WARMUPS = ["constant", "linear", "quadratic", "cosine", ConstantWarmup(0.5)]


def golden(value: float) -> Any:
    return pytest.approx(value, rel=1e-12, abs=0.0)


@st.composite
def recipes(draw: st.DrawFn, /, **fixed: Any) -> Recipe:
    """Baselines whose warm-up fits."""
    epochs = draw(st.floats(0.01, 200.0))
    arguments: dict[str, Any] = {
        "batch_size": draw(st.integers(1, 2**15)),
        "lr": draw(st.floats(1e-5, 30.0)),
        "warmup_epochs": epochs * draw(st.floats(0.0, 0.9)),
        "epochs": epochs,
        "samples": draw(st.integers(1, 2_000_000)),
        "scaling": draw(st.sampled_from(["sqrt", "linear"])),
        "warmup": draw(st.sampled_from(WARMUPS)),
        "decay": draw(st.sampled_from(DECAYS)),
    }
    return Recipe(**arguments | fixed)


batches = st.integers(1, 2**17)


@pytest.mark.parametrize("row", GOLDEN["imagenet"], ids=lambda row: row["B"])
def test_legw_imagenet(row: dict[str, float]) -> None:
    recipe = Recipe(1024, 2**2.5, 10 / 2**5, 90, 1_281_167, decay=Polynomial(2.0)).at(int(row["B"]))
    assert recipe.peak == golden(row["lr"])
    assert recipe.warmup_epochs == row["w_epochs"]
    assert recipe.warmup_iterations == golden(row["w_iters"])
    assert recipe.iterations == math.ceil(row["total_iters"])


@pytest.mark.parametrize("row", GOLDEN["gnmt"], ids=lambda row: row["B"])
def test_legw_gnmt(row: dict[str, float]) -> None:
    B, lr, samples = int(row["B"]), 2**-0.5 / 1000, 3_500_000
    printed = Recipe(256, lr, 0.0145, 2, samples).at(B)
    assert printed.peak == golden(row["lr"])
    assert printed.warmup_epochs == golden(row["w_epochs"])
    assert printed.warmup_iterations == golden(row["w_iters"])
    assert printed.iterations == math.ceil(row["total_iters"])
    stored = Recipe(256, lr, Fraction(200 * 256, samples), 2, samples).at(B)
    assert stored.warmup_iterations == 200
    assert stored.warmup_epochs == golden(row["w200_epochs"])


@pytest.mark.parametrize(
    ("column", "changes"),
    [
        ("target", {}),
        ("printed", {"decay": RollerCoaster(paper_printed=True)}),
        ("quad", {"warmup": "quadratic"}),
    ],
)
def test_date_mnist_at_8192(column: str, changes: dict[str, Any]) -> None:
    recipe = Recipe(**DATE_MNIST | changes).at(8192)
    assert recipe.iterations == 220
    for row in GOLDEN["date_mnist_8192_I220"]:
        assert recipe.lr(row["i"]) == golden(row[column])


def test_date_mnist_at_its_baseline() -> None:
    recipe = Recipe(**DATE_MNIST)
    for row in GOLDEN["date_mnist_1024_I1755"]:
        assert recipe.lr(row["i"]) == golden(row["target"])


@pytest.mark.parametrize("row", GOLDEN["date_mnist_all"], ids=lambda row: row["B"])
def test_date_mnist_at_every_batch(row: dict[str, Any]) -> None:
    recipe = Recipe(**DATE_MNIST).at(row["B"], allow_warmup_only=row["B"] >= 15_360)
    last_of_warmup = row["warm_iters_run"]
    assert recipe.peak == golden(row["peak"])
    assert recipe.warmup_epochs == row["w"]
    assert recipe.iterations == row["I"]
    assert last_of_warmup == min(math.ceil(recipe.warmup_iterations) - 1, recipe.iterations)
    assert recipe.lr(1) == golden(row["first"])
    assert recipe.lr(last_of_warmup) == golden(row["at_end_warm"])
    assert recipe.lr(row["I"]) == golden(row["last"])
    if row["first_decay"] is not None:
        assert recipe.lr(last_of_warmup + 1) == golden(row["first_decay"])


@pytest.mark.parametrize(
    ("column", "changes"),
    [
        (1, {"warmup_epochs": 0, "decay": Cosine()}),
        (2, {"decay": Cosine()}),
        (3, {"warmup": "cosine", "decay": Cosine()}),
        (4, {"decay": Polynomial(0.5)}),
        (5, {"decay": Polynomial(1.0)}),
        (6, {"decay": Polynomial(2.0)}),
        (7, {"warmup_epochs": 0, "decay": Cosine(period=25)}),
        (8, {"warmup_epochs": 0, "decay": Cyclical(base=0.1, half_period=40)}),
    ],
)
@pytest.mark.parametrize("epoch", [1, 10])
def test_generic_golden_column(column: int, changes: dict[str, Any], epoch: int) -> None:
    """Iterations as epochs of one sample, and as tenths of an epoch of ten."""
    arguments: dict[str, Any] = {"warmup_epochs": 10, "epochs": 100} | changes
    decay = arguments["decay"]
    for name in ("warmup_epochs", "epochs"):
        arguments[name] = Fraction(arguments[name], epoch)
    if isinstance(decay, Cosine) and decay.period is not None:
        arguments["decay"] = Cosine(period=decay.period / epoch)
    if isinstance(decay, Cyclical):
        arguments["decay"] = Cyclical(decay.base, decay.half_period / epoch)
    recipe = Recipe(batch_size=1, lr=1.0, samples=epoch, **arguments)
    assert recipe.iterations == 100
    for row in GOLDEN["generic"]:
        if row[0] >= 1:
            assert recipe.lr(row[0]) == golden(row[column])


@pytest.mark.parametrize(
    ("decay", "column"),
    [
        (MultiStep((30, 60, 80)), "multistep"),
        (Polynomial(2.0, shifted=False), "poly_global"),
        (Polynomial(2.0), "poly_shift"),
    ],
)
def test_legw_imagenet_curves(decay: Decay, column: str) -> None:
    """As many samples as make the table's epochs whole iterations, in place of 1,281,167."""
    samples = 32_768_000_000
    for row in GOLDEN["legw_imagenet"]:
        recipe = Recipe(1024, 2**2.5, 10 / 2**5, 90, samples, decay=decay).at(int(row["B"]))
        i = Fraction(str(row["e"])) * samples / recipe.batch_size
        assert i.denominator == 1
        if i >= 1:  # a recipe has no iteration 0
            assert recipe.lr(int(i)) == golden(row[column])


@given(recipes(), batches)
def test_warmup_iterations_do_not_depend_on_the_batch(recipe: Recipe, B: int) -> None:
    scaled = recipe.at(B, allow_warmup_only=True)
    assert scaled.warmup_iterations == recipe.warmup_iterations
    k = B / recipe.batch_size
    assert scaled.warmup_epochs == pytest.approx(k * recipe.warmup_epochs, rel=1e-14)


@given(recipes(), batches)
def test_peak_scales_by_the_rule(recipe: Recipe, B: int) -> None:
    k = B / recipe.batch_size
    factor = math.sqrt(k) if recipe.baseline.scaling == "sqrt" else k
    assert recipe.at(B, allow_warmup_only=True).peak == recipe.peak * factor


@given(recipes(), batches, st.data())
def test_never_above_the_peak_and_positive_until_the_end(
    recipe: Recipe, B: int, data: st.DataObject
) -> None:
    scaled = recipe.at(B, allow_warmup_only=True)
    i = data.draw(st.integers(1, scaled.iterations))
    assert 0 <= scaled.lr(i) <= scaled.peak
    assert scaled.lr(i) > 0 or i == scaled.iterations


@given(recipes(), batches, st.data())
def test_warmup_rises(recipe: Recipe, B: int, data: st.DataObject) -> None:
    scaled = recipe.at(B, allow_warmup_only=True)
    last = min(math.ceil(scaled.warmup_iterations) - 1, scaled.iterations)
    assume(last >= 2)
    i = data.draw(st.integers(1, last - 1))
    if recipe.baseline.warmup in {"linear", "quadratic"}:
        assert scaled.lr(i) < scaled.lr(i + 1)
    assert scaled.lr(i) <= scaled.lr(i + 1)  # a cosine is flat, to its last digit, at its ends


@given(st.sampled_from(FALLING).flatmap(lambda decay: recipes(decay=decay)), batches, st.data())
def test_decay_falls(recipe: Recipe, B: int, data: st.DataObject) -> None:
    scaled = recipe.at(B, allow_warmup_only=True)
    first = max(math.ceil(scaled.warmup_iterations), 1)
    assume(first < scaled.iterations)
    i = data.draw(st.integers(first, scaled.iterations - 1))
    assert scaled.lr(i) >= scaled.lr(i + 1)


@given(recipes(warmup_epochs=0), batches, st.data())
def test_without_a_warmup_the_curve_is_the_decays_own(
    recipe: Recipe, B: int, data: st.DataObject
) -> None:
    """In samples, of which an epoch has as many at every batch size."""
    scaled, n = recipe.at(B), recipe.baseline.samples
    i = data.draw(st.integers(1, scaled.iterations))
    decay, end = recipe.baseline.decay, scaled.iterations * B
    assert scaled.lr(i) == min(scaled.peak, decay(i * B, 0.0, end, scaled.peak, epoch=n))


@given(
    B=st.integers(1, 2**14),
    n=st.integers(1000, 2_000_000),
    tenths=st.integers(1, 99),
    inclusive=st.booleans(),
)
def test_boundary_is_met_exactly(B: int, n: int, tenths: int, inclusive: bool) -> None:
    """In integers: E_i = i*B/n against a boundary of so many tenths, which no float is."""
    decay = MultiStep([tenths / 10], gamma=0.5, inclusive=inclusive)
    recipe = Recipe(B, 1.0, 0, 10, n, decay=decay)
    last = tenths * n // (10 * B)  # the last iteration with E_i <= e
    for i in range(max(last - 1, 1), min(last + 2, recipe.iterations) + 1):
        passed = 10 * i * B >= tenths * n if inclusive else 10 * i * B > tenths * n
        assert recipe.lr(i) == (0.5 if passed else 1.0)


@given(B=st.integers(1, 2**14), n=st.integers(1000, 2_000_000), data=st.data())
def test_exponential_counts_epochs_exactly(B: int, n: int, data: st.DataObject) -> None:
    recipe = Recipe(B, 1.0, 0, 10, n, decay=Exponential(0.5, hold=3))
    i = data.draw(st.integers(1, recipe.iterations))
    assert recipe.lr(i) == 0.5 ** max(-(-i * B // n) - 3, 0)


def test_ptb_small_at_a_larger_batch() -> None:
    """LEGW: 20 to 640, 13 epochs; the rate falls at the same epochs and sqrt(32) higher."""
    recipe = Recipe(20, 1.0, 0.125, 13, 2000, decay=Exponential(0.4, hold=7)).at(640)
    assert recipe.peak == golden(math.sqrt(32))
    assert recipe.warmup_epochs == 4.0
    epochs = [math.ceil(i * 640 / 2000) for i in range(13, 42)]
    assert [recipe.lr(i) for i in range(13, 42)] == [
        golden(math.sqrt(32) * 0.4 ** max(epoch - 7, 0)) for epoch in epochs
    ]


def test_constant_warmup() -> None:
    named = Recipe(**DATE_MNIST, warmup="constant").at(8192)
    assert [named.lr(i) / named.peak for i in (1, 117)] == [golden(0.1)] * 2
    assert named.lr(118) == Recipe(**DATE_MNIST).at(8192).lr(118)
    assert named == Recipe(**DATE_MNIST, warmup=ConstantWarmup(0.1)).at(8192)
    assert Recipe(**DATE_MNIST, warmup=ConstantWarmup(0.25)).lr(1) == golden(0.25 * 1.25e-3)


def test_cycle_starts_where_the_warmup_ends() -> None:
    """10 iterations of 25 samples in each epoch, 2 epochs of warm-up, then cycles of 4 epochs."""
    arguments: dict[str, Any] = {"epochs": 10, "samples": 250}

    def rates(decay: Decay) -> list[float]:
        recipe = Recipe(25, 1.0, 2, **arguments, decay=decay)
        return [recipe.lr(i) for i in (20, 40, 50, 60, 80, 100)]

    assert rates(Cosine(period=4)) == [golden(x) for x in (1, 0.5, 0.5 - 0.125**0.5, 1, 0.5, 1)]
    assert rates(Cyclical(0.2, 2)) == [golden(x) for x in (0.2, 1, 0.6, 0.2, 1, 0.2)]
    assert rates(Cyclical(0.2, 2, from_peak=True)) == [golden(x) for x in (1, 0.2, 0.6, 1, 0.2, 1)]


@given(recipes(), batches)
def test_recipes_survive_a_pickle(recipe: Recipe, B: int) -> None:
    scaled = recipe.at(B, allow_warmup_only=True)
    assert pickle.loads(pickle.dumps(scaled)) == scaled


@given(recipes(warmup="linear", decay=RollerCoaster(floor=0.0)), batches)
def test_continuous_where_the_warmup_ends(recipe: Recipe, B: int) -> None:
    """Both lines pass the peak within one iteration of each other, so neither step is longer."""
    assume(recipe._largest_batch >= B)
    scaled = recipe.at(B)
    W, total = scaled.warmup_iterations, scaled.iterations
    last = math.ceil(W) - 1
    assume(last >= 1)
    rounding = 4 * total * math.ulp(1.0)  # of i - W and I - i, which lose what i and I hold
    assert scaled.lr(last) >= scaled.peak * (1 - (1 + rounding) / W)
    assert scaled.lr(last + 1) >= scaled.peak * (1 - (1 + rounding) / (total - W))


@given(recipes(), batches, batches)
def test_scaling_starts_from_the_baseline(recipe: Recipe, first: int, second: int) -> None:
    once = recipe.at(first, allow_warmup_only=True)
    assert once.at(second, allow_warmup_only=True) == recipe.at(second, allow_warmup_only=True)
    assert recipe.at(recipe.batch_size) == recipe


@given(recipes())
def test_baseline_peak_is_the_given_rate(recipe: Recipe) -> None:
    assert recipe.peak == recipe.baseline.lr


@given(recipes())
@example(Recipe(1, 1.0, 2.4474873252973124, 4.894974650594625, 1))  # 2*w0 < E, by 2e-16
def test_largest_batch_is_the_largest(recipe: Recipe) -> None:
    largest = recipe._largest_batch
    assume(largest < 10**12)
    fits, base = recipe.at(int(largest)), recipe.baseline
    w0, E = Fraction(str(base.warmup_epochs)), Fraction(str(base.epochs))
    assert w0 * fits.batch_size / base.batch_size < E
    assert w0 * base.samples / base.batch_size < fits.iterations
    with pytest.raises(ValueError, match=rf"largest batch that fits is {largest}\."):
        recipe.at(int(largest) + 1)


def test_warmup_that_fills_the_run_is_refused_and_can_be_run() -> None:
    recipe = Recipe(**DATE_MNIST)
    assert recipe.at(15_359).lr(118) == 1e-6
    with pytest.raises(
        ValueError, match=r"32 of 30 epochs.*117\.188 of 110 iterations.* fits is 15359\."
    ):
        recipe.at(16_384)
    warmup = recipe.at(16_384, allow_warmup_only=True)
    assert warmup.lr(110) == golden(warmup.peak * 110 / warmup.warmup_iterations)


def test_stated_iterations_can_end_within_the_warmup() -> None:
    """W = 100 iterations; B0*I0/B must exceed it, although w < E until batch 1,000."""
    recipe = Recipe(100, 0.1, 1, 10, 10_000, iterations=400)
    assert recipe.at(399).iterations == 101
    with pytest.raises(
        ValueError, match=r"100 of 100 iterations.*largest batch that fits is 399\."
    ):
        recipe.at(400)


@pytest.mark.parametrize(("iterations", "B"), [(None, 1000), (1001, 1000), (400, 400)])
def test_warmup_only_ends_at_the_peak(iterations: int | None, B: int) -> None:
    recipe = Recipe(100, 0.1, 1, 10, 10_000, iterations).at(B, allow_warmup_only=True)
    assert recipe.lr(99) == golden(recipe.peak * 0.99)
    assert recipe.lr(recipe.iterations) == recipe.peak


def test_warmup_that_rounds_to_the_whole_run() -> None:
    """The start of the decay is 1025 * 0.9999999999999999, which is 1025 in floating point."""
    recipe = Recipe(1, 0.1, 1 / 3, 1, 3075).at(3)
    assert recipe.lr(1025) == recipe.peak


def test_baseline_whose_warmup_fills_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match="no batch fits"):
        Recipe(1, 0.1, 10, 10, 1000)
    with pytest.raises(ValueError, match=r"largest batch that fits is 51\."):
        Recipe(64, 0.1, 10, 8, 1000)


def test_no_warmup() -> None:
    recipe = Recipe(100, 0.1, 0, 10, 1000).at(1000)
    assert recipe.iterations == 10
    assert [recipe.lr(i) for i in (1, 5, 10)] == [
        golden(recipe.peak * 0.9),
        golden(recipe.peak * 0.5),
        1e-6,
    ]


def test_iterations_are_exact() -> None:
    """One tenth is not a binary number: 0.1 * 1000 steps are 100, and 3 * 0.1 is not 0.3."""
    assert Recipe(1, 0.1, 0, 0.1, 1000).iterations == 100
    assert Recipe(1, 0.1, 0, 0.3, 10).iterations == 3
    assert Recipe(1, 0.1, 0, Fraction(5, 3), 3).iterations == 5
    assert Recipe(2, 0.1, 0, 1, 5).at(1).iterations == 5  # I0 = 2.5 is scaled, then rounded
    big = 3 * 10**17
    assert Recipe(1, 0.1, 0, 1, big + 1).at(3).iterations == 10**17 + 1


def test_floor_does_not_lift_the_rate_above_the_peak() -> None:
    recipe = Recipe(100, 1e-7, 1, 10, 1000)
    assert recipe.lr(100) == recipe.peak == 1e-7


@pytest.mark.parametrize(
    "decay", [RollerCoaster(), Cosine(), Cosine(period=1), Cyclical(0.1, 1, from_peak=True)]
)
def test_decay_that_starts_late_is_not_asked_before(decay: Decay) -> None:
    """W = 8.4 but I*w/E = 9.33, since 45 iterations were rounded up to 50: i = 9 lies between."""
    recipe = Recipe(1, 0.1, Fraction(21, 100), Fraction(9, 8), 40, iterations=50, decay=decay)
    assert recipe.warmup_iterations == 8.4
    assert recipe.lr(9) == recipe.peak
    assert recipe.lr(10) < recipe.peak


def test_printed_denominator_does_not_exceed_the_peak_below_the_baseline() -> None:
    recipe = Recipe(**DATE_MNIST, decay=RollerCoaster(paper_printed=True)).at(256)
    assert recipe.lr(118) == recipe.peak


def test_decay_begins_at_the_iteration_that_equals_the_warmup() -> None:
    """E_i < w is strict: the global polynomial has jumped at i = W = 10 already."""
    recipe = Recipe(10, 0.1, 1, 10, 100, decay=Polynomial(2.0, shifted=False))
    assert recipe.lr(9) == golden(0.1 * 0.9)
    assert recipe.lr(10) == golden(0.1 * 0.9**2)


@pytest.mark.parametrize(
    ("decay", "last"), [(RollerCoaster(floor=1e-5), 1e-5), (Polynomial(2.0), 0.0)]
)
def test_rate_stays_after_the_last_iteration(decay: Decay, last: float) -> None:
    recipe = Recipe(**DATE_MNIST, decay=decay).at(8192)
    assert recipe.lr(221) == recipe.lr(10**9) == recipe.lr(220) == last


@pytest.mark.parametrize(
    ("i", "error", "message"),
    [
        (0, ValueError, "i must be at least 1, got 0"),
        (-3, ValueError, "i must be at least 1, got -3"),
        (1.0, TypeError, "i must be an int, got 1.0 of type float"),
    ],
)
def test_invalid_iteration(i: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Recipe(**DATE_MNIST).lr(i)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": True}, TypeError, "batch_size must be an int, got True of type bool"),
        ({"batch_size": 1024.0}, TypeError, "batch_size must be an int, got 1024.0"),
        ({"lr": 0.0}, ValueError, "lr must be finite and above 0, got 0.0"),
        ({"lr": math.nan}, ValueError, "lr must be finite and above 0, got nan"),
        ({"lr": math.inf}, ValueError, "lr must be finite and above 0, got inf"),
        ({"lr": "0.1"}, TypeError, "lr must be a number, got '0.1' of type str"),
        ({"lr": True}, TypeError, "lr must be a number, got True of type bool"),
        ({"warmup_epochs": -1}, ValueError, "warmup_epochs must be finite and at least 0, got -1"),
        ({"warmup_epochs": None}, TypeError, "warmup_epochs must be a number, got None"),
        ({"epochs": 0}, ValueError, "epochs must be finite and above 0, got 0"),
        ({"samples": -5}, ValueError, "samples must be at least 1, got -5"),
        ({"iterations": 0}, ValueError, "iterations must be at least 1, got 0"),
        ({"iterations": 1.5}, TypeError, "iterations must be an int, got 1.5"),
        ({"scaling": "cube"}, ValueError, "scaling must be one of 'sqrt', 'linear', got 'cube'"),
        ({"warmup": ["linear"]}, ValueError, r"warmup must be one of .*, got \['linear'\]"),
        ({"warmup": "sine"}, ValueError, "'constant', 'linear', 'quadratic', 'cosine', got 'sine'"),
        ({"warmup": ConstantWarmup}, ValueError, "warmup must be one of .*, got <class"),
        ({"decay": RollerCoaster}, TypeError, r"decay must be a Decay such as RollerCoaster\(\)"),
    ],
)
def test_invalid_argument(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Recipe(**DATE_MNIST | changes)


def test_invalid_scaling() -> None:
    recipe = Recipe(**DATE_MNIST)
    with pytest.raises(TypeError, match="batch_size must be an int"):
        recipe.at(8192.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="allow_warmup_only must be True or False, got 1"):
        recipe.at(8192, 1)  # type: ignore[arg-type]


def test_recipe_is_an_immutable_value() -> None:
    recipe = Recipe(**DATE_MNIST).at(8192)
    with pytest.raises(FrozenInstanceError):
        recipe.batch_size = 512  # type: ignore[misc]
    assert recipe.lr(1) > 0  # fills the caches, which are no part of the value
    same = pickle.loads(pickle.dumps(recipe))
    assert same == recipe == Recipe(**DATE_MNIST).at(8192)
    assert hash(same) == hash(recipe)
    assert recipe != recipe.at(4096)


def test_docstring_example() -> None:
    failed, attempted = doctest.testmod(recipe_module)
    assert attempted > 0
    assert failed == 0
