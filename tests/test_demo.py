"""The demo: its data, its runs, what it writes, and whether the committed run supports its text."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import RandomSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from demo import data as demo_data
from demo.config import SETTINGS, Method, Settings
from demo.data import DataError, DataSet, Images, load, load_digits, parse_idx, read_idx, split
from demo.model import make_lenet5
from demo.overhead import host_overhead
from demo.report import compare_pairs, to_plain, write_json, write_sentences
from demo.train import PIECE, Progress, add_gradients, sample_stream, train
from demo.tune import Candidate, choose_bounds, choose_recipe

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "docs" / "demo"

STUDENT_T = {2: 12.706204736432095, 3: 4.302652729749464}
"""The 97.5% quantile of Student's t by the number of pairs, from a printed table."""

METHODS = ("small", "plain", "unbounded", "bounded")

TINY_IDX = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 10, 20, 30, 40, 50, 60])
"""A 2x3 array of bytes."""


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return load_digits()


@pytest.fixture
def no_fashion_mnist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without Debian's package, and a user without rights."""
    monkeypatch.setattr(demo_data, "PACKAGE_FOLDER", tmp_path / "absent")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")


def read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((COMMITTED / name).read_text(encoding="utf-8"))
    return document


# Data


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_read_compressed_or_not(tmp_path: Path, suffix: str) -> None:
    content = gzip.compress(TINY_IDX) if suffix else TINY_IDX
    (tmp_path / f"tiny{suffix}").write_bytes(content)
    array = read_idx(tmp_path, "tiny", hashlib.sha256(TINY_IDX).hexdigest())
    assert array.tolist() == [[10, 20, 30], [40, 50, 60]]


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    changed = TINY_IDX[:-1] + b"\0"
    (tmp_path / "tiny").write_bytes(changed)
    with pytest.raises(DataError, match=r"tiny in .* SHA-256") as caught:
        read_idx(tmp_path, "tiny", hashlib.sha256(TINY_IDX).hexdigest())
    for content in (changed, TINY_IDX):
        assert hashlib.sha256(content).hexdigest() in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0\0\x0d" + TINY_IDX[3:], "begins with 00 00 08, got 00 00 0d"),
        (TINY_IDX[:-1], r"shape \(2, 3\) holds 5 values"),
    ],
)
def test_idx_of_another_kind_or_size_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_idx(content)


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tiny.gz").write_bytes(gzip.compress(TINY_IDX)[:-9])
    with pytest.raises(DataError, match=r"tiny in .* cannot be read"):
        read_idx(tmp_path, "tiny", "")


def test_a_folder_given_never_falls_back(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path} holds neither .* nor .*gz"):
        load(tmp_path, digits=False, say=print)


@pytest.mark.usefixtures("no_fashion_mnist")
def test_without_rights_the_digits_are_taken_and_it_is_said() -> None:
    said: list[str] = []
    assert load(None, digits=False, say=said.append).name == "scikit-learn digits"
    assert any("takes root" in sentence for sentence in said)
    assert any("digits instead" in sentence for sentence in said)


@pytest.mark.usefixtures("no_fashion_mnist")
def test_a_failed_installation_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        failed = "install" in command
        return SimpleNamespace(returncode=int(failed), stderr="E: no such package" * failed)

    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("subprocess.run", run)
    said: list[str] = []
    assert load(None, digits=False, say=said.append).name == "scikit-learn digits"
    assert [command[1] for command in commands] == ["update", "install"]
    assert any("E: no such package" in sentence for sentence in said)


@pytest.mark.parametrize(("count", "held_out"), [(60_000, 5000), (10, 3)])
def test_a_split_is_a_partition_and_always_the_same(count: int, held_out: int) -> None:
    kept, others = split(count, held_out)
    assert len(others) == held_out
    assert torch.cat([kept, others]).sort().values.equal(torch.arange(count))
    assert others.equal(split(count, held_out)[1])
    assert not others.equal(torch.arange(held_out))


def test_no_digit_is_in_two_sets(digits: DataSet) -> None:
    sets = (digits.train, digits.validation, digits.test)
    assert [len(part) for part in sets] == [1197, 300, 300]
    images = torch.cat([part.images for part in sets])
    assert len(torch.unique(images.flatten(1), dim=0)) == 1797  # no two digits are equal
    pixels = digits.train.images.double()
    # float32 statistics of a million pixels
    assert float(pixels.mean()) == pytest.approx(0, abs=1e-5)
    assert float(pixels.std()) == pytest.approx(1, abs=1e-5)


# Training


@pytest.mark.parametrize(("samples", "count"), [(10, 35), (10, 30), (10, 7), (1, 4)])
def test_the_stream_is_torchs_random_sampler(samples: int, count: int) -> None:
    stream = sample_stream(samples, count, torch.Generator().manual_seed(5))
    sampler = RandomSampler(
        range(samples), num_samples=count, generator=torch.Generator().manual_seed(5)
    )
    assert stream.tolist() == list(sampler)


def test_the_stream_is_unbroken_and_full() -> None:
    stream = sample_stream(100, 350, torch.Generator().manual_seed(0))
    assert len(stream) == 350
    passes = stream[:300].view(3, 100)
    assert passes.sort(dim=1).values.equal(torch.arange(100).expand(3, 100))
    assert not passes[0].equal(passes[1])
    assert len(torch.unique(stream[300:])) == 50


def test_lenet5_has_the_papers_size() -> None:
    assert sum(parameter.numel() for parameter in make_lenet5().parameters()) == 61_706


def test_pieces_of_a_batch_give_the_batchs_gradient(digits: DataSet) -> None:
    torch.manual_seed(0)
    model = make_lenet5().double()
    images = Images(digits.train.images.double(), digits.train.labels)
    batch = torch.arange(2 * PIECE + 17)
    loss = add_gradients(model, images, batch)
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    whole = torch.nn.functional.cross_entropy(model(images.images[batch]), images.labels[batch])
    whole.backward()  # type: ignore[no-untyped-call]
    assert loss == pytest.approx(whole.item(), rel=1e-12)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-10, atol=1e-14)


def start_of(method: Method, settings: Settings, data: DataSet, seed: int) -> list[Progress]:
    steps: list[Progress] = []
    recipe = settings.make_recipe(len(data.train))
    run = train(method, recipe, data, seed, steps.append, use_test=False)
    assert math.isnan(run.test)
    scaled = recipe.at(method.batch_size)
    assert [step.lr for step in steps] == run.lr == [scaled.lr(i + 1) for i in range(len(run.lr))]
    assert len(steps) == scaled.iterations
    assert run.epochs[0] == 0
    assert run.epochs[-1] == scaled.iterations * method.batch_size / len(data.train)
    assert len(run.epochs) == len(run.validation) == len(set(run.epochs))
    assert set(run.raw_ratio) == set(run.ratio) == (NAMES if method.trust else set())
    for ratios in run.ratio.values():
        assert len(ratios) == scaled.iterations
        assert method.trust is not None
        assert all(method.trust.lower <= ratio <= method.trust.upper for ratio in ratios)
    return steps


NAMES = {name for name, _ in make_lenet5().named_parameters()}


def test_a_seed_pairs_the_methods_and_the_test_images_stay_untouched(digits: DataSet) -> None:
    unseen = replace(digits, test=Images(torch.empty(0), torch.empty(0)))
    settings = SETTINGS[digits.name].shorten(2)
    runs = {
        (method.key, seed): start_of(method, settings, unseen, seed)
        for method in settings.make_methods()
        for seed in (0, 1)
        if method.key != "small"
    }
    for seed in (0, 1):  # before the first step: the same weights and the same images
        assert len({runs[key, seed][0].loss for key in METHODS[1:]}) == 1
        assert len({runs[key, seed][-1].loss for key in METHODS[1:]}) == 3
    assert runs["plain", 0][0].loss != runs["plain", 1][0].loss


# Report


def test_the_interval_is_students() -> None:
    pairs = compare_pairs([3.0, 5.0, 7.0], [2.0, 3.0, 4.0])
    half = STUDENT_T[3] / math.sqrt(3)  # differences 1, 2, 3: mean 2, deviation 1
    assert pairs["differences"] == [1, 2, 3]
    assert [pairs["mean"], *pairs["interval"]] == pytest.approx([2, 2 - half, 2 + half], rel=1e-12)
    assert compare_pairs([1.0], [0.5])["interval"] is None


@pytest.mark.parametrize(
    ("behind", "differences", "said"),
    [
        (
            [30.0, 61.2],
            [1.0, 2.0],
            ["bounds falls at least 30 points", "on every seed", "contains 0"],
        ),
        (
            [29.9, 61.2],
            [1.0, 1.1],
            ["does not fall at least 30 points", "on every seed", "does not contain 0"],
        ),
        ([30.0, 61.2], [-1.0, -1.1], ["-1.1 points on average", "does not contain 0"]),
        ([50.0], [-1.0], ["on the one seed", "-1.0 points", "no interval"]),
    ],
)
def test_sentences_follow_the_numbers(
    behind: list[float], differences: list[float], said: list[str]
) -> None:
    document = {
        "settings": {"large_batch_size": 8192},
        "unbounded_behind_both": behind,
        "bounded_minus_plain": compare_pairs(differences, [0.0] * len(differences)),
    }
    text = " ".join(write_sentences(document))
    assert all(part in text for part in said), text


def test_what_is_not_finite_is_written_as_null(tmp_path: Path) -> None:
    write_json({"numbers": [1 / 3, math.inf, math.nan], "text": "[a,  b]"}, tmp_path / "x.json")
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert '"numbers": [ 0.333333, null, null ]' in text
    assert json.loads(text)["text"] == "[a,  b]"


def test_host_overhead_is_a_line_through_its_medians() -> None:
    overhead = host_overhead(tensors=(2, 12), steps=5)
    assert all(median > 0 for median in overhead.medians)
    for count, median in zip(overhead.tensors, overhead.medians, strict=True):
        line = overhead.per_step + overhead.per_tensor * count
        assert line == pytest.approx(median, rel=1e-12)


def check_document(document: dict[str, Any], seeds: int) -> None:
    """Recompute, from the accuracies of the runs alone, everything that the document says."""
    assert document["schema"] == 1
    accuracy = {
        key: [run["test"] for run in document["runs"] if run["method"] == key] for key in METHODS
    }
    assert [run["seed"] for run in document["runs"]] == list(range(seeds)) * len(METHODS)
    for key, values in accuracy.items():
        summary, method = document["test_accuracy"][key], document["methods"][key]
        assert summary["mean"] == pytest.approx(mean(values), rel=1e-5)  # six digits are written
        assert summary["range"] == [min(values), max(values)]
        assert len(method["lr"]) == method["iterations"]
        for run in document["runs"]:
            if run["method"] == key and method["bounds"] is not None:
                assert set(run["raw_ratio"]) == set(run["ratio"]) == NAMES
                assert {len(ratios) for ratios in run["ratio"].values()} == {method["iterations"]}

    behind = [
        min(plain, bounded) - unbounded
        for plain, unbounded, bounded in zip(
            accuracy["plain"], accuracy["unbounded"], accuracy["bounded"], strict=True
        )
    ]
    assert document["unbounded_behind_both"] == pytest.approx(behind, rel=1e-5, abs=1e-5)
    collapse, paired = document["sentences"]
    assert ("bounds falls at least 30 points" in collapse) == (min(behind) >= 30)

    differences = [b - p for b, p in zip(accuracy["bounded"], accuracy["plain"], strict=True)]
    half = STUDENT_T[seeds] * stdev(differences) / math.sqrt(seeds)
    interval = [mean(differences) - half, mean(differences) + half]
    pairs = document["bounded_minus_plain"]
    assert pairs["mean"] == pytest.approx(mean(differences), rel=1e-5, abs=1e-5)
    assert pairs["interval"] == pytest.approx(interval, rel=1e-5, abs=1e-5)
    assert f"{pairs['mean']:+.1f} points" in paired
    assert f"[{pairs['interval'][0]:+.1f}, {pairs['interval'][1]:+.1f}]" in paired
    assert ("does not contain 0" in paired) == (interval[0] > 0 or interval[1] < 0)


def test_the_digits_from_end_to_end(tmp_path: Path) -> None:
    command = [sys.executable, "examples/demo/run.py", "--digits", "--epochs=1", "--seeds=2"]
    done = subprocess.run(
        [*command, "--out", tmp_path], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))
    check_document(document, seeds=2)
    assert document["data"]["name"] == "scikit-learn digits"
    assert [document["methods"][key]["batch_size"] for key in METHODS] == [32, 512, 512, 512]
    assert document["command"].startswith("python examples/demo/run.py --digits")
    for key in ("commit", "versions", "machine", "host_overhead_us"):
        assert key in document
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    shown = " ".join(done.stdout.split())
    for sentence in document["sentences"]:
        assert sentence in shown


# What is committed


def test_the_committed_run_supports_its_text() -> None:
    document = read("demo.json")
    check_document(document, seeds=3)
    assert document["data"]["name"] == "Fashion-MNIST"
    assert [document["data"][key] for key in ("train", "validation", "test")] == [
        55_000,
        5000,
        10_000,
    ]
    assert document["settings"] == to_plain(asdict(SETTINGS["Fashion-MNIST"]))
    assert min(document["unbounded_behind_both"]) >= 30
    assert document["sentences"] == write_sentences(document)
    assert (COMMITTED / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", SETTINGS)
def test_the_settings_are_what_tuning_chose(name: str) -> None:
    tuned, settings = read("tuning.json")["data"][name], SETTINGS[name]
    for key in ("lr", "warmup_epochs", "lower", "upper"):
        assert tuned["choice"][key] == getattr(settings, key), key
    for key in ("batch_size", "large_batch_size", "epochs"):
        assert tuned[key] == getattr(settings, key), key


@pytest.mark.parametrize("name", SETTINGS)
def test_tuning_chose_by_its_rule(name: str) -> None:
    tuned = read("tuning.json")["data"][name]
    candidates = []
    for row in tuned["candidates"]:
        written = row.pop("mean")
        candidates.append(Candidate(**row))
        assert written == pytest.approx(mean(row["accuracy"]), rel=1e-5)
        assert not set(row["seeds"]) & {0, 1, 2}  # the demo's own
    small, plain, bounded = (
        [candidate for candidate in candidates if candidate.method == key]
        for key in ("small", "plain", "bounded")
    )
    recipe, bounds = choose_recipe(small, plain), choose_bounds(bounded)
    assert {(c.lr, c.warmup_epochs) for c in bounded} == {(recipe.lr, recipe.warmup_epochs)}
    assert tuned["choice"] == {
        "lr": recipe.lr,
        "warmup_epochs": recipe.warmup_epochs,
        "lower": bounds.lower,
        "upper": bounds.upper,
    }
    sums = {(a.lr, a.warmup_epochs): a.mean + b.mean for a, b in zip(small, plain, strict=True)}
    hundredth = 0.01  # how finely the rule looks
    assert sums[recipe.lr, recipe.warmup_epochs] >= max(sums.values()) - hundredth
    assert bounds.mean >= max(candidate.mean for candidate in bounded) - hundredth
