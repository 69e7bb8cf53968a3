"""The GPU backends against the reference: on a GPU where there is one.

Else Triton's kernel is interpreted, and the CUDA kernels' threads are fibers.
"""

from __future__ import annotations

import importlib
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_problem import COUNT, Problem, Tensors, assert_same, report_bits
from helpers import (
    DTYPES,
    TRUST,
    Call,
    assert_same_bits,
    judge,
    judged_optimizer_step,
    make_call,
    random_tensors,
    unchanged,
)
from hypothesis import given
from hypothesis import strategies as st
from native_modules import emulated_cuda
from numpy.typing import NDArray
from setups import give_gradients, make
from test_backend import (
    BASES,
    BASES_AND_OPTIONS,
    COMMON,
    PLACES,
    RATIOS,
    TRUST_OPTIONS,
    names_of,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from variants import FULL, VARIANTS

import date_kernels
from date_kernels import (
    MASTER,
    Telemetry,
    cuda_plan,
    device_plan,
    dispatch,
    make_stepper,
    native,
    rules,
)
from date_kernels.cuda_plan import CudaPlan, why_no_cuda
from date_kernels.items import LEAF, Kind, build_items, check_order
from date_kernels.tables import TYPES

triton_language: Any = pytest.importorskip("triton.language")
triton_engine: Any = pytest.importorskip("date_kernels.triton_engine")
triton_plan: Any = pytest.importorskip("date_kernels.triton_plan")
TritonPlan: Any = triton_plan.TritonPlan

# The interpreter works out in NumPy what is then not selected: 0/0 of masked lanes, say.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SIZES = (5, 4096, 4097, 3 * LEAF + 700, 1, 0)
"""Whole and cut layers, full leaves and tails."""

BACKENDS: dict[str, Any] = {"triton": TritonPlan, "cuda": CudaPlan}
CHECK_DEVICE = CudaPlan._check_device


@contextmanager
def plans_of(name: str) -> Iterator[Callable[..., Any]]:
    """The plans of a backend; where there is no GPU, those of CUDA by its kernels' emulation."""
    with pytest.MonkeyPatch.context() as patch:
        if name == "cuda" and DEVICE == "cpu":
            for name_of, value in vars(emulated_cuda()).items():
                if name_of in ("cuda_launch", "LAUNCH_WORDS"):
                    patch.setattr(native.module(), name_of, value, raising=False)
            patch.setattr(CudaPlan, "_check_device", lambda *_: None)
        yield BACKENDS[name]


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Whose plans `make_plan` makes."""
    name = str(request.param)
    if name == "cuda" and DEVICE == "cuda" and (why := why_no_cuda(0)) is not None:
        pytest.skip(why)
    with plans_of(name) as plans:
        monkeypatch.setitem(BACKENDS, "", plans)
        yield name


def make_plan(rule: str, **options: Any) -> Any:
    """A plan of the backend under test."""
    return BACKENDS[""](rule, **options)


small_chunks = partial(make_plan, chunk=LEAF, lag=LEAF)


@pytest.fixture(autouse=True)
def _nobody_waits_for_ever() -> Iterator[None]:
    """Fail a test whose interpreted kernel waits for what never comes: by its processor time."""

    def fail(*_: object) -> None:
        raise TimeoutError("an interpreted kernel still waits")

    before = signal.signal(signal.SIGVTALRM, fail)
    signal.setitimer(signal.ITIMER_VIRTUAL, 100)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


def placed(tensor: Tensor, device: str) -> Tensor:
    """Return a copy on a device as far behind an aligned address as the tensor is."""
    offset = tensor.storage_offset()
    memory = torch.empty(offset + tensor.numel(), dtype=tensor.dtype, device=device)
    return memory.as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor)


def moved(call: Call, device: str) -> Call:
    """Return a copy of the call on a device."""

    def to(tensors: Sequence[Tensor | None]) -> list[Any]:
        return [None if tensor is None else placed(tensor, device) for tensor in tensors]

    states = {key: to(column) for key, column in call.states.items()}
    return Call(
        call.rule, to(call.params), to(call.grads), states, to(call.steps), call.groups
    )  # fmt: skip


def judged(call: Call, plan: Any, *, grad_scale: float | None = None) -> Telemetry:
    """Take a step where the kernels run and hold it to the reference."""
    here = moved(call, DEVICE)
    telemetry = here.take(plan.step, grad_scale=grad_scale)
    after = moved(here, "cpu")
    judge(call, after, telemetry, grad_scale=grad_scale)
    call.params, call.states, call.steps = after.params, after.states, after.steps
    return telemetry


def test_the_sizes_make_every_kind_of_item() -> None:
    measured = [True, True, True, True, False, True]
    items = build_items(SIZES, measured, scan=True, chunk=LEAF, whole=LEAF, lag=LEAF)
    assert set(items[:, 3]) == set(Kind)


@pytest.mark.parametrize(
    ("ratio", "name"), [(ratio, name) for ratio, of in RATIOS.items() for name in names_of(of)]
)
def test_every_variant_of_every_rule(name: str, ratio: str) -> None:
    rule, options = VARIANTS[name]
    group = {**options, **RATIOS[ratio], "weight_decay": 0.03, "maximize": True}
    call = make_call(rule, random_tensors(SIZES, 0), random_tensors(SIZES, 1), group, taken=3)
    judged(call, small_chunks(rule))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("rule", FULL)
def test_every_pair_of_dtypes_in_one_step(rule: str, ratio: str) -> None:
    """With masters and without, a full leaf and a tail of each; in float64 to its own bounds."""
    params: list[Tensor] = []
    grads: list[Tensor] = []
    for _ in range(2):
        for dtype, grad_dtype in DTYPES:
            params += random_tensors((LEAF + 5,), len(params), dtype)
            grads += random_tensors((LEAF + 5,), 100 + len(params), grad_dtype)
    options = {**VARIANTS[FULL[rule]][1], **RATIOS[ratio]}
    if options["momentum_scaling"] != "outside" and ratio == "update":
        options["momentum_scaling"] = "outside"
    half = len(params) // 2
    groups = [
        {**options, "params": list(range(half))},
        {**options, "params": list(range(half, len(params))), "master_weights": True},
    ]
    call = make_call(rule, params, grads, *groups, taken=2)
    judged(call, small_chunks(rule))
    assert sum(master is not None for master in call.states[MASTER]) == 4


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("rule", FULL)
def test_states_of_16_bits(rule: str, ratio: str, backend: str) -> None:
    """A full leaf and a tail of each dtype, and of cut layers; others have float32 states.

    Masters show what an update was made of.
    """
    sizes = (LEAF + 5, 2 * LEAF + 5)
    params: list[Tensor] = []
    grads: list[Tensor] = []
    for dtype in (torch.bfloat16, torch.float16):
        params += random_tensors(sizes, len(params), dtype)
        grads += random_tensors(sizes, 100 + len(params), dtype)
    options = {**VARIANTS[FULL[rule]][1], **RATIOS[ratio], "master_weights": True}
    if options["momentum_scaling"] != "outside" and ratio == "update":
        options["momentum_scaling"] = "outside"
    half = None if date_kernels.RULES[rule].squares else torch.float16
    groups = [
        {**options, "params": [0, 1], "state_dtype": torch.bfloat16},
        {**options, "params": [2], "state_dtype": half},
        {**options, "params": [3]},
    ]
    call = make_call(rule, params, grads, *groups, taken=2)
    judged(call, small_chunks(rule))
    kept = [call.states[key][0] for key in date_kernels.RULES[rule].states]
    assert {x.dtype for x in kept if x is not None} == {torch.bfloat16}


@pytest.mark.parametrize("clip", [None, 1.0])
def test_full_leaves_at_odd_addresses(clip: float | None) -> None:
    """Of each layer but the last another tensor begins behind a multiple of 16 bytes."""
    columns = ["params", "grads", "momentum_buffer", MASTER]
    sizes = [LEAF] * (1 + len(columns))
    params, grads = (random_tensors(sizes, seed, torch.bfloat16) for seed in (0, 1))
    options = {"momentum": 0.9, **TRUST, "master_weights": True, "max_grad_norm": clip}
    call = make_call("sgd", params, grads, options, taken=2)
    for layer, name in enumerate(columns):
        column: Any = {"params": params, "grads": grads}.get(name) or call.states[name]
        of_call: Any = {"params": call.params, "grads": call.grads}.get(name) or column
        whole = column[layer]
        odd = torch.empty(LEAF + 1, dtype=whole.dtype)[1:]
        of_call[layer] = odd.copy_(whole)
    here = moved(call, DEVICE)
    for name in columns:
        tensors: Any = {"params": here.params, "grads": here.grads}.get(name) or here.states[name]
        odd_ones = [layer for layer, tensor in enumerate(tensors) if tensor.data_ptr() % 16]
        assert odd_ones == [columns.index(name)]
    judged(call, small_chunks("sgd"))


@pytest.mark.parametrize(("base", "name"), BASES_AND_OPTIONS)
def test_every_option_of_the_ratio(base: str, name: str) -> None:
    rule, options = BASES[base]
    sizes = (300, 64, LEAF + 3, 1, 300)
    weights, grads = random_tensors(sizes, 0), random_tensors(sizes, 1)
    weights[1].zero_()
    grads[-1].zero_()
    group = {**options, "weight_decay": 0.03, "trust": True, **TRUST_OPTIONS[name]}
    judged(make_call(rule, weights, grads, group, taken=2), small_chunks(rule))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("ratio", "base"),
    [
        (ratio, base)
        for ratio in RATIOS
        for base in ("adam", "momentum", "momentum-inside", "rmsprop")
        if (ratio, base) != ("update", "momentum-inside")
    ],
)
def test_every_place_of_weight_decay(base: str, ratio: str, place: str) -> None:
    rule, options = BASES[base]
    group = {**options, **RATIOS[ratio], "weight_decay": 0.1, "weight_decay_in": place}
    group["exclude"] = (False, True, False)
    sizes = (300, 64, LEAF + 3)
    call = make_call(rule, random_tensors(sizes, 0), random_tensors(sizes, 1), group, taken=2)
    judged(call, small_chunks(rule))


def test_options_may_change_between_steps() -> None:
    """What is no learning rate, too: the same tables serve, and the step is the new options'."""
    sizes = (300, LEAF + 3)
    group = {**TRUST, "weight_decay": 0.1}
    call = make_call("adam", random_tensors(sizes, 0), random_tensors(sizes, 1), group, taken=2)
    plan = small_chunks("adam")
    change: dict[str, Any]
    for change in (
        {},
        {"trust_upper": 0.3},
        {"weight_decay": 0.5},
        {"maximize": True},
        {"betas": (0.5, 0.6)},
        {"weight_decay_in": "weights"},
    ):
        call.groups[0].update(change)
        judged(call, plan)


@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("name", COMMON)
def test_scales_and_clips(name: str, pairs: int) -> None:
    """Over one pair of dtypes and over two, which a launch of its own scans first."""
    options, grad_scale = COMMON[name]
    weights, grads = random_tensors(SIZES, 0), random_tensors(SIZES, 1)
    if pairs == 2:
        weights += random_tensors((300,), 2, torch.bfloat16)
        grads += random_tensors((300,), 3, torch.bfloat16)
    call = make_call("sgd", weights, grads, {"momentum": 0.9, **TRUST, **options}, taken=2)
    judged(call, small_chunks("sgd"), grad_scale=grad_scale)


def address_of(
    value: Any, device: torch.device, default: float
) -> tuple[int, float, Tensor | None]:
    """As a plan finds a number on a GPU: kernels read it where it lies."""
    if not isinstance(value, Tensor):
        return 0, default if value is None else float(value), None
    return value.data_ptr(), default, value


def test_a_scale_in_a_tensor_is_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_plan, "_number", address_of)
    call = make_call("adam", random_tensors(SIZES, 0), random_tensors(SIZES, 1), TRUST, taken=2)
    first, second = moved(call, DEVICE), moved(call, DEVICE)
    first.take(small_chunks("adam").step, grad_scale=8.0)
    scale, clear = torch.full((1,), 8.0, device=DEVICE), torch.zeros(1, device=DEVICE)
    second.take(small_chunks("adam").step, grad_scale=scale, found_inf=clear)
    assert_same_bits(second.written(), first.written())


@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_found_inf_changes_nothing(
    clip: float | None, pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_plan, "_number", address_of)
    weights, grads = random_tensors(SIZES, 0), random_tensors(SIZES, 1)
    if pairs == 2:
        weights += random_tensors((300,), 2, torch.float16)
        grads += random_tensors((300,), 3, torch.float16)
    start = make_call("adam", weights, grads, {**TRUST, "max_grad_norm": clip}, taken=0)
    call, plan = moved(start, DEVICE), small_chunks("adam")
    for found in (1.0, torch.ones(1, device=DEVICE)):
        with unchanged(call.written()):
            telemetry = call.take(plan.step, found_inf=found)
        assert telemetry.skipped.all()
        assert np.isnan(telemetry.ratio - 1).sum() == 0
        assert np.isnan(telemetry.weight_norm).all()
        assert math.isnan(telemetry.total_norm)
    telemetry = call.take(plan.step, found_inf=torch.zeros(1, device=DEVICE))
    judge(start, moved(call, "cpu"), telemetry)


@pytest.mark.parametrize("pairs", [1, 2])
def test_a_gradient_that_is_not_finite_stops_the_step(pairs: int) -> None:
    weights, grads = random_tensors(SIZES, 0), random_tensors(SIZES, 1)
    if pairs == 2:
        weights += random_tensors((300,), 2, torch.float16)
        grads += random_tensors((300,), 3, torch.float16)
    spoiled = [grad.clone() for grad in grads]
    spoiled[-1][:1] = math.nan
    spoiled[3][-1] = math.inf
    group = {**TRUST, "on_nonfinite": "skip"}
    start, plan = make_call("adam", weights, grads, group, taken=1), small_chunks("adam")
    call = moved(start, DEVICE)
    sound, call.grads = call.grads, [grad.to(DEVICE) for grad in spoiled]
    for _ in range(2):
        with unchanged(call.written()):
            telemetry = call.take(plan.step)
        assert telemetry.skipped.all()
    call.grads = sound
    telemetry = call.take(plan.step)
    judge(start, moved(call, "cpu"), telemetry)
    assert plan.builds == 1


def test_a_program_without_items_counts_no_step_that_was_stopped() -> None:
    """The last to leave has asked nobody what was decided: one item behind one SCAN."""
    [weights], [grad] = random_tensors((300,), 0), random_tensors((300,), 1)
    grad[-1] = math.nan
    group = {**TRUST, "on_nonfinite": "skip"}
    call = moved(make_call("adam", [weights], [grad], group, taken=1), DEVICE)
    with unchanged(call.written()):
        assert call.take(small_chunks("adam").step).skipped.all()


@pytest.mark.parametrize("of", ["gradient", "update"])
@pytest.mark.parametrize("size", [300, 2 * LEAF + 9])
@pytest.mark.parametrize("rule", FULL)
def test_a_weight_that_is_not_finite_stops_its_layer_alone(rule: str, size: int, of: str) -> None:
    weights, grads = random_tensors((size, 64), 0), random_tensors((size, 64), 1)
    weights[0][-1] = math.inf
    options = {**VARIANTS[FULL[rule]][1], **TRUST, "trust_of": of, "on_nonfinite": "skip"}
    options["momentum_scaling"] = "outside"
    call = moved(make_call(rule, weights, grads, options, taken=1), DEVICE)
    with unchanged(call.layer(0)):
        telemetry = call.take(small_chunks(rule).step)
    assert telemetry.skipped.tolist() == [True, False]
    assert [None if step is None else step.item() for step in call.steps] == [1, 2]
    free = {**options, "on_nonfinite": "propagate"}
    call = moved(make_call(rule, weights, grads, free, taken=1), DEVICE)
    telemetry = call.take(small_chunks(rule).step)
    assert not telemetry.skipped.any()
    assert math.isnan(telemetry.ratio[0])
    assert bool(call.params[0].isnan().all())
    assert [None if step is None else step.item() for step in call.steps] == [2, 2]


def test_a_scalers_word_protects_layers_from_their_weights() -> None:
    """Where it was given states are not stored before the ratio is known, by the same plan."""
    sizes = (300, 2 * LEAF + 9, 64)
    group = {**TRUST, "trust_of": "update"}
    start = make_call("adam", random_tensors(sizes, 0), random_tensors(sizes, 1), group, taken=1)
    call, plan = moved(start, DEVICE), small_chunks("adam")
    call.take(plan.step)
    for param in call.params[:2]:
        param[-1] = math.inf
    with unchanged([*call.layer(0), *call.layer(1)]):
        telemetry = call.take(plan.step, found_inf=torch.zeros(1, device=DEVICE))
    assert telemetry.skipped.tolist() == [True, True, False]
    assert [step.item() for step in call.steps if step is not None] == [2, 2, 3]
    assert not call.take(plan.step).skipped.any()


def test_more_layers_than_are_counted_at_a_time(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And more slots than are added up at a time."""
    count = 2 * triton_engine.SUMS.value + 3
    if DEVICE == "cpu" and backend == "triton":  # an interpreted layer takes some milliseconds
        monkeypatch.setattr(triton_engine, "SUMS", triton_language.constexpr(4))
        count = 11
    sizes = [1 + i % 3 for i in range(count)]
    group = {"max_grad_norm": 1.0}
    call = make_call("adam", random_tensors(sizes, 0), random_tensors(sizes, 1), group, taken=1)
    assert judged(call, make_plan("adam")).clip < 1
    assert [step.item() for step in call.steps if step is not None] == [2] * count


def test_a_leaf_that_lacks_one_element() -> None:
    """What lies behind it in memory is neither read nor written."""

    def followed(tensors: Sequence[Tensor]) -> list[Tensor]:
        memory = [torch.full((len(x) + 1,), 9.0, device=DEVICE) for x in tensors]
        return [of[:-1].copy_(x) for of, x in zip(memory, tensors, strict=True)]

    sizes = (LEAF - 1, 2 * LEAF - 1)
    group = {**TRUST, "max_grad_norm": 1.0}
    call = make_call("sgd", random_tensors(sizes, 0), random_tensors(sizes, 1), group)
    here = moved(call, DEVICE)
    here.params, here.grads = followed(call.params), followed(call.grads)
    telemetry = here.take(small_chunks("sgd").step)
    judge(call, moved(here, "cpu"), telemetry)
    for param in here.params:
        assert param.as_strided((1,), (1,), len(param)).item() == 9.0


GUARDED = """
import ctypes, mmap, sys
import pytest, torch
from helpers import TRUST, make_call, random_tensors
from test_gpu_backends import BACKENDS, LEAF, plans_of

def guarded(tensor):
    # Behind the memory's last page lies one that may not be touched.
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(begin + pages), mmap.PAGESIZE, 0) == 0
    own = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages - size)
    return own.copy_(tensor)

with plans_of(sys.argv[1]) as make_plan:
    sizes = (LEAF + 1, 3, LEAF - 5, 2 * LEAF + 77)
    weights, grads = random_tensors(sizes, 0), random_tensors(sizes, 1)
    for rule, options in (("sgd", {"momentum": 0.9}), ("adam", {"trust_of": "update"})):
        call = make_call(rule, weights, grads, {**TRUST, **options, "max_grad_norm": 1.0}, taken=1)
        call.params, call.grads = map(guarded, call.params), map(guarded, call.grads)
        call.params, call.grads = [*call.params], [*call.grads]
        for key, column in call.states.items():
            call.states[key] = [None if state is None else guarded(state) for state in column]
        call.take(make_plan(rule, chunk=LEAF, lag=LEAF).step)
print("untouched")
"""


def test_what_lies_behind_a_layer_is_not_touched(backend: str) -> None:
    """Its arrays end where memory does."""
    if DEVICE == "cuda":
        pytest.skip("compute-sanitizer looks there (bench/on_gpu.sh)")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", GUARDED, backend]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "untouched\n", (done.returncode, done.stderr)


def test_autograd_is_told_what_was_written() -> None:
    call = make_call("adam", random_tensors(SIZES, 0), random_tensors(SIZES, 1), TRUST, taken=1)
    call = moved(call, DEVICE)
    before = [tensor._version for tensor in call.written()]
    call.take(small_chunks("adam").step)
    assert all(x._version > old for x, old in zip(call.written(), before, strict=True))


def test_no_layers() -> None:
    for groups in ([], [{"params": [], "lr": 0.1, **TRUST, "max_grad_norm": 1.0}]):
        telemetry = make_plan("sgd").step([], [], {}, [], groups)
        assert telemetry.ratio.shape == (0,)


def test_each_layer_has_its_own_step() -> None:
    call = make_call("adam", random_tensors(SIZES, 0), random_tensors(SIZES, 1), TRUST, taken=1)
    call.steps = [torch.tensor(float(taken)) for taken in (0, 1, 7, 100, 12345, 3)]
    judged(call, small_chunks("adam"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rate_in_a_tensor_is_read_at_each_step(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the kernel, where it lies."""
    monkeypatch.setattr(rules, "is_on_device", lambda lr: isinstance(lr, Tensor))
    rate = torch.tensor(0.1, dtype=dtype, device=DEVICE)
    params, twins = ([t.to(DEVICE) for t in random_tensors((300, 5000), 0)] for _ in range(2))
    group = {"params": [0, 1], "momentum": 0.9, "momentum_scaling": "inside", **TRUST}
    ours, theirs = make_plan("sgd"), make_plan("sgd")
    buffers, others = ([torch.zeros_like(p) for p in params] for _ in range(2))
    for step in range(3):
        rate.fill_(0.1 / (1 + step))
        grads = [t.to(DEVICE) for t in random_tensors((300, 5000), step)]
        none = [None, None]
        ours.step(params, grads, {"momentum_buffer": buffers}, none, [{**group, "lr": rate}])
        number = {**group, "lr": rate.item()}
        theirs.step(twins, grads, {"momentum_buffer": others}, none, [number])
    assert_same_bits(params, twins)
    assert ours.builds == 1


# --- the same bits --------------------------------------------------------------------------------

MEMBERS = (0, 1, 2, 3, 8, 9, 16, 17, 18, 19)
"""Layers of `engine_problem`: without trust, with it, of a gradient and of an update."""

PROBLEM_SIZES = tuple(
    {0: LEAF + 7, 2: 4 * LEAF + 7, 8: LEAF + 9, 16: 2 * LEAF + 1}.get(i, 40 + i) for i in range(24)
)


def problem(variant: str, shared: str = "free") -> Problem:
    return Problem(variant, shared, MEMBERS, PROBLEM_SIZES, torch.float32)


def steps_of(problem: Problem) -> int:
    """How many are taken: one more where the second is skipped."""
    return COUNT if problem.shared == "skip" else 2


def taken(problem: Problem, plan: Any, **arguments: Any) -> dict[str, bytes]:
    """Take the problem's steps and return every bit that they leave."""
    tensors, reports = Tensors.of(problem), {}
    call = Call(problem.rule, tensors.params, [], tensors.states, [*tensors.steps], [])
    call = moved(call, DEVICE)
    for step in range(steps_of(problem)):
        grads = [grad.to(DEVICE) for grad in problem.gradients(step)]
        telemetry = plan.step(
            call.params, grads, call.states, call.steps, problem.groups(step), **arguments
        )
        known = {field.name: getattr(telemetry, field.name) for field in fields(Telemetry)}
        reports.update(report_bits(Telemetry(**known), step))
    after = moved(call, "cpu")
    steps = [step for step in after.steps if step is not None]
    return {**Tensors(after.params, after.states, steps).bits(), **reports}


def shuffled(items: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Another order that the engine accepts: SCANs first, UPDATEs behind their MEASUREs."""
    generator = np.random.default_rng(seed)
    scans = items[:, 3] == Kind.SCAN
    first, rest = (generator.permutation(x) for x in (items[scans], items[~scans]))
    order = np.arange(len(rest))
    late = rest[:, 3] == Kind.UPDATE
    last = {layer: i for i, (_, _, layer, kind) in enumerate(rest) if kind == Kind.MEASURE}
    keys = [(max(i, last[rest[i, 2]]) if late[i] else i, late[i], i) for i in order]
    return np.concatenate([first, rest[[i for *_, i in sorted(keys)]]])


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("sgd-nesterov-inside", "clip"),
        ("adam-amsgrad", "free"),
        ("sgd-momentum", "skip"),
    ],
)
def test_bits_depend_on_neither_order_nor_cut(name: str, shared: str) -> None:
    case = problem(name, shared)
    expected = taken(case, make_plan(case.rule, chunk=LEAF, lag=LEAF))
    for seed in range(2):
        order: Callable[..., Any] = partial(shuffled, seed=seed)
        assert_same(taken(case, make_plan(case.rule, chunk=LEAF, order=order)), expected)
    for chunk, lag in ((LEAF, LEAF), (LEAF, 0), (2 * LEAF, 1 << 30), (4 * LEAF, LEAF)):
        assert_same(taken(case, make_plan(case.rule, chunk=chunk, lag=lag)), expected)


def test_early_commit_leaves_the_same_bits() -> None:
    """Where a layer may be skipped no state is stored before its ratio is known."""
    case = problem("rmsprop-momentum")
    expected = taken(case, small_chunks(case.rule))
    assert_same(taken(case, small_chunks(case.rule), found_inf=0.0), expected)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda items: items[1:], "neither add nor drop"),
        (lambda items: items[::-1], "behind its layer's MEASUREs"),
    ],
    ids=["drops", "backwards"],
)
def test_a_refused_order_changes_nothing(change: Any, match: str) -> None:
    call = moved(
        make_call("sgd", random_tensors(SIZES, 0), random_tensors(SIZES, 1), TRUST), DEVICE
    )
    plan = make_plan("sgd", chunk=LEAF, order=change)
    with unchanged(call.written()), pytest.raises(ValueError, match=match):
        call.take(plan.step)


@pytest.mark.parametrize("name", ["rmsprop-centered-momentum", "lion-plain"])
def test_packed_is_one_by_one(name: str) -> None:
    case = problem(name)
    together = taken(case, make_plan(case.rule))
    for at, alone in enumerate(case.alone()):
        bits = taken(alone, make_plan(case.rule))
        for key in ("weight", "step", *Tensors.of(alone).states):
            assert bits.get(f"{key} 0") == together.get(f"{key} {at}"), (key, at)
        for name_of in ("ratio", "weight_norm", "measured_norm", "raw_ratio", "clamp"):
            for step in range(steps_of(case)):
                of_all = np.frombuffer(together[f"{name_of} of step {step}"])
                assert bits[f"{name_of} of step {step}"] == of_all[at].tobytes(), (name_of, at)


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_a_ratio_the_bits_are_the_cpus(variant: str) -> None:
    rule, options = VARIANTS[variant]
    sizes = (*SIZES, 70_001) if DEVICE == "cuda" else SIZES
    group = {**options, "weight_decay": 0.02}
    call = make_call(rule, random_tensors(sizes, 0), random_tensors(sizes, 1), group, taken=3)
    here = moved(call, DEVICE)
    here.take(make_plan(rule).step)
    call.take(make_stepper(rule, "cpu").step)
    assert_same_bits(moved(here, "cpu").written(), call.written())


# --- items ----------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 9 * LEAF), st.booleans()), max_size=8),
    st.sampled_from([LEAF, 2 * LEAF, 4 * LEAF]),
    st.integers(0, 20 * LEAF),
    st.booleans(),
)
def test_items_visit_each_element_once(
    layers: list[tuple[int, bool]], chunk: int, lag: int, scan: bool
) -> None:
    sizes, measured = [size for size, _ in layers], [is_measured for _, is_measured in layers]
    items = build_items(sizes, measured, scan=scan, chunk=chunk, whole=LEAF, lag=lag)
    check_order(items)
    for layer, size in enumerate(sizes):
        own = items[items[:, 2] == layer]
        for kinds, expected in (
            ((Kind.PLAIN, Kind.WHOLE, Kind.UPDATE), True),
            ((Kind.WHOLE, Kind.MEASURE), measured[layer]),
            ((Kind.SCAN,), scan),
        ):
            cuts = sorted(map(tuple, own[np.isin(own[:, 3], kinds)][:, :2].tolist()))
            assert bool(cuts) == expected
            ends = [0, *(end for _, end in cuts)]
            assert not cuts or [*(begin for begin, _ in cuts), size] == ends


@given(
    st.lists(st.integers(LEAF + 1, 6 * LEAF), min_size=1, max_size=6),
    st.integers(0, 20 * LEAF),
    st.integers(0, 2**32),
)
def test_an_update_before_one_of_its_measures_is_refused(
    sizes: list[int], lag: int, seed: int
) -> None:
    items = build_items(sizes, [True] * len(sizes), scan=False, chunk=LEAF, whole=LEAF, lag=lag)
    items = shuffled(items, seed)
    check_order(items)
    layer = seed % len(sizes)
    own = np.flatnonzero(items[:, 2] == layer)
    last = own[items[own, 3] == Kind.MEASURE][-1]
    first = own[items[own, 3] == Kind.UPDATE][0]
    items[[last, first]] = items[[first, last]]
    with pytest.raises(ValueError, match="behind its layer's MEASUREs"):
        check_order(items)


def test_kernel_and_plan_count_alike() -> None:
    engine: Any = importlib.import_module("date_kernels.triton_engine")
    assert {kind.name: getattr(engine, kind.name).value for kind in Kind} == dict(Kind.__members__)
    assert engine.LEAF.value == LEAF
    report = ("weight_norm", "measured_norm", "raw_ratio", "ratio", "clamp", "skipped")
    assert [getattr(engine, name.upper()).value for name in report] == [*range(len(report))]
    assert engine.REPORT.value == len(report)
    types = [str(dtype).removeprefix("torch.") for dtype in TYPES]
    assert types == [*native.module().TYPES]
    assert list(native.module().REPORT_FIELDS) == [*report]


# --- plans and launches ---------------------------------------------------------------------------


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: Any) -> Any:
        self.launches += 1
        return self.kernel[grid]

    def __call__(self, *arguments: Any) -> None:
        self.launches += 1
        self.kernel(*arguments)


@pytest.mark.parametrize(
    ("dtypes", "options", "found", "expected"),
    [
        ([torch.float32], {}, None, 1),
        ([torch.float32], {"max_grad_norm": 1.0}, None, 1),
        ([torch.float32, torch.float16], {}, None, 2),
        ([torch.float32, torch.float16], {"max_grad_norm": 1.0}, None, 3),
        ([torch.float32, torch.float16], {"on_nonfinite": "skip"}, None, 3),
        ([torch.float32, torch.float16], {"on_nonfinite": "skip"}, 0.0, 2),
    ],
    ids=["one", "one-clip", "two", "two-clip", "two-skip", "two-scaler"],
)
def test_one_launch_a_step_and_pair(
    dtypes: list[torch.dtype],
    options: dict[str, Any],
    found: float | None,
    expected: int,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    where: Any = triton_plan if backend == "triton" else native.module()
    name = "layerwise_step" if backend == "triton" else "cuda_launch"
    counted = Counted(getattr(where, name))
    monkeypatch.setattr(where, name, counted)
    params = [t for dtype in dtypes for t in random_tensors((300, 64, 5), 0, dtype)]
    grads = [t for dtype in dtypes for t in random_tensors((300, 64, 5), 1, dtype)]
    half = len(params) // 2
    groups = [
        {"params": list(range(half)), "lr": 0.1, **options},
        {"params": list(range(half, len(params))), **TRUST, **options},
    ]
    call = moved(make_call("sgd", params, grads, *groups), DEVICE)
    plan = make_plan("sgd")
    for step in range(1, 3):
        call.take(plan.step, found_inf=found)
        assert counted.launches == step * expected
    assert plan.builds == 1


def carry(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let launches of the CUDA kernels carry so many words at most."""
    monkeypatch.setattr(native.module(), "LAUNCH_WORDS", most, raising=False)


def test_words_travel_only_when_they_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    carry(0, monkeypatch)
    copies: list[int] = []
    pinned = device_plan._pinned
    plan = make_plan("sgd")
    call = moved(make_call("sgd", random_tensors((9,), 0), random_tensors((9,), 1), TRUST), DEVICE)
    call.take(plan.step)

    def counted(*args: Any) -> Tensor:
        copies.append(1)
        tensor: Tensor = pinned(*args)
        return tensor

    monkeypatch.setattr(device_plan, "_pinned", counted)
    call.take(plan.step)
    assert not copies
    call.grads = [grad.clone() for grad in call.grads]
    call.take(plan.step)
    assert len(copies) == 1
    call.groups[0]["lr"] = 0.01
    call.take(plan.step)
    assert len(copies) == 2
    assert plan.builds == 1


def test_few_words_travel_with_the_launch(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as fit, of several param groups and dtypes; one more and all lie in memory."""
    if backend == "triton":
        pytest.skip("Triton's launches carry no arrays")
    dtypes = (torch.float32, torch.bfloat16)
    params = [x for dtype in dtypes for x in random_tensors((9, 5000), 0, dtype)]
    grads = [x for dtype in dtypes for x in random_tensors((9, 5000), 1, dtype)]
    groups = [{"params": [0, 2], "lr": 0.1}, {"params": [1, 3], **TRUST}]
    expected = moved(make_call("sgd", params, grads, *groups), DEVICE)
    call = moved(make_call("sgd", params, grads, *groups), DEVICE)
    plan = make_plan("sgd")
    most = 2 * plan._width + len(params)
    copies: list[Tensor] = []
    upload = plan._upload

    def counted(*args: Any, **options: Any) -> None:
        copies.append(args[1])
        upload(*args, **options)

    monkeypatch.setattr(plan, "_upload", counted)
    for step, limit in enumerate((most - 1, most, most - 1, most)):
        for group in (*expected.groups, *call.groups):
            group["lr"] = 0.1 / (1 + step)
        carry(0, monkeypatch)
        expected.take(make_plan("sgd").step)
        carry(limit, monkeypatch)
        call.take(plan.step)
        assert len(copies) == 1 + step // 2
        assert_same_bits(call.params, expected.params)
    assert plan.builds == 1


def test_a_launch_refuses_more_words_than_it_carries(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton":
        pytest.skip("Triton's launches carry no arrays")
    carry(10_000, monkeypatch)
    sizes = (1,) * 600
    call = moved(
        make_call("sgd", random_tensors(sizes, 0), random_tensors(sizes, 1), TRUST), DEVICE
    )
    with pytest.raises(ValueError, match="more than a launch carries"):
        call.take(make_plan("sgd").step)


@pytest.mark.parametrize(
    "name", ["nesterov", "Adam-all", "RMSprop-all", "LARS", "LAMB", "adabound"]
)
def test_optimizers_step_through_it(name: str) -> None:
    """Also where a layer gets its first gradient later than others, and its first step with it."""
    if DEVICE == "cuda":
        pytest.skip("tests/test_gpu.py steps optimizers there")
    optimizer, params = make(name)
    optimizer._stepper = make_plan(optimizer.rule)
    for seed in (1, 2, 3):
        give_gradients(params, seed)
        if seed == 1:
            params[1].grad = None
        judged_optimizer_step(optimizer)
    stepper: Any = optimizer._stepper
    assert stepper.builds > 0


# --- bad input ------------------------------------------------------------------------------------


def fake(tensor: Tensor) -> Tensor:
    with FakeTensorMode() as mode:
        return mode.from_tensor(tensor)


class Wrapper(Tensor):
    """A subclass whose memory is not its own, as a DTensor's."""


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], type[Exception], str]] = {
    "meta": (lambda t: t.to("meta"), RuntimeError, "is on meta, but this step takes place on"),
    "fake": (fake, TypeError, "is a FakeTensor"),
    "subclass": (lambda t: t.as_subclass(Wrapper), TypeError, "is a Wrapper"),
    "integers": (lambda t: t.int(), TypeError, "has dtype torch.int32"),
    "strided": (lambda t: t.repeat(1, 2)[:, ::2], RuntimeError, "gaps|has stride"),
    "transposed": (lambda t: t.t().contiguous().t(), RuntimeError, "has stride"),
}


@pytest.mark.parametrize("what", ["params", "grads", "momentum_buffer"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_kernel_serves_is_refused_by_name(name: str, what: str) -> None:
    spoil, error, match = REFUSED[name]
    shapes: Any = [(3, 4), (5, 6)]
    call = make_call("sgd", random_tensors(shapes, 0), random_tensors(shapes, 1), {"momentum": 0.9})
    call = moved(call, DEVICE)
    column: Any = {"params": call.params, "grads": call.grads}.get(what) or call.states[what]
    sound, column[1] = column[1], spoil(column[1])
    names = {"params": r"params\[1\]", "grads": r"the gradient of params\[1\]"}
    named = names.get(what, rf"state '{what}' of params\[1\]")
    if name == "transposed" and what == "params":
        named = r"the gradient of params\[1\]"  # dense itself, but of another layout
    plan = make_plan("sgd")
    others = [call.params[0], call.states["momentum_buffer"][0], call.grads[0], sound]
    written = unchanged([tensor for tensor in others if tensor is not None])
    with written, pytest.raises(error, match=f"^{named} .*{match}"):
        plan.step(call.params, call.grads, call.states, call.steps, call.groups)


def test_parameters_where_no_kernel_runs_are_refused(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = moved(make_call("sgd", random_tensors((9,), 0), random_tensors((9,), 1), {}), DEVICE)
    monkeypatch.setattr(CudaPlan, "_check_device", CHECK_DEVICE)
    monkeypatch.setattr(triton_plan, "interpreted", lambda: DEVICE == "cuda")
    monkeypatch.setattr(cuda_plan, "why_no_cuda", lambda device: "no kernel image")
    written = unchanged(call.written())
    with written, pytest.raises(RuntimeError, match=r"^params\[0\] is on .*(but Triton|'cuda')"):
        make_plan("sgd").step(call.params, call.grads, call.states, call.steps, call.groups)


def test_a_gradient_that_has_lost_its_memory_is_refused() -> None:
    call = make_call("sgd", random_tensors((9, 5), 0), random_tensors((9, 5), 1), {"momentum": 0.9})
    call, plan = moved(call, DEVICE), make_plan("sgd")
    call.take(plan.step)
    call.grads[1] = torch.empty(5, device=DEVICE)
    call.grads[1].untyped_storage().resize_(0)
    written = unchanged(call.written())
    with written, pytest.raises(RuntimeError, match=r"gradient of params\[1\] has no memory"):
        plan.step(call.params, call.grads, call.states, call.steps, call.groups)


def test_dense_layouts_of_any_order_are_served() -> None:
    (weight,), (grad,) = random_tensors(((3, 4, 5, 6),), 0), random_tensors(((3, 4, 5, 6),), 1)
    last = torch.channels_last
    call = make_call(
        "adam", [weight.to(memory_format=last)], [grad.to(memory_format=last)], TRUST, taken=1
    )
    judged(call, make_plan("adam"))


def test_an_unavailable_backend_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert date_kernels.info().backends["triton"] is None
    assert isinstance(make_stepper("sgd", "triton"), TritonPlan)
    monkeypatch.setattr(triton_plan, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="'triton' is not available: torch sees no GPU"):
        make_stepper("sgd", "triton")
    assert "torch sees no GPU" in (date_kernels.info().backends["triton"] or "")
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        make_stepper("sgd", "triton")
