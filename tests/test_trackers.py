"""Telemetry on its way to trackers."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from date_optim import (
    SGD,
    LayerTelemetry,
    TelemetryLogger,
    TrustRatio,
    scalars,
    summarize,
    write_csv,
    write_jsonl,
    write_tensorboard,
)
from date_optim.telemetry import Reading

NAN = math.nan
LAYERS = {
    "low": LayerTelemetry(1.0, 8.0, 0.125, 0.25, -1, skipped=False),
    "free": LayerTelemetry(2.0, 4.0, 0.5, 0.5, 0, skipped=False),
    "high": LayerTelemetry(6.0, 2.0, 3.0, 2.0, 1, skipped=False),
    "high2": LayerTelemetry(6.0, 1.0, 6.0, 2.0, 1, skipped=False),
    "excluded": LayerTelemetry(NAN, NAN, NAN, 1.0, 0, skipped=False),
    "broken": LayerTelemetry(math.inf, 1.0, NAN, NAN, 0, skipped=False),
    "left": LayerTelemetry(NAN, NAN, NAN, 1.0, 0, skipped=True),
}
SUMMARY = {
    "ratio_min": 0.25,
    "ratio_median": 1.25,
    "ratio_max": 2.0,
    "at_lower": 0.25,
    "at_upper": 0.5,
    "nonfinite": 1.0,
    "skipped": 1.0,
}


def test_a_summary_is_of_layers_with_a_ratio_of_their_own() -> None:
    assert summarize(LAYERS) == SUMMARY
    assert summarize({"excluded": LAYERS["excluded"]}) == {"nonfinite": 0.0, "skipped": 0.0}
    assert summarize({}) == {"nonfinite": 0.0, "skipped": 0.0}


def test_scalars_are_a_flat_dict_of_numbers() -> None:
    found = scalars(LAYERS, prefix="a/")
    assert found["a/ratio/high"] == 2.0
    assert found["a/raw_ratio/high"] == 3.0
    assert found["a/weight_norm/low"] == 1.0
    assert found["a/measured_norm/low"] == 8.0
    assert {key: found[f"a/{key}"] for key in SUMMARY} == SUMMARY
    assert len(found) == len(SUMMARY) + 4 * 4
    assert "NaN" not in json.dumps(found)


class Writer:
    def __init__(self) -> None:
        self.scalars: dict[str, tuple[float, int]] = {}
        self.histograms: dict[str, tuple[torch.Tensor, int]] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.scalars[tag] = (scalar_value, global_step)

    def add_histogram(self, tag: str, values: torch.Tensor, global_step: int) -> None:
        self.histograms[tag] = (values, global_step)


def test_tensorboard_gets_the_scalars_and_how_ratios_are_spread() -> None:
    writer = Writer()
    write_tensorboard(writer, LAYERS, step=7)
    assert writer.scalars == {key: (value, 7) for key, value in scalars(LAYERS).items()}
    ratios, step = writer.histograms["trust/ratio"]
    assert (ratios.tolist(), step) == ([0.25, 0.5, 2.0, 2.0], 7)
    write_tensorboard(writer, {"excluded": LAYERS["excluded"]}, step=8)
    assert writer.histograms["trust/ratio"][1] == 7


def test_a_real_writer_takes_it(tmp_path: Any) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(tmp_path) as writer:
        write_tensorboard(writer, LAYERS, step=1)
    assert any(tmp_path.iterdir())


def test_lines_of_json_append(tmp_path: Path) -> None:
    for step in (1, 2):
        with (tmp_path / "ratios").open("a", encoding="utf-8") as file:
            write_jsonl(file, LAYERS, step)
    rows = [json.loads(line) for line in (tmp_path / "ratios").read_text().splitlines()]
    assert rows == [{"step": step, **scalars(LAYERS, prefix="")} for step in (1, 2)]


def test_json_has_null_for_what_is_not_finite() -> None:
    file = io.StringIO()
    write_jsonl(file, {"w": LayerTelemetry(1.0, 0.0, math.inf, 2.0, 1, skipped=False)}, step=3)
    row = json.loads(file.getvalue(), parse_constant=pytest.fail)
    assert (row["raw_ratio/w"], row["ratio/w"]) == (None, 2.0)


def test_a_table_has_its_columns_once_and_a_line_for_each_layer(tmp_path: Path) -> None:
    for step in (1, 2):
        with (tmp_path / "ratios.csv").open("a", encoding="utf-8", newline="") as file:
            write_csv(file, LAYERS, step)
    with (tmp_path / "ratios.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["layer"]) for row in rows] == [
        (step, name) for step in ("1", "2") for name in LAYERS
    ]
    for row, layer in zip(rows, LAYERS.values(), strict=False):
        for key, value in asdict(layer).items():
            assert row[key] == str(value)


class OptimizerMonitor:
    """What Composer's callback of this name does with ``state.optimizers[0]`` after a batch."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def batch_end(self, model: torch.nn.Module) -> dict[str, Any]:
        metrics: dict[str, Any] = {}
        for name, param in model.named_parameters():
            if param.grad is not None and param.requires_grad:
                reporter = getattr(self.optimizer, "report_per_parameter_metrics", None)
                if callable(reporter):
                    metrics = reporter(param, name, metrics)
                if f"l2_norm/grad/{name}" not in metrics:
                    metrics[f"l2_norm/grad/{name}"] = torch.linalg.vector_norm(param.grad)
        return {
            key: value.item() if isinstance(value, torch.Tensor) else value
            for key, value in metrics.items()
        }


def test_composers_monitor_gets_each_parameters_numbers() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = SGD(model.parameters(), lr=0.1, trust=TrustRatio(), exclude="1d")
    monitor = OptimizerMonitor(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        assert optimizer.step() is None
        found = monitor.batch_end(model)
        layer = optimizer.read_telemetry()["0.0"]
        assert found.pop("l2_norm/grad/weight") == pytest.approx(layer.measured_norm)
        assert found.pop("l2_norm/grad/bias") > 0
        assert found == {
            "trust/ratio/weight": layer.ratio,
            "trust/raw_ratio/weight": layer.raw_ratio,
            "trust/weight_norm/weight": layer.weight_norm,
            "trust/measured_norm/weight": layer.measured_norm,
        }


def test_composers_monitor_before_a_step_gets_nothing() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = SGD(model.parameters(), lr=0.1, trust=TrustRatio())
    assert optimizer.report_per_parameter_metrics(model.weight, "w", {"a": 1}) == {"a": 1}


def logged(optimizer: Any, every: int) -> list[tuple[int, set[str]]]:
    rows: list[tuple[int, set[str]]] = []
    logger = TelemetryLogger(lambda layers, step: rows.append((step, set(layers))), every)
    optimizer.register_step_post_hook(logger)
    return rows


def an_optimizer(**options: Any) -> tuple[Parameter, SGD]:
    param = Parameter(torch.tensor([3.0, 4.0]))
    return param, SGD([("w", param)], lr=0.1, trust=TrustRatio(upper=1.0), **options)


def test_a_logger_writes_every_so_many_steps() -> None:
    param, optimizer = an_optimizer()
    rows = logged(optimizer, every=3)
    for _ in range(7):
        param.grad = torch.ones(2)
        optimizer.step()
    assert rows == [(1, {"w"}), (4, {"w"}), (7, {"w"})]


@pytest.mark.parametrize("fused", [True, None])
def test_a_step_that_a_scaler_skips_leaves_no_row(fused: bool | None) -> None:
    param, optimizer = an_optimizer(fused=fused)
    rows = logged(optimizer, every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for grad in (math.inf, 1.0, math.nan, 1.0):
        scaler.scale(torch.ones(()))
        param.grad = torch.full((2,), grad)
        scaler.step(optimizer)
        scaler.update()
    assert rows == [(1, {"w"}), (2, {"w"})]


def test_a_step_without_gradients_leaves_no_row() -> None:
    _, optimizer = an_optimizer()
    rows = logged(optimizer, every=1)
    optimizer.step()
    assert rows == []


@pytest.mark.parametrize("every", [0, -1])
def test_every_is_at_least_1(every: int) -> None:
    with pytest.raises(ValueError, match="every must be at least 1"):
        TelemetryLogger(print, every)


def test_a_logger_reads_only_the_steps_that_it_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    param, optimizer = an_optimizer()
    reads = []
    read = SGD.start_reading

    def counted(self: SGD) -> Reading:
        reads.append(1)
        return read(self)

    monkeypatch.setattr(SGD, "start_reading", counted)
    logged(optimizer, every=5)
    for _ in range(10):
        param.grad = torch.ones(2)
        optimizer.step()
    assert len(reads) == 2
