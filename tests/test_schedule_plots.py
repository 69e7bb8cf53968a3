"""The page of the schedules: its code runs, its pictures are drawn and show every schedule."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.optim.lr_scheduler import LambdaLR

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from schedules import plot

import date_optim.schedules
from date_optim.recipe import Recipe
from date_optim.schedules import WARMUPS, ConstantWarmup, Decay

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/schedules.md").read_text(encoding="utf-8")
LINES = re.findall(r"^\| `((?:warmup|decay)=.*?)` \|", PAGE, re.MULTILINE)
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
PICTURES = ["schedules.png", "schedules_recipes.png"]


def recipe_of(line: str) -> Recipe:
    names = {"Recipe": Recipe, **vars(date_optim.schedules)}
    recipe = eval(f"Recipe(1024, 0.1, 2, 90, 60_000, {line})", names)
    assert isinstance(recipe, Recipe)
    return recipe


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_the_tables_makes_a_recipe(line: str) -> None:
    recipe = recipe_of(line).at(8192)
    assert all(0 <= recipe.lr(i) <= recipe.peak for i in range(1, recipe.iterations + 1))


def test_the_tables_are_complete() -> None:
    recipes = [recipe_of(line).baseline for line in LINES]
    assert {
        "constant" if isinstance(base.warmup, ConstantWarmup) else base.warmup for base in recipes
    } == set(WARMUPS)
    assert {type(base.decay) for base in recipes} == every_decay()


def every_decay() -> set[type[Decay]]:
    exported = [getattr(date_optim.schedules, name) for name in date_optim.schedules.__all__]
    return {x for x in exported if isinstance(x, type) and issubclass(x, Decay)} - {Decay}


def test_the_blocks_run_and_say_what_is_true() -> None:
    model = torch.nn.Linear(2, 1)
    names = {
        "torch": torch,
        "LambdaLR": LambdaLR,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.7),
    }
    for block in BLOCKS:
        if "set_batch_size" not in block:  # a loop, which tests/test_docs.py runs
            exec(block, names)
    recipe, scheduler = names["recipe"], names["scheduler"]
    assert isinstance(recipe, Recipe)
    assert isinstance(scheduler, LambdaLR)
    assert recipe.peak == pytest.approx(32, rel=1e-14)
    assert (recipe.warmup_epochs, recipe.iterations) == (10, 3519)
    assert scheduler.get_last_lr() == [pytest.approx(recipe.lr(1), rel=1e-14)]
    (call,) = re.findall(r"`(Cosine\(\)\(.*?\))`", PAGE)
    assert 0 < eval(call, vars(date_optim.schedules)) < 0.1


def test_the_pictures_show_every_schedule() -> None:
    assert set(plot.WARMUPS) >= set(WARMUPS)
    drawn = plot.FALLING | plot.STEPPING | plot.CYCLING
    assert {type(decay) for decay in drawn.values()} == every_decay()
    for code, decay in drawn.items():
        assert eval(code, vars(date_optim.schedules)) == decay


def test_the_pictures_show_every_flag_on_and_off() -> None:
    drawn = [*plot.FALLING.values(), *plot.STEPPING.values(), *plot.CYCLING.values()]
    kinds: set[Any] = every_decay()
    for kind in kinds:
        for flag in (x.name for x in fields(kind) if x.init and isinstance(x.default, bool)):
            shown = {getattr(decay, flag) for decay in drawn if type(decay) is kind}
            assert shown == {True, False}, (kind, flag)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the script draws into."""
    folder = tmp_path_factory.mktemp("pictures") / "new" / "folder"
    command = [sys.executable, "-W", "error", str(ROOT / "examples/schedules/plot.py")]
    subprocess.run([*command, "--out", str(folder)], check=True, capture_output=True)
    return folder


def test_the_script_draws_the_pictures_of_the_page(drawn: Path) -> None:
    assert sorted(path.name for path in drawn.iterdir()) == PICTURES
    for name in PICTURES:
        assert f"]({name})" in PAGE


@pytest.mark.parametrize("name", PICTURES)
def test_the_pictures_are_what_the_script_draws(name: str, drawn: Path) -> None:
    """Where the same Matplotlib draws; another's text and margins move every line of a panel."""
    with Image.open(ROOT / "docs" / name) as committed, Image.open(drawn / name) as fresh:
        ours, theirs = committed.info["Software"], fresh.info["Software"]
        a, b = (np.asarray(image, dtype=np.int64) for image in (committed, fresh))
    if ours != theirs:
        pytest.skip(f"docs/{name} is of {ours}; this is {theirs}")
    assert a.shape == b.shape
    # A coordinate that rounds otherwise moves by 1/256 of a pixel, and a colour by as much.
    worst = np.abs(a - b).max()
    assert worst <= 1, "draw it anew: python examples/schedules/plot.py"
