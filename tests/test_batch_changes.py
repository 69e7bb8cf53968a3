"""Runs that change their batch size, as a pure function and under torch."""

from __future__ import annotations

import io
import json
import math
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scheduler_runs import advance, optimizer, rates
from torch.optim.lr_scheduler import ChainedScheduler, ExponentialLR, LambdaLR

from date_optim.recipe import BatchChange, Recipe
from date_optim.scheduler import RecipeScheduler
from date_optim.schedules import (
    Constant,
    Cosine,
    Cyclical,
    Decay,
    Exponential,
    MultiStep,
    Polynomial,
    RollerCoaster,
)

# 400 steps of 10 samples, the first 20 of them warm-up.
DECAYS: list[Decay] = [
    RollerCoaster(floor=0.0),
    Polynomial(2.0),
    Constant(),
    MultiStep((3, 6, 8)),
    Exponential(0.4, hold=7),
    Cosine(),
    Cosine(period=2),
    Cyclical(base=0.01, half_period=1, from_peak=True),
]


def recipe(decay: Decay = DECAYS[0], **options: Any) -> Recipe:
    return Recipe(10, 0.5, warmup_epochs=0.5, epochs=10, samples=400, decay=decay, **options)


QUARTER = (1.0, 0.25)
"""Two groups, the second at a quarter of the rate."""


def close(expected: Any) -> Any:
    return pytest.approx(expected, rel=1e-12, abs=1e-15)


# --- the pure function ----------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["sqrt", "linear"])
@pytest.mark.parametrize("decay", DECAYS)
def test_after_the_warmup_only_the_peak_jumps(decay: Decay, scaling: str) -> None:
    """100 steps at b, then 4b: the curve at b, at the same number of samples."""
    at_b = recipe(decay, scaling=scaling)
    jump = 2 if scaling == "sqrt" else 4
    changed = at_b.then(40, after=100)
    assert changed.iterations == 100 + 300 / 4
    for i in range(1, 101):
        assert changed.lr(i) == at_b.lr(i)
    for i in range(101, 176):
        samples = changed.samples_after(i)
        assert samples == 1000 + 40 * (i - 100)
        assert changed.lr(i) == close(jump * at_b.lr(samples // 10))


@pytest.mark.parametrize("warmup", ["linear", "quadratic", "cosine", "constant"])
def test_a_change_leaves_the_warmup_as_many_steps_as_before(warmup: str) -> None:
    at_b = recipe(warmup=warmup)
    changed = at_b.then(40, after=8)
    for i in range(1, 20):
        assert changed.lr(i) == close(at_b.lr(i) * (1 if i <= 8 else 2))
    assert changed.lr(20) == changed.peak * 2
    start, end = 8 * 10 + 12 * 40, 4000  # the decay's, in samples
    for i in range(20, changed.iterations + 1):
        left = end - changed.samples_after(i)
        assert changed.lr(i) == close(2 * at_b.peak * left / (end - start))
    assert changed.lr(changed.iterations) == 0.0


@pytest.mark.parametrize("decay", DECAYS)
def test_back_at_its_batch_size_a_run_is_on_its_curve(decay: Decay) -> None:
    at_b = recipe(decay)
    changed = at_b.then(30, after=100).then(10, after=120)
    assert changed.iterations == 400 - 2 * 20
    for i in range(121, changed.iterations + 1):
        assert changed.lr(i) == at_b.lr(i + 40)


@given(data=st.data(), decay=st.sampled_from(DECAYS))
def test_the_samples_of_the_run_stay(data: st.DataObject, decay: Decay) -> None:
    """Whatever the sizes, the last step takes the last samples, at the curve's last rate."""
    at_b = changed = recipe(decay)
    for _ in range(data.draw(st.integers(1, 4))):
        done = changed.changes[-1].after if changed.changes else 20
        after = data.draw(st.integers(done, changed.iterations - 1))
        changed = changed.then(data.draw(st.integers(1, 90)), after)
    last, size = changed.iterations, (at_b.batch_size, *(c.batch_size for c in changed.changes))[-1]
    assert changed.samples_after(last - 1) < 4000 <= changed.samples_after(last)
    assert changed.samples_after(last) < 4000 + size
    grown = math.sqrt(size / 10)
    assert changed.lr(last) == close(grown * at_b.lr(400))
    assert changed.lr(last + 7) == changed.lr(last)
    rates = [changed.lr(i) for i in range(1, last + 1)]
    assert all(0 <= rate <= 3 * at_b.peak for rate in rates)


def test_a_warmup_is_restarted_where_asked() -> None:
    plain, restarted = (recipe().then(40, 100, restart_warmup=again) for again in (False, True))
    for i in range(101, plain.iterations + 1):
        assert restarted.lr(i) == close(min((i - 100) / 20, 1.0) * plain.lr(i))
    again = recipe().then(10, 100, restart_warmup=True)  # at the same size
    assert again.lr(101) == close(recipe().lr(101) / 20)


def test_a_warmup_restarted_within_a_warmup_begins_anew() -> None:
    changed = recipe().then(40, 8, restart_warmup=True)
    for i in range(9, 29):
        assert changed.lr(i) == close(2 * 0.5 * (i - 8) / 20)
    assert changed.lr(29) == close(2 * 0.5 * (4000 - 40 * 21 - 80) / (4000 - 40 * 20 - 80))


def test_a_second_change_after_a_step_takes_the_place_of_the_first() -> None:
    at_b = recipe()
    assert at_b.then(20, 50).then(40, 50) == at_b.then(40, 50)
    assert at_b.then(20, 50).then(10, 50) == at_b == at_b.then(10, 50)
    assert at_b.then(40, 50).at(20) == at_b.at(20)
    assert at_b.then(40, 50).changes == (BatchChange(50, 40, False),)
    assert at_b.then(40, 50).unchanged == at_b


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 5), ValueError, "batch_size must be at least 1, got 0"),
        ((2.0, 5), TypeError, "batch_size must be an int, got 2.0"),
        ((True, 5), TypeError, "batch_size must be an int, got True"),
        ((40, -1), ValueError, "after must be at least 0, got -1"),
        (
            (40, 400),
            ValueError,
            "ends after 400 steps: its batch size cannot change",
        ),
        ((40, 5, 1), TypeError, "restart_warmup must be True or False, got 1"),
        ((330, 8), ValueError, "takes 12 more of 12 iterations; take a smaller batch"),
        ((40, 390, True), ValueError, "takes 20 more of 3 iterations"),
    ],
)
def test_changes_that_cannot_be(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        recipe().then(*arguments)


def test_changes_come_in_their_order() -> None:
    with pytest.raises(ValueError, match=r"changes after step 50 already: it cannot .* step 49"):
        recipe().then(40, 50).then(20, 49)


def test_a_warmup_that_was_allowed_to_fill_the_run_may_go_on() -> None:
    only = recipe().at(400, allow_warmup_only=True)
    assert only.then(500, 4).lr(5) == close(math.sqrt(50) * 0.5 * 5 / 20)


# --- under torch ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float", "tensor", "tensor of shape (1,)"])
@pytest.mark.parametrize("decay", DECAYS)
def test_a_scheduler_follows_the_changed_recipe(decay: Decay, kind: str) -> None:
    tensor = torch.full((1,) if "1" in kind else (), 0.7, dtype=torch.float64)
    opt = optimizer(*QUARTER, lr=0.7 if kind == "float" else tensor)
    tensors = [group["lr"] for group in opt.param_groups]
    scheduler = recipe(decay).scheduler(opt)
    used = advance(opt, scheduler, 7)
    for size, steps in ((40, 93), (20, 10), (10, 50)):
        scheduler.set_batch_size(size)
        assert [float(lr) for lr in scheduler.get_last_lr()] == rates(opt)
        used += advance(opt, scheduler, steps)
    assert kind == "float" or all(
        group["lr"] is lr for group, lr in zip(opt.param_groups, tensors, strict=True)
    )
    changed = recipe(decay).then(40, 7).then(20, 100).then(10, 110)
    assert scheduler.recipe == changed
    for i, row in enumerate(used, start=1):
        expected = changed.lr(min(i, changed.iterations))
        assert row == close([expected, 0.25 * expected])


def test_before_the_first_step_and_to_the_last() -> None:
    opt = optimizer(*QUARTER)
    scheduler = recipe().scheduler(opt)
    scheduler.set_batch_size(40)
    used = advance(opt, scheduler, scheduler.recipe.iterations - 1)
    assert used[0][0] == close(recipe().at(40).lr(1))
    scheduler.set_batch_size(20)  # the 40 samples that are left make two steps
    assert scheduler.recipe.iterations == 101
    advance(opt, scheduler, 2)
    assert rates(opt) == [0.0, 0.0]
    with pytest.raises(ValueError, match="ends after 101 steps"):
        scheduler.set_batch_size(40)


@dataclass(frozen=True)
class Pause(Decay):
    """No rate at all up to a sample, a user's own decay."""

    until: int

    def __call__(self, i: float, W: float, I: float, peak: float = 1, epoch: float = 1) -> float:  # noqa: E741
        return 0.0 if i < self.until else peak


def test_a_rate_of_zero_is_left_by_the_closed_form() -> None:
    opt = optimizer(*QUARTER)
    scheduler = recipe(Pause(1020)).scheduler(opt)
    advance(opt, scheduler, 100)
    assert rates(opt) == [0.0, 0.0]
    scheduler.set_batch_size(40)
    assert rates(opt) == [1.0, 0.25]


def test_a_refused_change_changes_nothing() -> None:
    opt = optimizer(*QUARTER)
    scheduler = recipe().scheduler(opt)
    advance(opt, scheduler, 9)
    before = rates(opt), scheduler.state_dict(), scheduler.recipe
    for size, error in ((0, ValueError), (2.5, TypeError), (400, ValueError)):
        with pytest.raises(error):
            scheduler.set_batch_size(size)  # type: ignore[arg-type]
    assert (rates(opt), scheduler.state_dict(), scheduler.recipe) == before


@pytest.mark.parametrize("recipe_first", [True, False])
def test_a_chain_stays_the_product(recipe_first: bool) -> None:
    opt = optimizer(*QUARTER)
    own = recipe().scheduler(opt)
    pair = [own, ExponentialLR(opt, 0.99)]
    chain = ChainedScheduler(pair if recipe_first else pair[::-1])
    used = advance(opt, chain, 30)
    own.set_batch_size(40)
    used += advance(opt, chain, 30)
    changed = recipe().then(40, 30)
    for t, row in enumerate(used):
        assert row[0] == close(changed.lr(t + 1) * 0.99**t)


def weights_only(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "through", [lambda state: json.loads(json.dumps(state)), weights_only], ids=["JSON", "torch"]
)
@pytest.mark.parametrize("again", [True, False], ids=["restarted", "plain"])
def test_resume_is_bitwise(through: Any, again: bool) -> None:
    opt = optimizer(*QUARTER)
    scheduler = recipe().scheduler(opt)
    advance(opt, scheduler, 30)
    scheduler.set_batch_size(40, restart_warmup=again)
    advance(opt, scheduler, 11)
    states = pickle.dumps(opt.state_dict()), through(scheduler.state_dict())

    resumed_opt = optimizer(*QUARTER, lr=0.1)
    resumed = recipe().scheduler(resumed_opt)
    resumed_opt.load_state_dict(pickle.loads(states[0]))
    resumed.load_state_dict(states[1])
    assert resumed.recipe == scheduler.recipe
    resumed.set_batch_size(20)
    scheduler.set_batch_size(20)
    assert advance(resumed_opt, resumed, 60) == advance(opt, scheduler, 60)
    assert resumed.state_dict() == scheduler.state_dict()


def saved(of: Recipe) -> dict[str, Any]:
    return RecipeScheduler(optimizer(*QUARTER), of).state_dict()


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (recipe().then(20, 30), "change.0.batch_size: saved 40, here 20"),
        (recipe().then(40, 31), "change.0.after: saved 30, here 31"),
        (recipe().then(40, 30, True), "change.0.restart_warmup: saved 0, here 1"),
        (recipe().then(40, 30).then(10, 50), "change.1.after: saved nothing, here 50"),
        (recipe().at(20), "batch_size: saved 10, here 20"),
        (recipe(Constant()), "decay.Constant: saved nothing, here 1"),
    ],
)
def test_a_state_of_other_changes_is_refused_by_name(own: Recipe, message: str) -> None:
    state = saved(recipe().then(40, 30))
    scheduler = own.scheduler(optimizer(*QUARTER))
    before = scheduler.state_dict()
    with pytest.raises(ValueError, match=message):
        scheduler.load_state_dict(state)
    assert (scheduler.recipe, scheduler.state_dict()) == (own, before)


def test_the_same_changes_are_taken_and_none_are_refused() -> None:
    planned = recipe().then(40, 30)
    planned.scheduler(optimizer(*QUARTER)).load_state_dict(saved(planned))
    with pytest.raises(ValueError, match=r"change\.0\.after: saved nothing, here 30"):
        planned.scheduler(optimizer(*QUARTER)).load_state_dict(saved(recipe()))


def test_override_goes_on_without_the_saved_changes() -> None:
    opt = optimizer(*QUARTER)
    scheduler = recipe().scheduler(opt)
    scheduler.load_state_dict(saved(recipe().then(40, 30)) | {"last_epoch": 50}, override=True)
    assert scheduler.recipe == recipe()
    assert rates(opt) == [recipe().lr(51), 0.25 * recipe().lr(51)]


def test_lambda_lr_takes_changes_that_are_planned() -> None:
    planned = recipe().then(40, 100)
    opt = optimizer(*QUARTER)
    for group in opt.param_groups:
        group["lr"] = planned.peak * group.get("lr_scale", 1.0)
    used = advance(opt, LambdaLR(opt, planned.factor(opt)), planned.iterations)
    assert [row[0] for row in used] == close([planned.lr(i) for i in range(1, 176)])


def test_a_group_added_later_is_refused() -> None:
    opt = optimizer(*QUARTER)
    scheduler = recipe().scheduler(opt)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match="3 param groups, but had 2"):
        scheduler.set_batch_size(40)
    assert scheduler.recipe == recipe()
