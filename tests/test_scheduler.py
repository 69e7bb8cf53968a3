"""The scheduler against the recipe's own numbers, alone and under torch's compositions."""

import copy
import io
import json
import math
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scheduler_runs import advance, optimizer, rates
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    ExponentialLR,
    LambdaLR,
    SequentialLR,
)
from torch.utils._python_dispatch import TorchDispatchMode

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

RECIPE = Recipe(
    batch_size=1024, lr=1.25e-3, warmup_epochs=2, epochs=30, samples=60_000, iterations=1755
).at(8192)
SHORT = Recipe(batch_size=10, lr=0.5, warmup_epochs=2, epochs=10, samples=40).at(20)
SCALES = (1.0, 0.25, 3.0)
DECAYS: list[Decay] = [
    RollerCoaster(),
    Polynomial(2.0),
    Constant(),
    MultiStep((3, 6, 8)),
    Exponential(0.4, hold=7),
    Cosine(),
    Cosine(period=2),
    Cyclical(base=0.01, half_period=1),
    Cyclical(base=0.01, half_period=1, from_peak=True),
]
WARMUPS: list[Any] = ["constant", "linear", "quadratic", "cosine", ConstantWarmup(0.5)]

BASE: dict[str, Any] = {
    "batch_size": 1024,
    "lr": 1.25e-3,
    "warmup_epochs": 2,
    "epochs": 30,
    "samples": 60_000,
}


def close(expected: Any) -> Any:
    return pytest.approx(expected, rel=1e-12, abs=0.0)


def test_first_step_uses_the_first_rate() -> None:
    opt = optimizer(*SCALES)
    scheduler = RECIPE.scheduler(opt)
    first = [scale * RECIPE.lr(1) for scale in SCALES]
    assert rates(opt) == first
    assert scheduler.get_last_lr() == first
    assert scheduler.last_epoch == 0


def test_optimizer_step_i_uses_rate_i_times_lr_scale_and_stays_at_the_end() -> None:
    opt = optimizer(*SCALES)
    scheduler = RECIPE.scheduler(opt)
    used = advance(opt, scheduler, RECIPE.iterations + 5)
    for i, row in enumerate(used, start=1):
        assert row == close([scale * RECIPE.lr(i) for scale in SCALES])
    assert used[-1] == close([scale * 1e-6 for scale in SCALES])  # the scale multiplies the floor


@pytest.mark.parametrize("lr", [0.0, 1e-9, 5.0])
def test_rate_of_the_optimizer_does_not_matter(lr: float) -> None:
    opt = optimizer(2.0, lr=lr)
    scheduler = RECIPE.scheduler(opt)
    assert scheduler.base_lrs == [2 * RECIPE.peak]
    assert rates(opt) == [2 * RECIPE.lr(1)]


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("warmup", WARMUPS)
def test_drift_over_2000_steps(warmup: Any, decay: Decay) -> None:
    recipe = Recipe(16, 0.3, 1, 10, 3210, warmup=warmup, decay=decay)
    assert recipe.iterations == 2007
    opt = optimizer()
    used = advance(opt, recipe.scheduler(opt), 2010)
    for i, (rate,) in enumerate(used, start=1):
        assert rate == close(recipe.lr(i))


def test_rate_of_zero_is_left_by_the_closed_form() -> None:
    """Without a floor the polynomial ends at 0, after which there is no ratio to multiply by."""
    recipe = Recipe(1, 0.1, 0, 3, 1, decay=Polynomial(1.0))
    opt = optimizer()
    used = advance(opt, recipe.scheduler(opt), 5)
    assert [rate for (rate,) in used] == close([recipe.lr(i) for i in range(1, 6)])
    assert used[2:] == [[0.0]] * 3


@pytest.mark.parametrize("recipe_first", [True, False], ids=["recipe first", "recipe last"])
@pytest.mark.parametrize(
    ("other", "factor"),
    [
        (lambda opt: ExponentialLR(opt, 0.9), lambda t: 0.9**t),
        (lambda opt: ConstantLR(opt, 0.1, total_iters=20), lambda t: 0.1 if t < 20 else 1.0),
    ],
    ids=["ExponentialLR", "ConstantLR"],
)
def test_chained_scheduler_is_the_product(recipe_first: bool, other: Any, factor: Any) -> None:
    opt = optimizer(*SCALES)
    own = RECIPE.scheduler(opt)
    pair = [own, other(opt)]
    used = advance(opt, ChainedScheduler(pair if recipe_first else pair[::-1]), 230)
    for t, row in enumerate(used):
        assert row == close([scale * RECIPE.lr(t + 1) * factor(t) for scale in SCALES])


@pytest.mark.parametrize("decay", DECAYS)
def test_chained_scheduler_is_the_product_for_every_decay(decay: Decay) -> None:
    """Past almost nothing too, where a cosine restarts, and up to a last rate of 0."""
    recipe = Recipe(16, 0.3, 1, 10, 321, warmup="cosine", decay=decay)
    opt = optimizer(*SCALES)
    pair = [recipe.scheduler(opt), ExponentialLR(opt, 0.99)]
    used = advance(opt, ChainedScheduler(pair), recipe.iterations)
    for t, row in enumerate(used):
        assert row == close([scale * recipe.lr(t + 1) * 0.99**t for scale in SCALES])


def test_chained_scheduler_made_after_another() -> None:
    opt = optimizer()
    pair = [ExponentialLR(opt, 0.9), RECIPE.scheduler(opt)]
    used = advance(opt, ChainedScheduler(pair), 230)
    for t, row in enumerate(used):
        assert row == close([RECIPE.lr(t + 1) * 0.9**t])


def test_sequential_from_recipe() -> None:
    opt = optimizer()
    stages = [RECIPE.scheduler(opt), ExponentialLR(opt, 0.5)]
    used = advance(opt, SequentialLR(opt, stages, milestones=[130]), 134)
    expected = [RECIPE.lr(i) for i in range(1, 131)]
    expected += [RECIPE.peak * 0.5**t for t in range(4)]  # torch restarts from the base rate
    assert [rate for (rate,) in used] == close(expected)


def test_sequential_to_recipe() -> None:
    opt = optimizer()
    stages = [RECIPE.scheduler(opt), ConstantLR(opt, 0.5, total_iters=100), RECIPE.scheduler(opt)]
    used = advance(opt, SequentialLR(opt, stages[1:], milestones=[7]), 227)
    expected = [RECIPE.peak * 0.5] * 7 + [RECIPE.lr(i) for i in range(1, 221)]
    assert [rate for (rate,) in used] == close(expected)


def test_step_to_an_epoch_uses_the_closed_form() -> None:
    opt = optimizer(0.5)
    scheduler = RECIPE.scheduler(opt)
    opt.step()
    with pytest.warns(UserWarning, match="epoch parameter"):
        scheduler.step(116)
    assert rates(opt) == [0.5 * RECIPE.lr(117)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensor_rate_is_filled_in_place(dtype: torch.dtype) -> None:
    opt = optimizer(1.0, 0.5, lr=torch.tensor(0.7, dtype=dtype))
    tensors = [group["lr"] for group in opt.param_groups]
    scheduler = RECIPE.scheduler(opt)
    steps = 219
    advance(opt, scheduler, steps)
    assert all(group["lr"] is lr for group, lr in zip(opt.param_groups, tensors, strict=True))
    assert len({id(lr) for lr in tensors}) == 2
    expected = RECIPE.lr(steps + 1)
    # each step rounds the ratio to float64 and to the tensor's type, and the product: 3 * eps/2
    tolerance = 1.5 * (steps + 1) * torch.finfo(dtype).eps
    assert rates(opt) == pytest.approx([expected, 0.5 * expected], rel=tolerance, abs=0.0)
    last = scheduler.get_last_lr()
    assert all(isinstance(lr, torch.Tensor) for lr in last)
    assert all(lr is not own for lr, own in zip(last, tensors, strict=True))


class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the reads of a tensor's value by the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_tensor_rate_is_never_read() -> None:
    opt = optimizer(lr=torch.tensor(0.7))
    with Reads() as reads:  # type: ignore[no-untyped-call]
        scheduler = RECIPE.scheduler(opt)
        opt.step()
        reads.count = 0
        scheduler.step()
        scheduler.load_state_dict(scheduler.state_dict())
        assert reads.count == 0
        opt.param_groups[0]["lr"].item()
        assert reads.count == 1


def test_group_added_later_is_refused_and_can_be_taken_over() -> None:
    opt = optimizer()
    scheduler = RECIPE.scheduler(opt)
    advance(opt, scheduler, 9)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr_scale": 0.5})
    opt.step()
    with pytest.raises(
        ValueError,
        match=r"2 param groups, but had 1 .*recipe\.scheduler\(optimizer, last_epoch=9\)",
    ):
        scheduler.step()
    RECIPE.scheduler(opt, last_epoch=9)
    assert rates(opt) == [RECIPE.lr(11), 0.5 * RECIPE.lr(11)]


@pytest.mark.parametrize("scale", [-1.0, math.nan, math.inf])
def test_invalid_lr_scale(scale: float) -> None:
    with pytest.raises(ValueError, match="lr_scale of param group 1 must be finite and at least 0"):
        RECIPE.scheduler(optimizer(1.0, scale))


def test_scheduler_of_something_else() -> None:
    with pytest.raises(TypeError, match="optimizer must be a torch optimizer, got list"):
        RECIPE.scheduler([])  # type: ignore[arg-type]


def test_step_before_the_optimizer_gives_only_the_warning_of_torch() -> None:
    scheduler = RECIPE.scheduler(optimizer())
    with pytest.warns(UserWarning, match=r"before `optimizer.step\(\)`") as record:
        scheduler.step()
    assert len(record) == 1


@given(
    saved_at=st.integers(0, 40),
    optimizer_first=st.booleans(),
    scales=st.sampled_from([(1.0,), SCALES]),
    decay=st.sampled_from(DECAYS),
)
def test_resume_is_bitwise(
    saved_at: int, optimizer_first: bool, scales: tuple[float, ...], decay: Decay
) -> None:
    recipe = Recipe(10, 0.5, 2, 10, 40, decay=decay).at(20)
    opt = optimizer(*scales)
    scheduler = recipe.scheduler(opt)
    advance(opt, scheduler, saved_at)
    states = pickle.dumps(opt.state_dict()), json.dumps(scheduler.state_dict())

    resumed_opt = optimizer(*scales, lr=0.1)
    resumed = recipe.scheduler(resumed_opt)
    if optimizer_first:
        resumed_opt.load_state_dict(pickle.loads(states[0]))
    resumed.load_state_dict(json.loads(states[1]))
    if not optimizer_first:
        resumed_opt.load_state_dict(pickle.loads(states[0]))

    assert resumed.last_epoch == scheduler.last_epoch
    assert resumed.get_last_lr() == scheduler.get_last_lr()
    assert advance(resumed_opt, resumed, 25) == advance(opt, scheduler, 25)


def test_resume_with_tensor_rate_keeps_the_kind_of_the_last_rate() -> None:
    opt = optimizer(lr=torch.tensor(0.7))
    scheduler = RECIPE.scheduler(opt)
    advance(opt, scheduler, 50)
    state = json.loads(json.dumps(scheduler.state_dict()))
    resumed_opt = optimizer(lr=torch.tensor(0.7))
    resumed = RECIPE.scheduler(resumed_opt)
    resumed_opt.load_state_dict(opt.state_dict())
    resumed.load_state_dict(state)
    (last,) = resumed.get_last_lr()
    assert isinstance(last, torch.Tensor)
    assert last is not resumed_opt.param_groups[0]["lr"]
    assert torch.equal(last, torch.tensor(RECIPE.lr(51)))
    assert advance(resumed_opt, resumed, 20) == advance(opt, scheduler, 20)


def test_resume_of_a_chain_is_bitwise() -> None:
    def chain(opt: torch.optim.Optimizer) -> ChainedScheduler:
        return ChainedScheduler([RECIPE.scheduler(opt), ExponentialLR(opt, 0.9)])

    opt = optimizer()
    scheduler = chain(opt)
    advance(opt, scheduler, 130)
    resumed_opt = optimizer()
    resumed = chain(resumed_opt)
    resumed_opt.load_state_dict(opt.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    assert advance(resumed_opt, resumed, 20) == advance(opt, scheduler, 20)


def test_resume_after_the_first_scheduler_step_gives_no_warning() -> None:
    scheduler = RECIPE.scheduler(optimizer())
    opt = optimizer()
    resumed = RECIPE.scheduler(opt)
    state = scheduler.state_dict() | {"last_epoch": 7, "_step_count": 8}
    resumed.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.step()


def saved_and_loaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "decay", [*DECAYS, MultiStep([3, 6], gamma=np.float64(0.5)), Cosine(np.float64(7))]
)
@pytest.mark.parametrize("warmup", WARMUPS)
def test_state_is_numbers(warmup: Any, decay: Decay) -> None:
    recipe = Recipe(**BASE, warmup=warmup, decay=decay).at(8192)
    opt = optimizer(*SCALES)
    scheduler = recipe.scheduler(opt)
    advance(opt, scheduler, 3)
    state = scheduler.state_dict()
    for key, value in state.items():
        numbers = value if key == "_last_lr" else [value]
        assert all(type(number) in {int, float} for number in numbers), key
    for restored in (json.loads(json.dumps(state)), saved_and_loaded(state)):
        assert restored == state
        recipe.scheduler(optimizer(*SCALES)).load_state_dict(restored)


CURVES: list[dict[str, Any]] = [
    *({"warmup": warmup} for warmup in WARMUPS),
    *({"decay": decay} for decay in DECAYS[1:]),
    {"decay": MultiStep((3, 6))},
    {"decay": MultiStep((3, 6, 9))},
    {"decay": MultiStep((3, 6, 8), gamma=0.2)},
    {"decay": MultiStep((3, 6, 8), inclusive=False)},
    {"decay": Exponential(0.5, hold=7)},
    {"decay": Exponential(0.4, hold=6)},
    {"decay": Cosine(period=3)},
    {"decay": Cyclical(base=0.02, half_period=1)},
    {"decay": Cyclical(base=0.01, half_period=2)},
]


@pytest.mark.parametrize("here", CURVES, ids=repr)
def test_every_number_of_a_curve_is_told_apart(here: dict[str, Any]) -> None:
    for saved in CURVES:
        state = Recipe(**BASE | saved).scheduler(optimizer()).state_dict()
        scheduler = Recipe(**BASE | here).scheduler(optimizer())
        if saved == here:
            scheduler.load_state_dict(state)
        else:
            with pytest.raises(ValueError, match=r"another recipe \((warmup|decay)\."):
                scheduler.load_state_dict(state)


@pytest.mark.parametrize(
    ("saved", "here", "message"),
    [
        (
            {"decay": MultiStep((3, 6))},
            {"decay": MultiStep((3, 7, 8))},
            r"\(decay.MultiStep.boundaries.1: saved 6.0, here 7.0; "
            r"decay.MultiStep.boundaries.2: saved nothing, here 8.0\)",
        ),
        (
            {"warmup": "constant"},
            {"warmup": ConstantWarmup(0.5)},
            r"\(warmup.ConstantWarmup.fraction: saved 0.1, here 0.5\)",
        ),
        (
            {"decay": Cosine()},
            {"decay": Cosine(period=5)},
            r"\(decay.Cosine.period: saved nothing, here 5.0\)",
        ),
    ],
)
def test_the_number_that_differs_is_named(
    saved: dict[str, Any], here: dict[str, Any], message: str
) -> None:
    state = Recipe(**BASE, **saved).scheduler(optimizer()).state_dict()
    with pytest.raises(ValueError, match=message):
        Recipe(**BASE, **here).scheduler(optimizer()).load_state_dict(state)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (Recipe(**BASE).at(512), "batch_size: saved 512, here 8192; iterations: saved"),
        (Recipe(**BASE | {"batch_size": 2048}).at(8192), "baseline_batch_size: saved 2048, here"),
        (Recipe(**BASE | {"samples": 50_000}).at(8192), "samples: saved 50000, here 60000"),
        (Recipe(**BASE | {"epochs": 40}).at(8192), "epochs: saved 40.0, here 30.0"),
        (Recipe(**BASE, iterations=1740).at(8192), "iterations: saved 218, here 220"),
        (Recipe(**BASE | {"warmup_epochs": 1}).at(8192), "warmup_iterations: saved 58.59375, here"),
        (Recipe(**BASE | {"lr": 1e-3}).at(8192), "peak: saved 0.0028.*, here 0.0035"),
        (Recipe(**BASE, scaling="linear").at(8192), "peak: saved 0.01, here 0.0035"),
        (Recipe(**BASE, warmup="quadratic").at(8192), "warmup.quadratic: saved 1, here nothing"),
        (Recipe(**BASE, decay=Constant()).at(8192), "decay.Constant: saved 1, here nothing"),
        (
            Recipe(**BASE, decay=RollerCoaster(floor=0.0)).at(8192),
            r"\(decay.RollerCoaster.floor: saved 0.0, here 1e-06\)",
        ),
    ],
)
def test_state_of_another_recipe_is_refused_by_name(saved: Recipe, message: str) -> None:
    opt = optimizer()
    scheduler = Recipe(**BASE).at(8192).scheduler(opt)
    advance(opt, scheduler, 3)
    before = scheduler.state_dict(), rates(opt)
    with pytest.raises(ValueError, match=message):
        scheduler.load_state_dict(saved.scheduler(optimizer()).state_dict())
    assert (scheduler.state_dict(), rates(opt)) == before


def test_state_of_other_groups_or_of_another_scheduler_is_refused() -> None:
    scheduler = RECIPE.scheduler(optimizer(0.5))
    with pytest.raises(ValueError, match=r"\(lr_scale.0: saved 2.0, here 0.5\)"):
        scheduler.load_state_dict(RECIPE.scheduler(optimizer(2.0)).state_dict())
    with pytest.raises(ValueError, match=r"\(lr_scale.1: saved 2.0, here nothing\)"):
        scheduler.load_state_dict(RECIPE.scheduler(optimizer(0.5, 2.0)).state_dict())
    with pytest.raises(ValueError, match="batch_size: saved nothing, here 8192"):
        scheduler.load_state_dict(LambdaLR(optimizer(), lambda t: 1.0).state_dict())


@pytest.mark.parametrize("tensor", [True, False])
def test_override_goes_on_with_this_recipe(tensor: bool) -> None:
    lr: Any = torch.tensor(0.7, dtype=torch.float64) if tensor else 0.7
    opt = optimizer(1.0, 0.5, lr=lr)
    scheduler = SHORT.scheduler(opt)
    advance(opt, scheduler, 3)
    other_opt = optimizer(1.0, 0.5, lr=lr)
    other = SHORT.at(10).scheduler(other_opt)
    other_opt.load_state_dict(opt.state_dict())
    before = [group["lr"] for group in other_opt.param_groups]
    other.load_state_dict(scheduler.state_dict(), override=True)
    after = [group["lr"] for group in other_opt.param_groups]
    assert not tensor or all(new is old for new, old in zip(after, before, strict=True))
    recipe = SHORT.at(10)
    assert [float(rate) for rate in other.get_last_lr()] == rates(other_opt)
    used = advance(other_opt, other, 10)
    expected = [[recipe.lr(i), 0.5 * recipe.lr(i)] for i in range(4, 14)]
    assert [pytest.approx(row, rel=1e-12, abs=0.0) for row in expected] == used


# --- LambdaLR -------------------------------------------------------------------------------------


def at_peak(recipe: Recipe, *scales: float) -> torch.optim.Optimizer:
    opt = optimizer(*scales)
    for group in opt.param_groups:
        group["lr"] = recipe.peak * group.get("lr_scale", 1.0)
    return opt


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("warmup", WARMUPS)
def test_factor_in_lambda_lr_gives_the_schedulers_rates(warmup: Any, decay: Decay) -> None:
    recipe = Recipe(10, 0.5, 2, 10, 40, warmup=warmup, decay=decay).at(20)
    opt = at_peak(recipe, *SCALES)
    used = advance(opt, LambdaLR(opt, recipe.factor(opt)), recipe.iterations + 3)
    for i, row in enumerate(used, start=1):
        assert row == close([scale * recipe.lr(i) for scale in SCALES])


def test_factor_counts_from_zero() -> None:
    factor = RECIPE.factor(at_peak(RECIPE))
    assert factor(0) == RECIPE.lr(1) / RECIPE.peak
    assert factor(219) == RECIPE.lr(220) / RECIPE.peak == factor(10**6)
    with pytest.raises(ValueError, match="steps must be at least 0, got -1"):
        factor(-1)
    with pytest.raises(TypeError, match=r"steps must be an int, got 1\.0"):
        factor(1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda f: pickle.loads(pickle.dumps(f))]
)
def test_factor_can_be_copied(copied: Any) -> None:
    factor = RECIPE.factor(at_peak(RECIPE))
    twin = copied(factor)
    assert [twin(t) for t in range(230)] == [factor(t) for t in range(230)]
    assert vars(twin) == vars(factor)


@pytest.mark.parametrize("through", [copy.deepcopy, saved_and_loaded], ids=["copy", "weights only"])
@pytest.mark.parametrize("optimizer_first", [True, False])
def test_lambda_lr_resumes(through: Any, optimizer_first: bool) -> None:
    recipe = Recipe(10, 0.5, 2, 10, 40, decay=MultiStep((3, 6, 8))).at(20)
    opt = at_peak(recipe, *SCALES)
    scheduler = LambdaLR(opt, recipe.factor(opt))
    advance(opt, scheduler, 7)
    opt_state, state = through(opt.state_dict()), through(scheduler.state_dict())

    resumed_opt = at_peak(recipe, *SCALES)
    if optimizer_first:  # the groups' lr is the seventh then, but initial_lr is what counts
        resumed_opt.load_state_dict(opt_state)
    resumed = LambdaLR(resumed_opt, recipe.factor(resumed_opt))
    resumed.load_state_dict(state)
    resumed_opt.load_state_dict(opt_state)
    assert advance(resumed_opt, resumed, 20) == advance(opt, scheduler, 20)


def test_lambda_lr_saves_numbers_and_refuses_those_of_another_recipe() -> None:
    opt, other = at_peak(RECIPE), at_peak(RECIPE)
    scheduler = LambdaLR(opt, RECIPE.factor(opt))
    state = json.loads(json.dumps(scheduler.state_dict()["lr_lambdas"]))
    assert all(type(number) in {int, float} for number in state[0]["identity"].values())
    longer = Recipe(
        batch_size=1024, lr=1.25e-3, warmup_epochs=2, epochs=40, samples=60_000, iterations=2340
    ).at(8192)
    resumed = LambdaLR(other, longer.factor(other))
    resumed.load_state_dict(scheduler.state_dict())
    other.step()
    with pytest.raises(ValueError, match=r"another recipe \(epochs: saved 30.0, here 40.0; iter"):
        resumed.step()


def test_factor_needs_the_rates_of_the_recipe() -> None:
    with pytest.raises(
        ValueError,
        match=r"^lr of param group 0 must be recipe\.peak \* lr_scale = 0\.0035\d+, got 0\.7: ",
    ):
        RECIPE.factor(optimizer())
    opt = at_peak(RECIPE, 1.0, 0.5)
    opt.param_groups[1]["lr"] = RECIPE.peak
    with pytest.raises(ValueError, match=r"lr of param group 1 must be .* = 0\.00176"):
        RECIPE.factor(opt)
    opt.param_groups[1]["lr_scale"] = -1.0
    with pytest.raises(ValueError, match="lr_scale of param group 1 must be finite and at least 0"):
        RECIPE.factor(opt)
    with pytest.raises(TypeError, match="optimizer must be a torch optimizer, got dict"):
        RECIPE.factor({})  # type: ignore[arg-type]


def test_factor_looks_at_what_lambda_lr_multiplies() -> None:
    """An ``initial_lr`` that is there already, whatever the rate is now."""
    opt = at_peak(RECIPE)
    opt.param_groups[0] |= {"initial_lr": RECIPE.peak, "lr": 0.7}
    LambdaLR(opt, RECIPE.factor(opt))
    assert rates(opt) == close([RECIPE.lr(1)])
    opt.param_groups[0] |= {"initial_lr": 0.7, "lr": RECIPE.peak}
    with pytest.raises(ValueError, match=r"initial_lr of param group 0 must be .*, got 0.7"):
        RECIPE.factor(opt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factor_takes_a_tensor_rate_of_any_precision(dtype: torch.dtype) -> None:
    opt = optimizer(lr=torch.tensor(RECIPE.peak, dtype=dtype))
    advance(opt, LambdaLR(opt, RECIPE.factor(opt)), 7)
    assert rates(opt) == pytest.approx([RECIPE.lr(8)], rel=2 * torch.finfo(dtype).eps, abs=0.0)
    opt = optimizer(lr=torch.tensor(RECIPE.peak * (1 + 1e-6), dtype=dtype))
    with pytest.raises(ValueError, match="lr of param group 0 must be"):
        RECIPE.factor(opt)
