"""What only a GPU can show of its backends: order, streams, graphs, size."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TRUST, Call, Options, assert_same_bits, make_call, random_tensors
from torch import Tensor
from torch.nn import Parameter
from variants import FULL, VARIANTS

import date_kernels
from date_kernels import dispatch, make_stepper, native
from date_kernels.cuda_plan import why_no_cuda
from date_optim import DATE, LAMB, LARS, SGD, Adam, TelemetryLogger, TrustRatio

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


@pytest.fixture(autouse=True, params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The only one that there is for parameters on a GPU."""
    known = dict(dispatch.GPU_BACKENDS)
    why = why_no_cuda(0) if request.param == "cuda" else known["triton"]()
    if why is not None:
        pytest.skip(why)
    monkeypatch.setattr(dispatch, "GPU_BACKENDS", [(request.param, known[request.param])])
    return str(request.param)


SIZES = (5, 300, 4096, 4097, 70_001, 1, 0, 140_000, 1_000_003)
OF_UPDATE: Options = {**TRUST, "trust_of": "update"}


def on_gpu(call: Call) -> Call:
    """Return a copy of the call on the GPU."""

    def moved(tensors: Any) -> list[Any]:
        return [None if tensor is None else tensor.to("cuda", copy=True) for tensor in tensors]

    states = {key: moved(column) for key, column in call.states.items()}
    params, grads = moved(call.params), moved(call.grads)
    return Call(call.rule, params, grads, states, moved(call.steps), call.groups)


def problem(variant: str, trust: Options, sizes: tuple[int, ...] = SIZES) -> Call:
    rule, options = VARIANTS[variant]
    params, grads = random_tensors(sizes, 0), random_tensors(sizes, 1)
    return make_call(rule, params, grads, {**options, **trust, "weight_decay": 0.02}, taken=3)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Fail where anything inside waits for the device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("variant", FULL.values())
@pytest.mark.parametrize("trust", [TRUST, OF_UPDATE], ids=["gradient", "update"])
def test_a_thousand_repeats_leave_the_same_bits(variant: str, trust: Options) -> None:
    call = on_gpu(problem(variant, trust))
    step = make_stepper(call.rule).step
    start = [tensor.clone() for tensor in call.written()]
    expected: list[Tensor] = []
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        for tensor, before in zip(call.written(), start, strict=True):
            tensor.copy_(before)
        step(call.params, call.grads, call.states, call.steps, call.groups)
        if not expected:
            expected = [tensor.clone() for tensor in call.written()]
        for tensor, first in zip(call.written(), expected, strict=True):
            differ += (tensor.view(torch.int32) != first.view(torch.int32)).sum()
    assert differ.item() == 0


def test_a_thousand_steps_with_new_gradients_never_wait() -> None:
    params = [Parameter(torch.ones(size, device="cuda")) for size in (5, 4097, 100_000)]
    optimizer = LARS(params, lr=0.1, weight_decay=1e-4)
    twins = [Parameter(torch.ones(param.shape)) for param in params]
    other = LARS(twins, lr=0.1, weight_decay=1e-4)
    kept: list[Tensor] = []  # so that each step's gradients stand elsewhere

    def give(seed: float) -> None:
        for param in params:
            param.grad = torch.full_like(param, seed)
        kept.extend(param.grad for param in params if param.grad is not None)

    give(1.0)
    optimizer.step()
    torch.cuda.synchronize()
    with no_synchronisation():
        for step in range(1, 1000):
            give(1.0 + step % 7)
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
            optimizer.step()
            del kept[: -3 * len(params)]
    for step in range(1000):
        for twin in twins:
            twin.grad = torch.full_like(twin, 1.0 + step % 7)
        other.param_groups[0]["lr"] = 0.1 / (1 + step)
        other.step()
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param.cpu(), twin, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("carried", [True, False])
@pytest.mark.parametrize("cls", [SGD, Adam, LARS, LAMB])
def test_a_captured_step_replays_with_a_moving_rate_and_gradients(
    cls: Any, carried: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether launches carry the words or not, and with eager steps between the replays."""
    if not carried:
        if backend == "triton":
            pytest.skip("Triton's launches carry no words")
        monkeypatch.setattr(native.module(), "LAUNCH_WORDS", 0)

    def make(**options: Any) -> tuple[list[Parameter], Any]:
        torch.manual_seed(0)
        params = [Parameter(torch.randn(size, device="cuda")) for size in (33, 9000, 50_000)]
        for param in params:
            param.grad = torch.zeros_like(param)
        return params, cls(params, lr=torch.tensor(0.1, device="cuda"), **options)

    def give(params: list[Parameter], optimizer: Any, step: int) -> None:
        generator = torch.Generator("cuda").manual_seed(step)
        for param in params:
            assert param.grad is not None
            param.grad.copy_(torch.randn(param.shape, device="cuda", generator=generator))
        optimizer.param_groups[0]["lr"].fill_(0.1 / (1 + step))

    params, optimizer = make(capturable=True)
    eager_params, eager = make()
    for step in range(3):
        give(params, optimizer, step)
        give(eager_params, eager, step)
        optimizer.step()
        eager.step()
    graph = torch.cuda.CUDAGraph()
    give(params, optimizer, 3)
    give(eager_params, eager, 3)
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(3, 103):
        give(params, optimizer, step)
        give(eager_params, eager, step)
        if step % 10 == 9:
            captured = [param.grad for param in params]
            for param in params:
                assert param.grad is not None
                param.grad = param.grad.clone()  # elsewhere than the graph reads
            optimizer.step()
            for param, grad in zip(params, captured, strict=True):
                param.grad = grad
        else:
            graph.replay()
        eager.step()
        if step in (5, 6):  # also where only the host has read before
            assert str(optimizer.read_telemetry()) == str(eager.read_telemetry())
    assert_same_bits([p.cpu() for p in params], [p.cpu() for p in eager_params])
    for param, twin in zip(params, eager_params, strict=True):
        for key, value in eager.state[twin].items():
            assert_same_bits([optimizer.state[param][key].cpu()], [value.cpu()])


@pytest.mark.parametrize("cls", [SGD, LAMB])
def test_a_fused_step_unscales_and_skips_without_waiting(cls: Any) -> None:
    """What GradScaler hands over stays on the device; an inf on the way changes nothing."""
    params = [Parameter(torch.ones(size, device="cuda")) for size in (5, 70_000)]
    twins = [Parameter(param.detach().clone()) for param in params]
    scaled, plain = cls(params, lr=0.1, fused=True), cls(twins, lr=0.1)
    scale = torch.tensor(8.0, device="cuda")
    for step, inf in enumerate((True, False, True, False)):
        for param, twin in zip(params, twins, strict=True):
            param.grad = torch.full_like(param, 8.0 + 8 * step)
            twin.grad = torch.full_like(param, 1.0 + step)
        found = torch.tensor(float(inf), device="cuda")
        scaled.grad_scale, scaled.found_inf = scale, found
        with no_synchronisation():
            scaled.step()
        del scaled.grad_scale, scaled.found_inf
        grads = [param.grad.cpu() for param in params if param.grad is not None]
        if inf:
            assert_same_bits(grads, [torch.full_like(x, 8.0 + 8 * step) for x in grads])
            continue
        plain.step()
        assert_same_bits(grads, [twin.grad.cpu() for twin in twins if twin.grad is not None])
        assert_same_bits([p.cpu() for p in params], [p.cpu() for p in twins])


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_capture_without_capturable_is_refused() -> None:
    param = Parameter(torch.ones(10, device="cuda"))
    param.grad = torch.ones_like(param)
    optimizer = SGD([param], lr=0.1)
    optimizer.step()
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match="capturable"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    torch.cuda.synchronize()
    assert torch.equal(param, before)


def test_a_step_is_taken_on_the_callers_stream() -> None:
    param = Parameter(torch.ones(1 << 20, device="cuda"))
    optimizer = SGD([param], lr=1.0)
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    for _ in range(3):
        with torch.cuda.stream(side):
            torch.cuda._sleep(10_000_000)  # type: ignore[no-untyped-call]
            param.grad = torch.full_like(param, 0.25)
            optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(param, torch.full_like(param, 0.25))


def count_launches(backend: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What grows by an entry with each launch of ours."""
    launches: list[str] = []
    if backend == "triton":
        runtime: Any = importlib.import_module("triton").knobs.runtime

        def hook(data: Any) -> None:
            launches.append(data.get()["name"])

        monkeypatch.setattr(runtime, "launch_enter_hook", hook)
        return launches
    launch = native.module().cuda_launch

    def counted(*arguments: Any) -> None:
        launch(*arguments)
        launches.append("layerwise_step")

    monkeypatch.setattr(native.module(), "cuda_launch", counted)
    return launches


def test_one_launch_a_step_and_pair(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = count_launches(backend, monkeypatch)
    params = [Parameter(torch.ones(size, device="cuda")) for size in (5, 4097, 100_000)]
    halves = [Parameter(torch.ones(7, device="cuda", dtype=torch.bfloat16))]
    groups: Any = [
        {"params": params[:1], "lr": 0.1},
        {"params": params[1:], "trust": TrustRatio(upper=1.0), "weight_decay": 0.1},
    ]
    for extra, clip, expected in ((False, None, 1), (True, None, 2), (True, 1.0, 3)):
        own = [{**group} for group in groups] + ([{"params": halves}] if extra else [])
        optimizer = SGD(own, lr=0.1, momentum=0.9, max_grad_norm=clip)
        for param in (*params, *halves):
            param.grad = torch.ones_like(param)
        optimizer.step()
        launches.clear()
        optimizer.step()
        assert len(launches) == expected, (extra, clip, launches)


@pytest.mark.parametrize("trust", [None, TrustRatio(upper=10.0)], ids=["plain", "trust"])
def test_a_layer_beyond_32_bits(trust: TrustRatio | None) -> None:
    size = 2**31 + 4097
    param = Parameter(torch.ones(size, device="cuda", dtype=torch.bfloat16))
    param.grad = torch.full_like(param, 0.5)
    optimizer = SGD([param], lr=1.0, trust=trust)
    optimizer.step()
    ratio = 1.0 if trust is None else 2.0
    assert bool((param == 1 - ratio * 0.5).all())
    if trust is not None:
        (layer,) = optimizer.read_telemetry().values()
        assert layer.weight_norm == math.sqrt(size)


@pytest.mark.parametrize("make", [LARS, LAMB, DATE])
def test_optimizers_take_the_cpus_steps(make: Any) -> None:
    shapes = [(64, 3, 7, 7), (64,), (100, 64), ()]

    def run(device: str) -> tuple[list[Parameter], Any]:
        params = [Parameter(tensor.to(device)) for tensor in random_tensors(shapes, 0)]
        optimizer = make(params, lr=0.01)
        for step in range(5):
            for param, grad in zip(params, random_tensors(shapes, 1 + step), strict=True):
                param.grad = grad.to(device)
            optimizer.step()
        return params, optimizer

    (ours, optimizer), (theirs, reference) = run("cuda"), run("cpu")
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6)
    for name, layer in reference.read_telemetry().items():
        assert optimizer.read_telemetry()[name].ratio == pytest.approx(layer.ratio, rel=1e-5)
    saved = optimizer.state_dict()
    assert all(value.is_cuda for values in saved["state"].values() for value in values.values())


def test_telemetry_is_read_without_waiting() -> None:
    param = Parameter(torch.full((5000,), 2.0, device="cuda"))
    optimizer = LARS([("w", param)], lr=0.01)
    rows: list[tuple[int, float]] = []
    logger = TelemetryLogger(
        lambda layers, step: rows.append((step, layers["w"].measured_norm)), every=2, wait=False
    )
    param.grad = torch.ones_like(param)
    optimizer.step()  # builds its tables
    optimizer.read_telemetry()
    torch.cuda._sleep(10**9)  # type: ignore[no-untyped-call]  # half a second in which no step finishes
    with no_synchronisation():
        for _ in range(5):
            param.grad.mul_(2.0)
            optimizer.step()
            logger(optimizer)
            assert optimizer.read_telemetry(wait=False) == {}
    assert rows == []
    torch.cuda.synchronize()
    newest = optimizer.read_telemetry(wait=False)
    assert newest == optimizer.read_telemetry()
    assert newest["w"].measured_norm == pytest.approx(32 * math.sqrt(5000))
    logger.flush()
    assert [step for step, _ in rows] == [1, 3, 5]
    expected = [2**step * math.sqrt(5000) for step, _ in rows]
    assert [norm for _, norm in rows] == pytest.approx(expected, rel=1e-6)


def test_a_cpu_checkpoint_continues_on_a_gpu() -> None:
    def make(device: str) -> tuple[Parameter, Adam]:
        param = Parameter(torch.ones(5000, device=device))
        param.grad = torch.full_like(param, 0.5)
        return param, Adam([param], lr=0.1)

    (on_cpu, cpu), (moved, gpu) = make("cpu"), make("cuda")
    cpu.step()
    gpu.load_state_dict(cpu.state_dict())
    moved.data.copy_(on_cpu.data)
    cpu.step()
    gpu.step()
    assert gpu.state[moved]["step"].is_cuda
    assert gpu.state[moved]["step"].item() == 2
    assert_same_bits([moved.cpu()], [on_cpu])


def test_what_a_gpu_skips() -> None:
    """found_inf on the first step, as a GradScaler gives it, and then a step."""
    call = on_gpu(problem("adam-plain", TRUST))
    for step in call.steps:
        assert step is not None
        step.zero_()
    stepper = make_stepper("adam")
    arguments = (call.params, call.grads, call.states, call.steps, call.groups)
    before = [tensor.clone() for tensor in call.written()]
    with no_synchronisation():
        telemetry = stepper.step(
            *arguments, grad_scale=torch.full((1,), 8.0, device="cuda"),
            found_inf=torch.ones(1, device="cuda"),
        )  # fmt: skip
    assert telemetry.skipped.all()
    assert_same_bits([x.cpu() for x in call.written()], [x.cpu() for x in before])
    plain = on_gpu(problem("adam-plain", TRUST))
    for step in plain.steps:
        assert step is not None
        step.zero_()
    plain.take(make_stepper("adam").step, grad_scale=8.0)
    telemetry = stepper.step(*arguments, grad_scale=torch.full((1,), 8.0, device="cuda"),
                             found_inf=torch.zeros(1, device="cuda"))  # fmt: skip
    assert not np.any(telemetry.skipped)
    assert_same_bits([x.cpu() for x in call.written()], [x.cpu() for x in plain.written()])


def test_tensors_on_the_cpu_and_a_gpu_are_refused() -> None:
    param, other = torch.ones(3, device="cuda"), torch.ones(3)
    group = {"params": [0, 1], "lr": 0.1}
    with pytest.raises(RuntimeError, match=r"params\[1\] is on cpu, .* takes place on cuda:0"):
        date_kernels.step("sgd", [param, other], [param.clone(), other], {}, [None] * 2, [group])
