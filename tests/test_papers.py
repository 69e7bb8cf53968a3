"""The papers' studies: their runner on a few images, and whether the committed runs agree."""

from __future__ import annotations

import inspect
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import ROOT

sys.path.insert(0, str(ROOT / "examples"))

from demo.data import PACKAGE_FOLDER, DataError, DataSet, Images
from demo.model import make_lenet5
from demo.report import to_plain
from matplotlib import pyplot as plt
from papers import images as paper_images
from papers import report
from papers.curvature import Probed
from papers.images import Classification, load_images
from papers.models import make_lenet
from papers.solvers import OWN_RATIO, PLAIN, backend_for, make_optimizer
from papers.store import Store
from papers.studies import STUDIES
from papers.study import SIZES, Case, Size
from papers.table3 import BOUNDS, RATES, SEEDS, SMALL, accuracy_or_zero, of, settings
from papers.training import Record, ends_epoch, train
from torch import nn

import date_kernels
from date_optim import DATE

KINDS = [(name, size) for name in STUDIES for size in SIZES if STUDIES[name].cases(size)]
"""Studies in the sizes that they have."""


def few_images(count: int = 96) -> DataSet:
    generator = torch.Generator().manual_seed(1)

    def some(n: int) -> Images:
        labels = torch.randint(10, (n,), generator=generator)
        return Images(torch.randn(n, 1, 28, 28, generator=generator), labels)

    return DataSet("noise", "generated", some(count), some(20), some(20))


def case(**others: Any) -> Case:
    chosen = settings("rmsprop", 32, [0.1, 1.0], 0, 3)
    return Case("a", {**chosen, "base_batch_size": 32, **others})


def make(case: Case) -> Classification:
    return Classification(make_lenet5, case.settings, few_images(), "cpu")


class ProcessEndsError(Exception):
    """Stands for whatever ends a process."""


def weights(training: Classification) -> list[torch.Tensor]:
    return [param.detach().clone() for param in training.model.parameters()]


def equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return bool(to_plain({**a, "seconds": 0}) == to_plain({**b, "seconds": 0}))


@pytest.mark.parametrize("solver", [*PLAIN, *OWN_RATIO])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path, solver: str) -> None:
    chosen = case(solver=solver, trust=None, lr=1e-3, telemetry=True)
    whole = make(chosen)
    expected = train(chosen, whole, tmp_path / "whole.pt")
    assert expected["epochs"] == [1.0, 2.0, 3.0]

    def interrupt(record: Record) -> None:
        if len(record.epochs) == 2:
            raise ProcessEndsError

    with pytest.raises(ProcessEndsError):
        train(chosen, make(chosen), tmp_path / "a.pt", interrupt)
    resumed = make(chosen)
    found = train(chosen, resumed, tmp_path / "a.pt")
    assert equal(found, expected)
    for a, b in zip(weights(resumed), weights(whole), strict=True):
        assert torch.equal(a, b)


def test_dropouts_random_numbers_go_on(tmp_path: Path) -> None:
    chosen = case(model="lenet")

    def with_dropout() -> Classification:
        return Classification(make_lenet, chosen.settings, few_images(), "cpu")

    expected = train(chosen, with_dropout(), tmp_path / "whole.pt")

    def interrupt(record: Record) -> None:
        raise ProcessEndsError

    with pytest.raises(ProcessEndsError):
        train(chosen, with_dropout(), tmp_path / "a.pt", interrupt)
    assert equal(train(chosen, with_dropout(), tmp_path / "a.pt"), expected)


def test_a_checkpoint_of_other_settings_is_not_used(tmp_path: Path) -> None:
    def interrupt(record: Record) -> None:
        raise ProcessEndsError

    with pytest.raises(ProcessEndsError):
        train(case(lr=0.1), make(case(lr=0.1)), tmp_path / "a.pt", interrupt)
    expected = train(case(), make(case()), tmp_path / "whole.pt")
    assert equal(train(case(), make(case()), tmp_path / "a.pt"), expected)


def test_a_diverged_run_is_a_result(tmp_path: Path) -> None:
    chosen = case(solver="momentum", trust=None, lr=1e30, warmup_epochs=0.0)
    found = train(chosen, make(chosen), tmp_path / "a.pt")
    assert found["final"] is None
    assert 0 < found["diverged"] <= 1


def test_the_ratios_are_recorded_where_asked_for(tmp_path: Path) -> None:
    found = train(case(telemetry=True), make(case()), tmp_path / "a.pt")["raw_ratio"]
    assert set(found) == {name for name, _ in make_lenet5().named_parameters()}
    assert all(len(each) == 9 for each in found.values())
    assert max(x for each in found.values() for x in each) > 1  # before its bounds
    assert not train(case(), make(case()), tmp_path / "b.pt")["raw_ratio"]


def test_the_test_images_are_for_the_end_alone(tmp_path: Path) -> None:
    looked_at = []

    class Watched(Classification):
        def evaluate(self, split: str) -> float:
            looked_at.append(split)
            return super().evaluate(split)

    for split in ("test", "validation"):
        chosen = case(split=split)
        train(chosen, Watched(make_lenet5, chosen.settings, few_images(), "cpu"), tmp_path / "a.pt")
        assert looked_at == ["validation"] * 3 + [split]
        looked_at.clear()


def test_epochs_of_batches_that_do_not_divide_them() -> None:
    recipe = make(case(base_batch_size=28, batch_size=28)).recipe  # 3.4 steps an epoch
    assert [i for i in range(1, recipe.iterations + 1) if ends_epoch(recipe, i)] == [4, 7, 11]
    assert recipe.iterations == 11
    larger = make(case(base_batch_size=200, batch_size=200)).recipe
    assert [ends_epoch(larger, i) for i in (1, 2)] == [True, True]


def test_a_probed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("papers.curvature.load_images", lambda *_: few_images())
    chosen = case(solver="momentum", trust=None)
    found = train(chosen, Probed(chosen.settings, None, "cpu"), tmp_path / "whole.pt")
    assert found["probes"]["epoch"] == pytest.approx([i / 3 for i in range(1, 10)])
    assert all(math.isfinite(each) for each in found["probes"]["curvature"])
    distances = found["probes"]["distance"]
    assert distances[0] < distances[-1]

    def interrupt(record: Record) -> None:
        raise ProcessEndsError

    with pytest.raises(ProcessEndsError):
        train(chosen, Probed(chosen.settings, None, "cpu"), tmp_path / "a.pt", interrupt)
    again = train(chosen, Probed(chosen.settings, None, "cpu"), tmp_path / "a.pt")
    assert again["probes"] == found["probes"]


@pytest.mark.parametrize("model", [make_lenet5, make_lenet])
def test_models_have_the_papers_sizes(model: Callable[[], nn.Sequential]) -> None:
    sizes = {make_lenet5: 61_706, make_lenet: 3_274_634}
    made = model()
    assert sum(param.numel() for param in made.parameters()) == sizes[model]
    assert made(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


def test_solvers() -> None:
    params = [("w", nn.Parameter(torch.ones(3)))]
    for solver in PLAIN:
        made = [
            make_optimizer(solver, trust, params, lr=0.1)
            for trust in (None, "layer-wise", [0.2, 3.0])
        ]
        assert len({type(each) for each in made}) == 1
        bounds = [(each.defaults["trust_lower"], each.defaults["trust_upper"]) for each in made]
        assert bounds[1:] == [(0.0, math.inf), (0.2, 3.0)]
        assert len({each.defaults.get("momentum") for each in made}) == 1
    with pytest.raises(ValueError, match="lars has a trust ratio of its own"):
        make_optimizer("lars", "layer-wise", params, lr=0.1)


def test_without_native_kernels_nothing_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend_for("cpu") == "cpu"
    info = date_kernels.info()
    info.backends["cpu"] = "not built"
    monkeypatch.setattr(date_kernels, "info", lambda: info)
    with pytest.raises(RuntimeError, match="cpu: not built"):
        backend_for("cpu")


# --- what is kept


def test_results_are_kept_by_their_settings(tmp_path: Path) -> None:
    store = Store(tmp_path / "study")
    long = case(warmup_epochs=1 / 3)  # which JSON holds six digits of
    assert store.load(long) is None
    store.checkpoint(long).parent.mkdir()
    store.checkpoint(long).write_bytes(b"on its way")
    store.save(long, {"settings": dict(long.settings), "final": 1.0})
    assert store.require(long)["final"] == 1.0
    assert not store.checkpoint(long).exists()
    assert store.load(case(warmup_epochs=0.3)) is None
    (tmp_path / "study" / "a.json").write_text("{")
    with pytest.raises(DataError, match=r"a\.json is not JSON; remove it"):
        store.load(long)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"a\.pt cannot be read .* remove it"):
        train(case(), make(case()), tmp_path / "a.pt")


def test_weights_that_the_last_step_breaks_have_no_accuracy(tmp_path: Path) -> None:
    class Broken(Classification):
        def add_gradients(self, step: int) -> float:
            loss = super().add_gradients(step)
            if step == self.recipe.iterations - 1:
                grad = next(self.model.parameters()).grad
                assert grad is not None
                grad.fill_(math.nan)
            return loss

    training = Broken(make_lenet5, case().settings, few_images(), "cpu")
    found = train(case(), training, tmp_path / "a.pt")
    assert (found["final"], found["diverged"]) == (None, 3.0)
    assert len(found["validation"]) == 2


def made_up(case: Case, diverged: bool) -> dict[str, Any]:
    """A result in a case's form."""
    many = {"conv1.weight": [1.0, None], "conv1.bias": [2.0, 3.0]}
    probes = {"step": [1, 2], "epoch": [0.1, 0.2], "distance": [0.0, 1.0], "curvature": [None, 2.0]}
    return {
        "settings": to_plain(dict(case.settings)),
        "epochs": [] if diverged else [1.0],
        "loss": [] if diverged else [2.0],
        "validation": [] if diverged else [50.0],
        "raw_ratio": {} if diverged else many,
        "probes": {} if diverged else probes,
        "final": None if diverged else 51.5,
        "diverged": 0.5 if diverged else None,
        "seconds": 1.0,
    }


@pytest.mark.parametrize("diverged", [False, True])
@pytest.mark.parametrize(("name", "size"), KINDS)
def test_tables_and_pictures(name: str, size: Size, diverged: bool) -> None:
    study = STUDIES[name]
    results = [made_up(each, diverged) for each in study.cases(size)]
    plt.close(study.draw(results))
    cells = []
    for table in study.tables(results).values():
        assert {len(row) for row in table.rows} == {len(table.head)}
        cells += [cell for row in table.rows for cell in row]
    if name == "curvature":
        assert ("-" in cells) is diverged
    else:
        assert any("51.5" in cell for cell in cells) is not diverged
        assert any("diverges" in cell.split(" (")[0] for cell in cells) is diverged


@pytest.mark.parametrize(("name", "size"), KINDS)
def test_cases_have_names_and_recipes(
    name: str, size: Size, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every case can begin: its recipe fits, its rule and model are known."""
    data = few_images(1)
    many = Images(data.train.images.expand(55_000, -1, -1, -1), data.train.labels.expand(55_000))
    full = DataSet(data.name, data.source, many, data.validation, data.test)
    for module in ("papers.table3", "papers.curvature"):
        monkeypatch.setattr(f"{module}.load_images", lambda *_: full)
    study = STUDIES[name]
    cases = study.cases(size)
    assert len({each.name for each in cases}) == len(cases)
    for each in cases:
        assert json.loads(json.dumps(dict(each.settings))) == dict(each.settings)
        study.training(each.settings, None, "cpu")


# --- bad input


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "examples/papers/run.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_an_unknown_study() -> None:
    done = run("tabel3")
    assert done.returncode == 2
    assert f"unknown study 'tabel3': there are {', '.join(STUDIES)}" in done.stderr


def test_missing_data_name_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_images.cache_clear()
    monkeypatch.setattr(paper_images, "PACKAGE_FOLDER", tmp_path / "absent")

    def refused(_: object) -> None:
        raise DataError("no apt-get here")

    monkeypatch.setattr(paper_images, "install_package", refused)
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        load_images(None, "cpu")


def test_a_corrupt_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\0")
    done = run("table3", "--size", "slice", "--data", str(tmp_path), "--out", str(tmp_path))
    assert done.returncode == 1
    assert "train-images-idx3-ubyte in" in done.stderr
    assert "SHA-256" in done.stderr
    assert "Traceback" not in done.stderr


# --- slices


@pytest.mark.skipif(
    not (PACKAGE_FOLDER.is_dir() or os.environ.get("DATE_KERNELS_REQUIRE_DATA")),
    reason="Fashion-MNIST is not here: apt-get install dataset-fashion-mnist",
)
@pytest.mark.parametrize("name", [name for name in STUDIES if STUDIES[name].cases("slice")])
def test_a_slice_repeats_to_the_bit_and_is_the_committed_one(name: str, tmp_path: Path) -> None:
    found = []
    for folder in ("first", "again"):
        done = run(name, "--size", "slice", "--out", str(tmp_path / folder))
        assert done.returncode == 0, done.stderr
        document = json.loads((tmp_path / folder / f"slice/{name}.json").read_text())
        found.append(document["results"])
        assert (tmp_path / folder / f"slice/{name}.png").read_bytes().startswith(b"\x89PNG")
    for first, again in zip(*found, strict=True):
        assert equal(first, again)
    committed = json.loads((report.RESULTS / f"slice/{name}.json").read_text())["results"]
    for here, there in zip(found[0], committed, strict=True):
        assert here["settings"] == there["settings"]
        assert here["backend"] == "cpu"
        # Other processors' libraries round otherwise, and a few steps pass that on.
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-3)
        assert (here["diverged"] is None) == (there["diverged"] is None)


# --- the page


def test_the_page_is_of_the_committed_runs() -> None:
    """``python examples/papers/report.py`` makes it so."""
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.filled(page, report.BLOCKS) == page
    committed = sorted(path.stem for path in report.RESULTS.glob("*.json"))
    assert sorted(name for _, name, _ in report.BLOCK.findall(page)) == committed
    for name in committed:
        assert f"papers/{name}.png" in page
        assert (report.RESULTS / f"{name}.png").is_file()
        document = report.load(name)
        assert document["size"] == "full"
        assert [each["settings"] for each in document["results"]] == [
            to_plain(dict(each.settings)) for each in STUDIES[name].cases("full")
        ]
        assert not [each for each in document["results"] if each["commit"].endswith("-dirty")]


def test_rates_were_the_best_on_validation_images() -> None:
    results = report.load("table3-rates")["results"]
    for solver, chosen in RATES.items():
        best = max(of(results, solver), key=accuracy_or_zero)
        assert best["settings"]["lr"] == chosen
    assert {each["settings"]["split"] for each in results} == {"validation"}
    assert {each["settings"]["batch_size"] for each in results} == {SMALL}
    assert not {each["settings"]["seed"] for each in results} & set(SEEDS)


def test_the_bounds_are_dates() -> None:
    defaults = inspect.signature(DATE).parameters
    assert [defaults[each].default for each in ("lower", "upper")] == BOUNDS
