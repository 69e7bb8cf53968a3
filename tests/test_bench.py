"""``python -m date_optim.bench``: its words, bytes, intervals, checks, rows and files."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from date_optim import SGD
from date_optim.bench import __main__ as command
from date_optim.bench import (
    bars,
    clocks,
    contestants,
    field,
    machine,
    run,
    sweeps,
    traffic,
)
from date_optim.bench.bars import Bar, cpu_bars, decide
from date_optim.bench.check import why_not
from date_optim.bench.clocks import CpuClock
from date_optim.bench.contestants import Contestant
from date_optim.bench.measure import Case, Effort, Runner, absent, measure, runners_of, take_turns
from date_optim.bench.memory import peak_bytes
from date_optim.bench.models import MODELS, parameters, shapes_of
from date_optim.bench.peers import PEERS
from date_optim.bench.statistics import Ratio, paired_ratio, quantiles
from date_optim.bench.traffic import Streams, copied_bytes, floor_bytes, model_bytes

TINY = ["--device", "cpu", "--quick", "--models", "lenet", "--rules", "momentum", "--threads", "1"]


@pytest.fixture(autouse=True)
def _small_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the rates are of, and what is rewritten before a step, need not be large here."""
    monkeypatch.setitem(traffic.ELEMENTS, "cpu", 1 << 16)
    monkeypatch.setattr(clocks, "COLD", 1 << 20)
    for module in (clocks, traffic):
        monkeypatch.setattr(module, "cache_bytes", lambda device: 1 << 17)


class Ticks:
    """A clock that runs steps and says how long what it was told."""

    device = "cpu"

    def __init__(self, *times: float) -> None:
        self.times = times
        self.taken = 0

    def cold(self, step: Callable[[], Any]) -> float:
        step()
        self.taken += 1
        return self.times[(self.taken - 1) % len(self.times)]

    warm = cold

    def host(self, step: Callable[[], Any]) -> None:
        return None


def named(rule: str, name: str, *peers: str) -> Contestant:
    return next(each for each in contestants.contestants(rule, "cpu", peers) if each.name == name)


def tiny_case(rule: str = "momentum") -> Case:
    return Case("cpu", rule, "lenet", shapes_of("lenet"), 1)


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "known"),
    [
        (["--rules", "adma"], "momentum"),
        (["--models", "resnet-50"], "resnet50"),
        (["--peers", "tim"], "pytorch-optimizer"),
        (["--device", "tpu"], "cuda"),
        (["--sweep", "sizes"], "tensors"),
        (["--threads", "0"], "at least 1"),
        (["--minutes", "0", "--bars"], "above 0"),
        (["--minutes", "nan", "--bars"], "above 0"),
        (["--minutes", "3"], "without --bars"),
        (["--models", "lenet", "--sweep", "size"], "with --sweep"),
        (["--quick", "--quick", "--bars"], "with --bars"),
        (["--threads", "1", "--sweep", "threads"], "with --sweep threads"),
        (["--models", "lenet", "--bars"], "bert-base"),
        (["--rules", "lion", "--bars"], "adam, momentum"),
        (["--output", __file__], "is a file"),
    ],
)
def test_unknown_words_bring_the_known_ones(
    words: list[str], known: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        command.main(words if "--device" in words else [*words, "--device", "cpu"])
    assert exit_info.value.code == 2
    said = capsys.readouterr().err
    assert words[1] in said or words[0] in said
    assert known in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "all"])
def test_a_device_that_is_not_there(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--device", device])
    assert f"--device {device}: torch sees no GPU; there is cpu" in capsys.readouterr().err


def test_without_the_extra_it_says_which(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert command.main(TINY) == 2
    said = capsys.readouterr().err
    assert 'pip install "date-kernels[bench]"' in said
    assert said.count("\n") == 1


# --- bytes ----------------------------------------------------------------------------------------


def test_bytes_by_hand() -> None:
    sizes = [100, 1000]
    assert [floor_bytes(rule, sizes) for rule in ("sgd", "momentum", "adam")] == [
        *(1100 * 12, 1100 * 20, 1100 * 28),
    ]
    cache = 4000  # half of it holds 8 bytes of 250 elements, 16 of 125
    assert model_bytes("momentum", None, sizes, cache) == 1100 * 20
    assert model_bytes("momentum", "gradient", sizes, cache) == 100 * 20 + 1000 * 28
    assert model_bytes("adam", "gradient", sizes, cache) == 100 * 28 + 1000 * 36
    assert model_bytes("adam", "update", sizes, cache) == 100 * 28 + 1000 * 40
    assert model_bytes("adam", "update", [125, 126], cache) == 125 * 28 + 126 * 40
    assert model_bytes("adam", "update", sizes, 1 << 20) == floor_bytes("adam", sizes)


def test_rates_are_bytes_by_time() -> None:
    streams = Streams("cpu")
    assert streams.copy_rate(Ticks(1e3)) == copied_bytes("cpu") / 1e6
    assert copied_bytes("cpu") == 2 * streams._source.numel() * 4
    five = 5 * 4 * streams._param.numel()
    assert streams.five_stream_rate(Ticks(2e3)) == five / 2e6


def test_what_is_rewritten_before_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for cache, rewritten, copied, stepped in (
        (0, 1 << 28, 1 << 27, 1 << 26),
        (300 << 20, 600 << 20, 300 << 20, 300 << 20),
    ):
        for module in (clocks, traffic):
            monkeypatch.setattr(module, "cache_bytes", lambda device, cache=cache: cache)
        assert field.protocol("cpu") == {
            "rewritten_bytes": rewritten,
            "copied_array_bytes": copied,
            "stepped_array_bytes": stepped,
        }
    monkeypatch.setattr(clocks, "cache_bytes", lambda device: 0)
    clock = CpuClock()
    assert clock._rewritten.nbytes == 256 * 2**20
    seen: list[int] = []
    assert clock.cold(lambda: seen.append(int(clock._rewritten[-1]))) > 0
    assert seen == [1]


def test_the_peak_of_a_step() -> None:
    ones = torch.ones(1 << 18)

    def step() -> None:
        for _ in range(3):
            (ones + 1).add_(ones * 2)  # two of 1 MiB at a time

    peak = peak_bytes(step, "cpu")
    assert 2 << 20 <= peak < (2 << 20) + 100  # and the numbers 1 and 2
    assert peak_bytes(ones.zero_, "cpu") == 0


@pytest.mark.parametrize("model", MODELS)
def test_shapes_are_what_their_file_says(model: str) -> None:
    folder = Path(command.__file__).parent / "shapes"
    said = json.loads((folder / f"{model}.json").read_text(encoding="utf-8"))
    shapes = shapes_of(model)
    assert len(shapes) == said["tensors"]
    assert sum(int(np.prod(shape)) for shape in shapes) == said["parameters"]


# --- intervals ------------------------------------------------------------------------------------


def test_an_interval_of_equal_ratios_is_a_point() -> None:
    under = np.array([1.0, 5.0, 2.0, 9.0])
    assert paired_ratio(1.5 * under, under) == Ratio(1.5, 1.5, 1.5)


def test_a_95_percent_interval_holds_the_median_of_95_percent() -> None:
    """300 samples of ratios whose median is 2; the binomial error of the share is 1.3%."""
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(300):
        under = generator.lognormal(0, 1, 51)
        ratio = paired_ratio(2 * generator.lognormal(0, 0.1, 51) * under, under)
        assert ratio.low <= ratio.median <= ratio.high
        assert ratio.width == (ratio.high - ratio.low) / ratio.median
        held += ratio.low <= 2 <= ratio.high
    assert 0.91 <= held / 300 <= 0.99


def test_noise_of_both_does_not_widen_the_interval() -> None:
    noise = np.random.default_rng(2).lognormal(0, 1, 101)
    assert paired_ratio(1.1 * noise, noise).width < 1e-12


def test_quantiles() -> None:
    assert quantiles([5, 1, 4, 2, 3, 6]) == (2.0, 3.5, 5.0)


# --- the check ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", contestants.RULES)
def test_all_that_need_no_download_are_right(rule: str) -> None:
    for each in contestants.contestants(rule, "cpu", ["torch-fused", "torch-foreach"]):
        assert why_not(each, "cpu") is None, each.name


@pytest.mark.parametrize(
    ("rule", "name", "other"),
    [
        ("momentum", "plain", "DATE"),
        ("momentum", "DATE", "LARS"),
        ("adam", "LAMB", "plain"),
        ("adam", "DATE", "LAMB"),
        ("lion", "plain", "DATE"),
    ],
)
def test_another_rule_is_a_wrong_result(rule: str, name: str, other: str) -> None:
    wrong = replace(named(rule, name), make=named(rule, other).make)
    why = why_not(wrong, "cpu")
    assert why is not None
    assert why.startswith("wrong result: after 3 steps a layer of shape")


def test_a_rate_that_is_a_thousandth_off_is_a_wrong_result() -> None:
    options: dict[str, Any] = {"lr": 1.001e-3, "momentum": 0.9, "weight_decay": 1e-4}
    make: contestants.Make = partial(contestants._make, SGD, **options)
    wrong = replace(named("momentum", "plain"), make=make)
    assert "wrong result" in str(why_not(wrong, "cpu"))


@pytest.mark.parametrize("rule", contestants.RULES)
def test_a_decay_that_is_not_there_is_a_wrong_result(rule: str) -> None:
    plain = named(rule, "plain")

    def make(params: list[torch.Tensor], **options: Any) -> Any:
        return plain.make(params, **{**options, "weight_decay": 0.0})

    # Of others more roundings are allowed, as many as the decay of what is timed is worth.
    assert "wrong result" in str(why_not(replace(plain, make=make, peer="other"), "cpu"))


def with_wrong(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let a contestant of momentum do nothing."""
    real = contestants.contestants

    def changed(rule: str, device: str, peers: list[str]) -> list[Contestant]:
        def idle(params: list[torch.Tensor], **options: Any) -> SGD:
            return SGD(params, lr=0.0)

        return [
            replace(each, make=idle) if each.name == name else each
            for each in real(rule, device, peers)
        ]

    monkeypatch.setattr(field, "contestants", changed)


def test_a_wrong_one_of_ours_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with_wrong(monkeypatch, "LARS")
    assert command.main([*TINY, "--output", str(tmp_path)]) == 1
    assert "momentum, LARS on cpu: wrong result" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- rows -----------------------------------------------------------------------------------------


def test_rows_agree_with_their_times() -> None:
    case, names = tiny_case(), ("plain", "torch fused")
    taking_part = [named("momentum", name, "torch-fused") for name in names]
    rows = measure(case, taking_part, CpuClock(), Streams("cpu"), Effort(4, 60))
    assert [row["contestant"] for row in rows] == list(names)
    for row in rows:
        cold = np.array(row["cold_us"])
        assert len(cold) == len(row["warm_us"]) == row["turns"] == 4
        assert row["cold_us_p50"] == np.median(cold)
        assert row["warm_us_p50"] == np.median(row["warm_us"])
        assert row["of_baseline"] == np.median(cold / np.array(rows[1]["cold_us"]))
        assert row["baseline"] == "torch fused"
        assert row["floor_bytes"] == 20 * row["parameters"] == 20 * 3_274_634
        assert row["gb_per_s"] == row["model_bytes"] / np.median(cold) / 1e3
        assert row["of_copy"] == row["gb_per_s"] / row["copy_gb_per_s"]
        assert row["of_five_streams"] == row["gb_per_s"] / row["five_streams_gb_per_s"]


def fake_runners(steps: dict[str, Callable[[], Any]]) -> list[Runner]:
    runners = []
    for name, step in steps.items():
        contestant = replace(named("sgd", "plain"), name=name, peer="timm")
        runners.append(Runner(contestant, parameters([(3,)], "cpu"), []))
        runners[-1].step = step
    return runners


def test_contestants_take_turns_in_an_order_drawn_anew() -> None:
    orders = []
    for _ in range(2):
        order: list[str] = []
        runners = fake_runners({name: partial(order.append, name) for name in "abc"})
        assert run_turns(runners, 60) == list(range(1, 61))
        orders.append("".join(order))
    turns = [orders[0][i : i + 3] for i in range(0, 180, 3)]
    assert all(sorted(turn) == list("abc") for turn in turns)
    assert len(set(turns)) == 6  # also who follows whom changes
    assert orders[0] == orders[1]


def test_a_peer_that_raises_later_takes_no_further_turn() -> None:
    taken: list[str] = []

    def fails() -> None:
        taken.append("b")
        if taken.count("b") == 4:
            raise ValueError("no more")

    runners = fake_runners({"a": partial(taken.append, "a"), "b": fails})
    for runner in runners:
        runner.warm_up()
    run_turns(runners, 5)
    assert (taken.count("a"), taken.count("b")) == (7, 4)
    assert [runner.failure for runner in runners] == ["", "fails: ValueError: no more"]


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_case_goes_on_without_a_peer_that_raises(steps: int) -> None:
    class Fails(torch.optim.SGD):
        left = steps

        def step(self, closure: Any = None) -> Any:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("no kernel")

    fused = named("momentum", "torch fused", "torch-fused")
    wrong = replace(fused, name="other", make=partial(contestants._make, Fails, lr=0.1))
    taking_part = [named("momentum", "plain"), wrong]
    rows = measure(tiny_case(), taking_part, CpuClock(), Streams("cpu"), Effort(3, 60))
    assert [row["status"] for row in rows] == ["measured", "fails: RuntimeError: no kernel"]
    own = replace(wrong, peer=contestants.OURS)
    with pytest.raises(RuntimeError, match="no kernel"):
        measure(tiny_case(), [own], CpuClock(), Streams("cpu"), Effort(3, 60))


def test_a_compiled_step_is_compiled_in_each_case() -> None:
    """Ten models, each with steps of its own: torch gives up at eight, unless it begins anew."""
    calls: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(1)
        return graph.forward

    real = torch.compile
    compiled = named("momentum", "torch compiled", "torch-compiled")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(torch, "compile", partial(real, backend=backend))
        for tensors in range(1, 11):
            before = len(calls)
            case = Case("cpu", "momentum", "some", [[3]] * tensors, 1)
            (runner,) = runners_of(case, [compiled])
            assert not runner.failure
            assert len(calls) > before
    torch.compiler.reset()


def test_peers_step_one_by_one_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, bool] = {}

    def noted(module: str, name: str, params: Any, *, foreach: bool, **options: Any) -> None:
        told[module] = foreach

    monkeypatch.setattr(contestants, "_peer", noted)
    contestants._faster("timm.lars", "Lars", parameters([(3,)], "cpu"))
    assert told == {"timm.lars": False}


def run_turns(runners: list[Runner], count: int) -> list[int]:
    turns = take_turns(runners, Ticks(1.0), warm=False)
    return [next(turns) for _ in range(count)]


def test_gradients_that_a_peer_wrote_over_come_back() -> None:
    params = parameters([(3,)], "cpu")
    saved = [param.grad.clone() for param in params if param.grad is not None]
    contestant = replace(named("sgd", "plain"), writes_gradients=True)
    runner = Runner(contestant, params, saved)
    runner.step = lambda: params[0].grad.mul_(0.5)  # type: ignore[union-attr]
    runner.warm_up()
    runner.take_turn(Ticks(1.0), True)
    assert params[0].grad is not None
    assert torch.equal(params[0].grad, saved[0])


def read(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def test_a_run_leaves_its_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One peer is measured; of three that are not, each says why in its row."""
    with_wrong(monkeypatch, "torch foreach")
    monkeypatch.setitem(PEERS, "torch-optimizer", "torch")  # installed, it seems
    monkeypatch.setitem(sys.modules, "torch_optimizer", None)  # but does not import
    monkeypatch.setitem(PEERS, "timm", "no such distribution")
    peers = ["torch-fused", "torch-foreach", "torch-optimizer", "timm"]
    assert command.main([*TINY, "--peers", *peers, "--output", str(tmp_path)]) == 0
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"bench.json", "bench.csv", "bench-cpu.png"}
    rows = read(tmp_path / "bench.json")
    status = {row["contestant"]: row["status"] for row in rows}
    assert status.pop("torch foreach").startswith("wrong result: ")
    assert status.pop("torch-optimizer LARS").startswith("fails to import: ")
    assert status.pop("timm Lars") == "not installed"
    assert status == dict.fromkeys(("plain", "DATE", "LARS", "torch fused"), "measured")
    with (tmp_path / "bench.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["contestant"] for row in table] == [row["contestant"] for row in rows]
    for line, row in zip(table, rows, strict=True):
        assert line["cold_us_p50"] == str(row.get("cold_us_p50", ""))
    fused = next(row for row in rows if row["contestant"] == "torch fused")
    for row in rows:
        if row["status"] == "measured":
            ratios = np.array(row["cold_us"]) / np.array(fused["cold_us"])
            assert row["of_baseline"] == np.median(ratios)
    about = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert about["command"].startswith("python -m date_optim.bench --device cpu --quick")
    assert str(tmp_path) not in json.dumps(about), "whose folder it was is nobody's business"
    assert "/" not in about["date_kernels"]["openmp_library"]
    assert about["versions"]["torch"] == torch.__version__
    assert about["date_kernels"]["torch_version"] == torch.__version__
    assert {"processor", "cores", "caches"} <= set(about["machine"])
    said = capsys.readouterr().out
    assert all(row["contestant"].split()[0] in said for row in rows)


def test_an_interrupt_keeps_the_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two cases the second is interrupted."""
    cases = []

    def interrupted(case: Case, *args: Any) -> Any:
        cases.append(case.rule)
        if len(cases) == 2:
            raise KeyboardInterrupt
        return measure(case, *args)

    monkeypatch.setattr(run, "measure", interrupted)
    words = [*TINY[:6], "sgd", "lion", *TINY[7:], "--peers", "--output", str(tmp_path)]
    assert command.main(words) == field.INTERRUPTED
    assert cases == ["sgd", "lion"]
    assert [row["contestant"] for row in read(tmp_path / "bench.json")] == ["plain", "DATE"]
    assert (tmp_path / "bench.csv").exists()
    assert (tmp_path / "bench-cpu.png").exists()
    said = capsys.readouterr().out
    assert "interrupted: 2 rows are kept in " in said
    assert said.index("plain") < said.index("interrupted")


def test_a_run_without_a_folder_has_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A peer that is named has a row where it cannot take part, too; a second run keeps away."""
    monkeypatch.chdir(tmp_path)
    assert command.main([*TINY, "--peers", "bitsandbytes", "apex"]) == 0
    (folder,) = (tmp_path / "bench-results").iterdir()
    assert folder.name.startswith("cpu-")
    rows = {row["contestant"]: row["status"] for row in read(folder / "bench.json")}
    assert rows["bitsandbytes LARS"] == "not for cpu"
    assert rows["apex"] == "not for momentum"
    with pytest.raises(SystemExit):
        command.main([*TINY, "--output", str(folder)])
    assert "holds a bench.json already" in capsys.readouterr().err


def test_a_commit_is_not_that_of_a_repository_around(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "one"], check=True)
    (tmp_path / "inner").mkdir()
    assert len(machine._commit_at(tmp_path)) >= 7
    assert machine._commit_at(tmp_path / "inner") == ""


# --- bars -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "at_least", "word"),
    [
        (Ratio(0.9, 0.88, 0.92), False, "met"),
        (Ratio(0.9, 0.88, 0.92), True, "missed"),
        (Ratio(1.1, 1.08, 1.12), False, "missed"),
        (Ratio(1.1, 1.08, 1.12), True, "met"),
        (Ratio(1.0, 0.99, 1.01), False, "undecided"),
        (Ratio(1.0, 1.0, 1.0), True, "undecided"),
    ],
)
def test_a_bar_is_met_by_the_whole_interval(ratio: Ratio, at_least: bool, word: str) -> None:
    bar = Bar("cpu", "lenet", "sgd", ("plain",), "torch fused", 1.0, at_least)
    assert bar.word(ratio) == word


class ByOwner(Ticks):
    """Ours take the first time; others take the second, or, every other turn, the third."""

    def cold(self, step: Callable[[], Any]) -> float:
        step()
        if isinstance(getattr(step, "__self__", None), SGD):
            return self.times[0]
        self.taken += 1
        return self.times[1 + self.taken % (len(self.times) - 1)]


def decided(monkeypatch: pytest.MonkeyPatch, seconds: float, *times: float) -> list[bars.Verdict]:
    """Verdicts of two bars by a clock; one of the second one's peers is not there."""
    taking_part = [named("sgd", "plain"), named("sgd", "torch fused", "torch-fused")]
    asked = [
        Bar("cpu", "lenet", "sgd", ("plain",), "torch fused", 1.0),
        Bar("cpu", "lenet", "sgd", ("torch fused", "b"), "plain", 0.1, at_least=True),
    ]
    monkeypatch.setattr(bars, "shapes_of", lambda model: [(3,)])
    reasons = {"b": "not installed"}
    return decide(asked, taking_part, reasons, ByOwner(*times), Streams("cpu"), 1, seconds)


def test_bars_are_measured_until_they_are_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    met, absent = decided(monkeypatch, 60, 9.0, 10.0)
    assert (met.word, met.ratio, met.turns) == ("met", Ratio(0.9, 0.9, 0.9), bars.LEAST_TURNS)
    assert (absent.word, absent.ratio) == ("undecided", None)
    assert absent.reason == "b: not installed"
    assert bars.line_of(absent).endswith("undecided (b: not installed)")


def test_a_clear_ratio_does_not_end_a_wide_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Far below the bar, but 20% wide: it goes on, and at the time limit says so."""
    verdict, _ = decided(monkeypatch, 0.5, 1.0, 10.0, 12.0)
    assert verdict.turns > bars.LEAST_TURNS
    assert verdict.ratio is not None
    assert verdict.ratio.high < verdict.bar.limit
    assert verdict.word == "undecided"
    assert verdict.reason.endswith("at the time limit")


def test_bars_that_time_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit within a narrow interval; and a ratio of few turns, however clear."""
    verdict, _ = decided(monkeypatch, 60, 10.0, 10.0)
    assert (verdict.word, verdict.turns) == ("undecided", bars.LEAST_TURNS)
    verdict, _ = decided(monkeypatch, 0.0, 1.0, 10.0)
    assert (verdict.word, verdict.ratio, verdict.turns) == ("undecided", Ratio(0.1, 0.1, 0.1), 1)


def test_a_peer_that_raises_leaves_its_bar_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(params: Any, **options: Any) -> Any:
        raise ValueError("no")

    taking_part = [
        named("sgd", "plain"),
        replace(named("sgd", "torch fused", "torch-fused"), make=fails),
    ]
    bar = Bar("cpu", "lenet", "sgd", ("plain",), "torch fused", 1.0)
    (verdict,) = decide([bar], taking_part, {}, Ticks(1.0), Streams("cpu"), 1, 60)
    assert (verdict.word, verdict.reason) == ("undecided", "torch fused: fails: ValueError: no")


def test_the_cpus_bars() -> None:
    """The numbers of the project's bars."""
    table = {
        (bar.model, bar.rule, *bar.over): bar.limit for bar in cpu_bars(True) if not bar.at_least
    }
    assert len(table) == 18
    for model, momentum, adam in (
        ("resnet50", (0.95, 1.05, 1.05), (0.95, 1.10, 1.10)),
        ("bert-base", (0.95, 1.20, 1.20), (0.95, 1.25, 1.25)),
        ("ptb-large", (1.00, 1.40, 1.40), (1.00, 1.45, 1.45)),
    ):
        names = ("plain", "LARS", "DATE")
        assert tuple(table[model, "momentum", name] for name in names) == momentum
        names = ("plain", "LAMB", "DATE")
        assert tuple(table[model, "adam", name] for name in names) == adam
    split = [bar.limit for bar in cpu_bars(False) if bar.model == "resnet50" and not bar.at_least]
    assert split == [0.95, 1.15, 1.15, 0.95, 1.10, 1.10]
    python = {(bar.rule, bar.limit, bar.under) for bar in cpu_bars(True) if bar.at_least}
    assert python == {("momentum", 2.5, "LARS"), ("adam", 4.0, "LAMB")}
    for bar in cpu_bars(True):
        there = {each.name for each in contestants.contestants(bar.rule, "cpu", list(PEERS))}
        assert bar.contestants <= there


def test_a_gpus_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cache that holds no layer: LAMB moves 40 bytes of a parameter, torch's AdamW 28."""
    monkeypatch.setattr(bars, "cache_bytes", lambda device: 0)
    monkeypatch.setattr(bars, "installed_version", lambda peer: "1.0")
    found = {
        (bar.over, bar.under): bar
        for bar in bars.cuda_bars()
        if (bar.model, bar.rule) == ("resnet50", "adam")
    }
    size, tensors = 25_557_032, 161
    assert found[("plain",), "torch fused"].limit == 1.0
    assert found[("LAMB",), "torch fused"].limit == pytest.approx(1.1 * 40 / 28)
    assert found[("DATE",), "torch fused"].limit == pytest.approx(1.1 * 36 / 28)
    copied = found[("copy",), "LAMB"]
    assert (copied.limit, copied.at_least) == (0.9, True)
    assert copied.factor == 40 * size / copied_bytes("cuda")
    apex = found[("apex FusedLAMB",), "LAMB"]
    assert apex.limit == pytest.approx(0.9 * 52 / 40)
    assert apex.at_least
    assert found[("host, LAMB",), ""].factor == 1 / (30 + 0.8 * tensors)
    assert found[("host, LAMB",), "host, torch fused"].limit == pytest.approx(1 / 3)
    assert len(found) == 8


@pytest.mark.parametrize(("limit", "word"), [(1e9, "met"), (1e-9, "missed")])
def test_bars_decide_the_exit_code(
    limit: float,
    word: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Neither rich nor matplotlib is there."""
    bar = Bar("cpu", "lenet", "momentum", ("plain",), "torch fused", limit)
    monkeypatch.setattr(command, "bars_of", lambda device: [bar])
    monkeypatch.setattr(bars, "NARROW", 1e6)
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    for name in ("rich", "rich.console", "matplotlib", "date_optim.bench.run"):
        monkeypatch.setitem(sys.modules, name, None)
    words = ["--device", "cpu", "--models", "lenet", "--rules", "momentum", "--threads", "1"]
    words += ["--bars", "--minutes", "0.2", "--peers", "torch-fused", "--output", str(tmp_path)]
    assert command.main(words) == int(word == "missed")
    (row,) = read(tmp_path / "bars.json")
    assert row["word"] == word
    about = json.loads((tmp_path / "bars.json").read_text(encoding="utf-8"))
    assert about["protocol"]["cpu"]["rewritten_bytes"] == 1 << 20
    assert f"{int(word == 'met')} of 1 bars are met" in capsys.readouterr().out


# --- sweeps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sweep", "x", "heights"),
    [
        ("size", [10, 20], [[5.0, 6.0], [7.0, 8.0], [9.0, 9.0], [4.0, 4.0]]),
        ("tensors", [1, 2], [[0.1, 0.05], [0.4, 0.2]]),
        ("threads", [3, 4], [[1.0, 2.0], [1.0, 2.0], [1.0, 9 / 8], [1.0, 1.0]]),
    ],
)
def test_a_sweeps_picture_shows_its_rows(
    sweep: str, x: list[int], heights: list[list[float]]
) -> None:
    """Ours, another and the rates beside them: what is above, and what below."""
    plots: Any = pytest.importorskip("date_optim.bench.plots")
    rows = [
        {
            "rule": "adam",
            "model": "m",
            "contestant": name,
            "ours": name == "ours",
            "parameters": 10 * i,
            "tensors": i,
            "threads": 2 + i,
            "gb_per_s": rate + i - 1,
            "cold_us_p50": time / i,
            "copy_gb_per_s": 7.0 + i,
            "five_streams_gb_per_s": 4.0,
        }
        for name, rate, time in (("ours", 5.0, 100.0), ("other", 7.0, 400.0))
        for i in (1, 2)
    ]
    (axis,) = plots._DRAWN[sweep](rows).axes
    lines = axis.get_lines()
    assert [list(line.get_ydata()) for line in lines] == heights
    assert all(list(line.get_xdata()) == x for line in lines[:2])
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert names[:2] == ["ours", "other"]


def test_what_the_sweeps_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = sweeps.cases_of("size", "cpu", ["adam"], 2, quick=False)
    assert [sum(shape[0] for shape in case.shapes) for case in sizes] == [
        10**n for n in range(4, 10)
    ]
    tensors = sweeps.cases_of("tensors", "cpu", ["adam"], 2, quick=False)
    assert [len(case.shapes) for case in tensors] == [1, 10, 100, 1000, 10_000]
    assert {sum(shape[0] for shape in case.shapes) for case in tensors} == {sweeps.TOTAL}
    threads = sweeps.cases_of("threads", "cpu", ["adam"], 2, quick=False)
    assert threads[0].threads == 1
    monkeypatch.setattr(sweeps, "cores", lambda: range(6))
    threads = sweeps.cases_of("threads", "cpu", ["adam"], 2, quick=False)
    assert [case.threads for case in threads] == [1, 2, 4, 6]


def test_a_size_that_memory_does_not_hold_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    case = sweeps.cases_of("size", "cpu", ["adam"], 1, quick=False)[-1]
    assert sweeps.needs_bytes(case, 1) == 1.25 * 16e9
    monkeypatch.setattr(sweeps, "available_bytes", lambda device: 10**9)
    row = sweeps.measure_alone(case, named("adam", "plain"), Effort(1, 1))
    assert row["status"] == "left out: needs 20 GB, 1 GB are available"


def test_the_largest_are_measured_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Here those of 10^5 parameters: the process of its own takes one."""
    cases = sweeps.cases_of("size", "cpu", ["sgd"], 1, quick=True)[:2]
    rows = []

    def alone(case: Case, contestant: Contestant, effort: Effort) -> Any:
        if contestant.name == "DATE":
            return sweeps.measure_alone(case, contestant, Effort(3, 60))
        rows.append(case.model)
        return absent(case, contestant, "left out")

    monkeypatch.setattr(run, "cases_of", lambda *args: cases)
    monkeypatch.setattr(run, "ALONE", 100_000)
    monkeypatch.setattr(run, "measure_alone", alone)
    words = ["--sweep", "size", "--quick", "--threads", "1", "--rules", "sgd", "--peers"]
    assert command.main([*words, "--device", "cpu", "--output", str(tmp_path)]) == 0
    assert rows == ["10^5"]
    status = [
        (row["model"], row["contestant"], row["status"])
        for row in read(tmp_path / "bench-size.json")
    ]
    assert status == [
        ("10^4", "plain", "measured"),
        ("10^4", "DATE", "measured"),
        ("10^5", "plain", "left out"),
        ("10^5", "DATE", "measured"),
    ]
    assert (tmp_path / "bench-size-cpu.png").exists()
