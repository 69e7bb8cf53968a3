"""Telemetry that nobody waits for: a device behind the host, whose events a test lets happen."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from date_kernels import host_copy
from date_kernels.device_plan import DeviceTelemetry
from date_optim import SGD, TelemetryLogger, TrustRatio

KEYS = ("weight_norm", "measured_norm", "raw_ratio", "ratio", "clamp", "skipped")


class Event:
    """What stands for a CUDA event."""

    def __init__(self) -> None:
        self.happened = False
        self.waits = 0

    def query(self) -> bool:
        return self.happened

    def synchronize(self) -> None:
        self.waits += not self.happened
        self.happened = True


class LateDevice:
    """Has an optimizer's numbers in one buffer, which each step overwrites, and lags behind."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, optimizer: SGD) -> None:
        self.events: list[Event] = []
        self.buffer = torch.empty(len(KEYS), 1, dtype=torch.float64)
        monkeypatch.setattr(host_copy, "record_event", self._record)
        optimizer.register_step_post_hook(self._move)

    def _record(self, device: torch.device) -> Event:
        self.events.append(Event())
        return self.events[-1]

    def _move(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        own, found = optimizer.__dict__.get("_telemetry", (None, None))
        if own is not None:
            rows = np.array([getattr(found, key) for key in KEYS], dtype=np.float64)
            self.buffer.copy_(torch.from_numpy(rows))
            optimizer._telemetry = own, DeviceTelemetry(self.buffer, columns)


def columns(numbers: NDArray[np.float64]) -> dict[str, Any]:
    found: dict[str, Any] = dict(zip(KEYS, numbers.copy(), strict=True))
    return found | {"skipped": found["skipped"] != 0, "total_norm": math.nan, "clip": 1.0}


def an_optimizer() -> tuple[Parameter, SGD]:
    param = Parameter(torch.tensor([3.0, 4.0]))
    return param, SGD([("w", param)], lr=0.1, trust=TrustRatio(), on_nonfinite="skip")


def step(param: Parameter, optimizer: SGD, norm: float) -> None:
    """A step whose gradient has a norm, by which its numbers can be told."""
    param.grad = torch.tensor([0.0, norm])
    optimizer.step()


def norms(layers: Any) -> list[float]:
    return [layer.measured_norm for layer in layers.values()]


def test_numbers_that_a_graph_replays_are_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """No replay tells the host: where steps may be captured each reading copies."""
    param, optimizer = an_optimizer()
    device = LateDevice(monkeypatch, optimizer)
    step(param, optimizer, 3.0)
    assert norms(optimizer.read_telemetry()) == [3.0]
    device.buffer[KEYS.index("measured_norm")] = 4.0  # as a replay would
    assert norms(optimizer.read_telemetry()) == [3.0]
    optimizer.param_groups[0]["capturable"] = True
    assert norms(optimizer.read_telemetry()) == [4.0]
    device.buffer[KEYS.index("measured_norm")] = 5.0
    assert norms(optimizer.read_telemetry()) == [5.0]
    for norm in (5.0, 6.0):  # a round of Composer's monitor each
        device.buffer[KEYS.index("measured_norm")] = norm
        found = optimizer.report_per_parameter_metrics(param, "w", {})
        assert found["trust/measured_norm/w"] == norm


def test_the_newest_finished_steps_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    param, optimizer = an_optimizer()
    device = LateDevice(monkeypatch, optimizer)

    def read() -> list[float]:
        return norms(optimizer.read_telemetry(wait=False))

    assert read() == []
    for norm in (1.0, 2.0, 3.0, 4.0):
        step(param, optimizer, norm)
        assert read() == []  # none has finished yet
    device.events[0].happened = True
    assert read() == [1.0]
    assert read() == [1.0]
    device.events[1].happened = device.events[2].happened = True
    assert read() == [3.0]
    assert norms(optimizer.read_telemetry()) == [4.0]
    assert read() == [4.0]
    assert [event.waits for event in device.events] == [0, 0, 0, 1]


def test_asking_again_copies_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    param, optimizer = an_optimizer()
    device = LateDevice(monkeypatch, optimizer)
    step(param, optimizer, 1.0)
    with Copies() as copies:  # type: ignore[no-untyped-call]
        for _ in range(3):
            optimizer.read_telemetry(wait=False)
        optimizer.read_telemetry()
    assert (copies.count, len(device.events)) == (1, 1)


class Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what goes from one tensor to another, or to the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        copies = {torch.ops.aten.copy_, torch.ops.aten._to_copy, torch.ops.aten._local_scalar_dense}
        self.count += func.overloadpacket in copies
        return func(*args, **(kwargs or {}))


def test_a_step_without_layers_has_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    param, optimizer = an_optimizer()
    device = LateDevice(monkeypatch, optimizer)
    step(param, optimizer, 1.0)
    optimizer.read_telemetry(wait=False)
    param.grad = None
    optimizer.step()
    assert optimizer.read_telemetry(wait=False) == {} == optimizer.read_telemetry()
    device.events[0].happened = True
    assert optimizer.read_telemetry(wait=False) == {}


def test_on_a_cpu_it_is_as_with_waiting() -> None:
    param, optimizer = an_optimizer()
    assert optimizer.read_telemetry(wait=False) == {}
    for norm in (1.0, 2.0):
        step(param, optimizer, norm)
        assert optimizer.read_telemetry(wait=False) == optimizer.read_telemetry()
        assert norms(optimizer.read_telemetry(wait=False)) == [norm]
    saved = optimizer.state_dict()
    assert set(saved) == {"state", "param_groups"}


def test_rows_have_the_numbers_of_their_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    param, optimizer = an_optimizer()
    device = LateDevice(monkeypatch, optimizer)
    rows: list[tuple[int, list[float]]] = []
    logger = TelemetryLogger(
        lambda layers, step: rows.append((step, norms(layers))), every=2, wait=False
    )
    optimizer.register_step_post_hook(logger)
    for number in range(1, 8):
        step(param, optimizer, float(number))
        if number == 4:  # those of step 1 are there, which the next call finds
            device.events[0].happened = True
    assert rows == [(1, [1.0])]
    assert len(device.events) == 4  # of steps 1, 3, 5 and 7
    assert not any(event.waits for event in device.events)
    logger.flush()
    assert rows == [(1, [1.0]), (3, [3.0]), (5, [5.0]), (7, [7.0])]
    logger.flush()
    assert len(rows) == 4


def test_a_skipped_step_leaves_no_row_but_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    param, optimizer = an_optimizer()
    LateDevice(monkeypatch, optimizer)
    steps: list[int] = []
    logger = TelemetryLogger(lambda layers, step: steps.append(step), wait=False)
    optimizer.register_step_post_hook(logger)
    for norm in (1.0, math.inf, 1.0):
        step(param, optimizer, norm)
    logger.flush()
    assert steps == [1, 3]
