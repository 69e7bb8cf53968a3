"""The engine under its plan: the same bits however the work is cut, ordered and shared out."""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_problem
import numpy as np
import pytest
import torch
from engine_problem import (
    PROBLEMS,
    SIZES,
    Bits,
    Problem,
    Tensors,
    assert_same,
    digest,
    take_steps,
)
from helpers import plan_of
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from variants import VARIANTS

from date_kernels import RULES, info, native
from date_kernels.items import LEAF, Kind, build_items, check_order
from date_kernels.layers import HALF
from date_kernels.plan import CHUNK, Plan
from date_optim import RMSprop, TrustRatio

Items = NDArray[np.int64]

CSRC = Path(__file__).parents[1] / "csrc"

TARGETS = [name for name, supported in native.module().targets() if supported]
CHUNKS = [LEAF << i for i in range(int(math.log2(max(SIZES) / LEAF)) + 2)]
"""Every chunk size from one leaf to more than the largest layer."""

of_each_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=str)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(problem: Problem, threads: int = 2, **options: Any) -> Bits:
    """The problem's bits under a new plan."""
    torch.set_num_threads(threads)
    return take_steps(problem, Plan(problem.rule, **options))


@cache
def expected(problem: Problem) -> Bits:
    """The bits of one worker without vector instructions beyond the baseline's."""
    bits = run(problem, threads=1, target="baseline")
    before = Tensors.of(problem).bits()
    wide = [at for at, weight in enumerate(problem.weights()) if weight.dtype not in HALF]
    still = [name for name in (f"weight {at}" for at in wide) if bits[name] == before[name]]
    skipped = [f"weight {engine_problem.INFINITE}"] if problem.shared == "skip" else []
    assert still == skipped, "the steps did not happen"
    return bits


# Items


@st.composite
def _layers(draw: st.DrawFn) -> tuple[list[int], list[bool], bool, int]:
    chunk = LEAF << draw(st.integers(0, 5))
    edges = st.sampled_from([0, 1, LEAF, chunk]).flatmap(
        lambda x: st.integers(max(x - 1, 0), x + 1)
    )
    sizes = draw(st.lists(edges | st.integers(0, 40 * LEAF), max_size=12))
    measured = draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    return sizes, measured, draw(st.booleans()), chunk


def assert_tiles(items: Items, size: int, chunk: int) -> None:
    """The items cover [0, size) once, in chunks that start at multiples of their own length."""
    begin, end = items[:, 0], items[:, 1]
    assert begin[0] == 0
    assert end[-1] == size
    assert (begin[1:] == end[:-1]).all()
    assert (begin % chunk == 0).all()
    assert (end - begin <= chunk).all()
    assert (end > begin).all() or size == 0


@given(_layers())
def test_items_tile_every_layer_once(case: tuple[list[int], list[bool], bool, int]) -> None:
    sizes, measured, scan, chunk = case
    items = build_items(sizes, measured, scan=scan, chunk=chunk)
    check_order(items)
    assert items.dtype == np.int64
    scans = items[:, 3] == Kind.SCAN
    assert scans.any() == (scan and bool(sizes))
    for layer, size in enumerate(sizes):
        of_layer = items[:, 2] == layer
        assert_tiles(items[of_layer & ~scans], size, chunk)
        if scan:
            assert_tiles(items[of_layer & scans], size, chunk)
        whole = Kind.WHOLE if size <= chunk else Kind.MEASURE
        kind = whole if measured[layer] else Kind.PLAIN
        assert (items[of_layer & ~scans, 3] == kind).all()


@pytest.mark.parametrize("chunk", [0, LEAF // 2, LEAF + 1, 3 * LEAF, -LEAF])
def test_chunk_must_be_a_power_of_two_of_leaves(chunk: int) -> None:
    with pytest.raises(ValueError, match=f"power of two of at least {LEAF}, not {chunk}"):
        build_items([1], [True], scan=False, chunk=chunk)


def shuffled(items: Items, seed: int) -> Items:
    """A random order that the engine can run: SCANs first, a layer's items together."""
    rng = np.random.default_rng(seed)
    scans = items[:, 3] == Kind.SCAN
    rest = [items[~scans & (items[:, 2] == layer)] for layer in np.unique(items[:, 2])]
    order = [rng.permutation(items[scans]), *(rng.permutation(part) for part in rest)]
    return np.concatenate([order[0], *(order[1 + i] for i in rng.permutation(len(rest)))])


@given(_layers(), st.integers(0, 2**32))
def test_every_valid_order_is_taken(
    case: tuple[list[int], list[bool], bool, int], seed: int
) -> None:
    sizes, measured, scan, chunk = case
    assume(sizes)
    check_order(shuffled(build_items(sizes, measured, scan=scan, chunk=chunk), seed))


@given(_layers(), st.integers(0, 2**32))
def test_orders_that_could_wait_for_ever_are_refused(
    case: tuple[list[int], list[bool], bool, int], seed: int
) -> None:
    sizes, measured, scan, chunk = case
    items = build_items(sizes, measured, scan=scan, chunk=chunk)
    mixed = np.random.default_rng(seed).permutation(items)
    scans = mixed[:, 3] == Kind.SCAN
    rest = mixed[~scans, 2].tolist()
    runs = [layer for at, layer in enumerate(rest) if at == 0 or rest[at - 1] != layer]
    late = scans.tolist() != sorted(scans.tolist(), reverse=True)
    assume(late or len(runs) != len(set(runs)))
    reason = "SCAN must stand before" if late else "must stand together"
    with pytest.raises(ValueError, match=reason):
        check_order(mixed)


@pytest.mark.parametrize("change", [lambda i: i[1:], lambda i: np.concatenate([i, i[:1]])])
def test_an_order_may_neither_drop_nor_add(change: Any) -> None:
    problem = Problem("sgd-plain")
    tensors = Tensors.of(problem)
    gradients = problem.gradients(0)
    plan = Plan(problem.rule, order=change)
    with pytest.raises(ValueError, match="neither add nor drop"):
        plan.step(tensors.params, gradients, tensors.states, tensors.steps, problem.groups(0))


def test_both_languages_say_the_same() -> None:
    """What csrc/plan.h and csrc/rules state, and Python again."""
    module = native.module()
    assert module.LEAF == LEAF
    assert {name: of[2] for name, of in module.FAMILIES.items()} == {
        name: rule.states for name, rule in RULES.items()
    }
    enumerators = re.search(r"enum class Kind[^{]*{([^}]*)}", (CSRC / "plan.h").read_text())
    assert enumerators is not None
    names = re.findall(r"^\s*(\w+),", enumerators[1], re.MULTILINE)
    assert [kind.name.lower() for kind in Kind] == names


def test_a_refused_order_changes_nothing() -> None:
    problem = Problem("sgd-momentum", members=(0, 1))  # without trust: nothing would wait
    tensors = Tensors.of(problem)
    gradients = problem.gradients(0)
    plan = Plan(problem.rule, chunk=LEAF, order=lambda items: np.roll(items, 5, axis=0))
    with pytest.raises(ValueError, match="must stand together"):
        plan.step(tensors.params, gradients, tensors.states, tensors.steps, problem.groups(0))
    assert_same(tensors.bits(), Tensors.of(problem).bits())


# Bits


@of_each_problem
def test_bits_do_not_depend_on_threads(problem: Problem) -> None:
    for threads in (1, 2, 3, 3):
        assert_same(run(problem, threads), expected(problem))


@of_each_problem
@pytest.mark.parametrize("target", TARGETS)
def test_bits_do_not_depend_on_the_instruction_set(problem: Problem, target: str) -> None:
    assert_same(run(problem, threads=1, target=target), expected(problem))


@of_each_problem
def test_bits_do_not_depend_on_the_chunk(problem: Problem) -> None:
    for chunk in CHUNKS:
        assert_same(run(problem, threads=1, chunk=chunk), expected(problem))


@of_each_problem
def test_bits_do_not_depend_on_the_order(problem: Problem) -> None:
    for seed, chunk in ((0, LEAF), (1, 4 * LEAF)):
        bits = run(problem, chunk=chunk, order=partial(shuffled, seed=seed))
        assert_same(bits, expected(problem))


@given(st.integers(0, 2**32), st.sampled_from(CHUNKS), st.integers(1, 3))
def test_bits_under_any_order_chunk_and_threads(seed: int, chunk: int, threads: int) -> None:
    problem = PROBLEMS[seed % len(PROBLEMS)]
    bits = run(problem, threads, chunk=chunk, order=partial(shuffled, seed=seed))
    assert_same(bits, expected(problem))


@pytest.mark.parametrize("variant", VARIANTS)
def test_bits_of_layers_alone_are_those_of_layers_together(variant: str) -> None:
    problem = Problem(variant)
    together = expected(problem)
    for at, alone in enumerate(problem.alone()):
        bits = run(alone)
        for key in ("weight", "step", *Tensors.of(alone).states):
            assert bits.get(f"{key} 0") == together.get(f"{key} {at}"), f"{key} {at} differs"
        for name in ("ratio", "weight_norm", "measured_norm", "raw_ratio", "clamp"):
            for step in range(engine_problem.COUNT):
                of_all = np.frombuffer(together[f"{name} of step {step}"])
                assert bits[f"{name} of step {step}"] == of_all[at].tobytes(), f"{name} of {at}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_early_commit_leaves_the_same_bits(variant: str) -> None:
    """Where a layer may be skipped no state is stored before its ratio is known."""
    problem = Problem(variant)
    assert_same(take_steps(problem, Plan(problem.rule), found_inf=0.0), expected(problem))


# Other processes


def python(*code: str, environment: dict[str, str] | None = None) -> str:
    """The standard output of a fresh interpreter that finds the tests' modules."""
    done = subprocess.run(
        [sys.executable, *code],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parent),
            "OMP_WAIT_POLICY": "passive",  # there may be more threads than cores
            **(environment or {}),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


LIMITS = (
    {"OMP_THREAD_LIMIT": "1"},
    {"OMP_THREAD_LIMIT": "2"},
    {"OMP_DYNAMIC": "true"},
    {"OMP_MAX_ACTIVE_LEVELS": "0"},
)
"""What gives a step fewer threads than it asks for."""

ENVIRONMENTS = [
    {**limit, native.TARGET_VARIABLE: target}
    for limit, target in zip(LIMITS, cycle(TARGETS), strict=False)
]


@pytest.mark.parametrize(
    "environment", ENVIRONMENTS, ids=lambda e: "-".join(map("=".join, e.items()))
)
def test_bits_under_other_environments(environment: dict[str, str]) -> None:
    """And with gradients on pages that cannot be written."""
    digests = json.loads(python(engine_problem.__file__, "3", environment=environment))
    assert digests == {str(problem): digest(expected(problem)) for problem in PROBLEMS}


FORK = """
import os, signal, torch
from date_kernels.plan import Plan
from engine_problem import Problem, digest, take_steps

torch.set_num_threads(2)
problem = Problem("rmsprop-centered-momentum-inside", "clip")
plan = Plan(problem.rule)
print(digest(take_steps(problem, plan)), flush=True)
if os.fork() == 0:
    signal.alarm(60)  # a child that hangs must end
    print(digest(take_steps(problem, plan)), flush=True)
    print(digest(take_steps(problem, Plan(problem.rule))), flush=True)
    os._exit(0)
assert os.wait()[1] == 0, "the child hung or failed"
print(digest(take_steps(problem, plan)))
"""


def test_a_forked_child_takes_steps() -> None:
    lines = python("-W", "ignore::DeprecationWarning", "-c", FORK).split()
    assert lines == 4 * [digest(expected(Problem("rmsprop-centered-momentum-inside", "clip")))]


FORK_OF_AN_OPTIMIZER = """
import os, signal, torch
from date_optim import RMSprop, TrustRatio

torch.set_num_threads(2)


def make():
    values = torch.arange(2e5) / 1e5
    layers = [values.clone(), values.view(8, 50, 25, 20).to(memory_format=torch.channels_last)]
    layers.append(torch.stack([values, values], dim=1)[:, 0])  # with gaps
    params = [torch.nn.Parameter(layer) for layer in layers]
    for param in params:
        param.grad = (param.detach() - 1).contiguous()
    params[0].grad = torch.stack([params[0].grad, values], dim=1)[:, 0]
    return RMSprop(params, trust=TrustRatio(upper=1.0))  # its states come with the first step


def take_step(optimizer):
    optimizer.step()
    return [p.detach().numpy().tobytes() for p in optimizer.param_groups[0]["params"]]


first, second = make(), make()
expected = take_step(first)
if os.fork() == 0:
    signal.alarm(60)
    os._exit(take_step(second) != expected)
assert os.wait()[1] == 0, "the child hung or failed"
"""


def test_a_forked_child_makes_states_and_copies() -> None:
    """Of layouts that kernels see a copy of, above the size from which torch works in parallel."""
    python("-W", "ignore::DeprecationWarning", "-c", FORK_OF_AN_OPTIMIZER)


# The caller's floating-point mode


@pytest.fixture
def _default_mode() -> Iterator[None]:
    yield
    torch.set_flush_denormal(False)
    ctypes.CDLL(None).fesetround(0)


def _flush_denormals() -> None:
    assert torch.set_flush_denormal(True)


def _round_upward() -> None:
    upward = {"x86_64": 0x800, "aarch64": 0x400000}[platform.machine()]
    assert ctypes.CDLL(None).fesetround(upward) == 0


def _denormal_step(threads: int) -> Bits:
    size = 400_000
    rng = np.random.default_rng(5)
    weight, gradient, buffer = (
        # By NumPy: torch's threads would round each in its own way.
        torch.from_numpy((1e-39 * rng.standard_normal(size)).astype(np.float32))
        for _ in range(3)
    )
    torch.set_num_threads(threads)
    group = {"params": [0], "lr": 0.1, "momentum": 0.9, "trust": True, "trust_upper": 1.0}
    states: dict[str, list[Tensor | None]] = {"momentum_buffer": [buffer]}
    telemetry = Plan("sgd", chunk=LEAF).step([weight], [gradient], states, [None], [group])
    return {
        **Tensors([weight], states, []).bits(),
        **engine_problem.report_bits(telemetry, 0),
    }


@pytest.mark.usefixtures("_default_mode")
@pytest.mark.parametrize("set_mode", [_flush_denormals, _round_upward])
def test_workers_take_over_the_callers_floating_point_mode(set_mode: Any) -> None:
    default = _denormal_step(2)  # the pool of threads is there before the mode changes
    assert_same(_denormal_step(1), default)
    set_mode()
    changed = _denormal_step(1)
    for _ in range(10):  # in one of them the other worker has had chunks, whatever else runs
        assert_same(_denormal_step(2), changed)
    assert changed["weight 0"] != default["weight 0"]
    assert changed["weight_norm of step 0"] != default["weight_norm of step 0"]


# A plan in use


def _allocated(plan: Plan, problem: Problem, tensors: Tensors, step: int) -> int:
    """Bytes of tensors that a step allocates."""
    gradients = problem.gradients(0)
    gradients[2] = gradients[2].repeat(2)[::2]  # strided: the kernels see a copy
    groups = problem.groups(step)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        plan.step(tensors.params, gradients, tensors.states, tensors.steps, groups)
    return sum(max(event.cpu_memory_usage, 0) for event in profile.events() or ())


@pytest.mark.parametrize("shared", ["free", "skip"])
def test_only_the_first_step_builds_and_allocates_tensors(shared: str) -> None:
    problem = Problem("rmsprop-centered-momentum-inside", shared)
    tensors = Tensors.of(problem)
    tensors.params[0] = torch.zeros(SIZES[0], 2)[:, 0]  # strided, too
    plan = Plan(problem.rule)
    assert _allocated(plan, problem, tensors, 0) > SIZES[0] * 4
    for step in range(1, 4):
        assert _allocated(plan, problem, tensors, step) == 0
    assert plan.builds == 1


def test_an_optimizer_builds_its_plan_once() -> None:
    params = [torch.nn.Parameter(torch.ones(size)) for size in (5, 70_000)]
    optimizer = RMSprop(params, momentum=0.9, trust=TrustRatio(upper=1.0), on_nonfinite="skip")
    states = []
    for step in range(4):
        for param in params:
            param.grad = torch.full_like(param, 0.5 + step)
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        optimizer.step()
        states.append([id(t) for of in optimizer.state.values() for t in of.values()])
    assert plan_of(optimizer).builds == 1
    assert states == [states[0]] * 4


@pytest.mark.parametrize(
    ("of", "change"),
    [
        (lambda call: call["states"]["square_avg"], lambda tensor: tensor.view(torch.int32)),
        (lambda call: call["steps"], lambda tensor: tensor.view(torch.int32)),
        (lambda call: call["params"], torch._neg_view),
    ],
    ids=["state", "step", "negated"],
)
def test_a_plan_in_use_sees_what_kernels_cannot_serve(of: Any, change: Any) -> None:
    """At the address that it knows."""
    call: dict[str, Any] = {
        "params": [torch.ones(5)],
        "grads": [torch.ones(5)],
        "states": {"square_avg": [torch.ones(5)]},
        "steps": [torch.tensor(1.0)],
        "groups": [{"params": [0], "lr": 0.1}],
    }
    plan = Plan("rmsprop")
    plan.step(**call)
    of(call)[0] = change(of(call)[0])
    with pytest.raises((TypeError, RuntimeError), match=r"params\[0\]"):
        plan.step(**call)


def test_a_plan_in_use_follows_states_that_change_places() -> None:
    first, second = torch.full((5,), 4.0), torch.zeros(5)
    group = {"params": [0], "lr": 0.1, "centered": True, "alpha": 0.5}
    plan = Plan("rmsprop")
    orders: tuple[Any, Any] = (
        {"square_avg": [first], "grad_avg": [second]},
        {"grad_avg": [first], "square_avg": [second]},
    )
    weight, gradient, step = torch.ones(5), torch.zeros(5), torch.tensor(1.0)
    for states in orders:
        plan.step([weight], [gradient], states, [step], [group])
    assert plan.builds == 2
    assert first.tolist() == [1.0] * 5  # halved once as v, once as the mean


@pytest.mark.parametrize("count", [math.nan, -1.0, math.inf])
def test_a_counter_that_counts_nothing(count: float) -> None:
    weight = torch.ones(3)
    states: dict[str, list[Tensor | None]] = {"square_avg": [torch.zeros(3)]}
    plan = Plan("rmsprop")
    with pytest.raises(ValueError, match=rf"step counter of params\[0\] is {count}"):
        plan.step(
            [weight], [torch.ones(3)], states, [torch.tensor(count)], [{"params": [0], "lr": 1.0}]
        )
    assert weight.tolist() == [1.0] * 3


def test_options_that_change_in_place_count_at_once() -> None:
    """A tensor as schedulers fill it, and a list; so does the gradients' scale."""
    upper, bounds, exclude = torch.tensor(10.0), [0.0, 10.0], [False]
    weight, gradient = torch.ones(4), torch.ones(4)
    group = {"params": [0], "lr": 0.0, "trust": True, "weight_decay": 0.5}
    group |= {"trust_upper": upper, "trust_weight_norm_bounds": bounds, "exclude": exclude}
    plan = Plan("sgd")

    def ratio(grad_scale: float = 1.0) -> float:
        telemetry = plan.step([weight], [gradient], {}, [None], [group], grad_scale=grad_scale)
        return float(telemetry.ratio[0])

    assert ratio() == 1.0
    bounds[1] = 1.0
    assert ratio() == 0.5
    assert ratio(grad_scale=0.5) == 0.25
    assert ratio() == 0.5
    upper.fill_(0.25)
    assert ratio() == 0.25
    exclude[0] = True
    assert ratio() == 1.0


@pytest.mark.parametrize("in_use", [False, True])
def test_a_gradient_without_memory(in_use: bool) -> None:
    weight, plan, group = torch.ones(3), Plan("sgd"), {"params": [0], "lr": 0.1}
    if in_use:
        plan.step([weight], [torch.zeros(3)], {}, [None], [group])
    with pytest.raises(RuntimeError, match=r"gradient of params\[0\] has no memory"):
        plan.step([weight], [torch._efficientzerotensor(3)], {}, [None], [group])
    assert weight.tolist() == [1.0] * 3


def test_gradients_may_share_memory_but_not_with_weights() -> None:
    memory = torch.ones(8)
    group = {"params": [0, 1], "lr": 0.1}
    weights = [torch.ones(4), torch.ones(4)]
    Plan("sgd").step(weights, [memory[:4], memory[2:6]], {}, [None] * 2, [group])
    weights[0] = memory[:4]
    with pytest.raises(ValueError, match=r"params\[0\] and the gradient of params\[1\] overlap"):
        Plan("sgd").step(weights, [torch.ones(4), memory[3:7]], {}, [None] * 2, [group])


def test_telemetry_is_the_callers_own() -> None:
    plan, weight, group = Plan("sgd"), torch.ones(4), {"params": [0], "lr": 0.5, "trust": True}
    kept = [plan.step([weight], [weight.clone()], {}, [None], [group]) for _ in range(3)]
    assert [float(telemetry.weight_norm[0]) for telemetry in kept] == [2.0, 1.0, 0.5]


# More elements than 32 bits can count

HUGE = 2**31 + LEAF + 1


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("chunk", [LEAF, CHUNK])
def test_items_of_a_layer_beyond_32_bits(chunk: int, scan: bool) -> None:
    items = build_items([5, HUGE], [True, True], scan=scan, chunk=chunk)
    check_order(items)
    for kind in (Kind.SCAN, Kind.MEASURE) if scan else (Kind.MEASURE,):
        assert_tiles(items[(items[:, 2] == 1) & (items[:, 3] == kind)], HUGE, chunk)


FILE = 1 << 22
"""Bytes of the file that a huge tensor sees again and again."""


def repeated(value: float, tail: NDArray[np.float32]) -> Tensor:
    """A tensor of HUGE elements in little memory: the first 2^31 are a file of `value`, mapped over
    and over; `tail` has memory of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        *(3 * [ctypes.c_int]),
        ctypes.c_long,
    ]
    access, fixed, no_reserve, failed = mmap.PROT_READ | mmap.PROT_WRITE, 0x10, 0x4000, 2**64 - 1
    head = 2**31 * 4
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    begin = libc.mmap(None, head + 8 * mmap.PAGESIZE, access, private, -1, 0)
    assert begin != failed, os.strerror(ctypes.get_errno())
    file = os.memfd_create("repeated")
    os.write(file, np.full(FILE // 4, value, dtype=np.float32).tobytes())
    for at in range(begin, begin + head, FILE):
        assert libc.mmap(at, FILE, access, mmap.MAP_SHARED | fixed, file, 0) == at
    os.close(file)
    tensor = torch.frombuffer((ctypes.c_float * HUGE).from_address(begin), dtype=torch.float32)
    tensor[2**31 :] = torch.from_numpy(tail)
    return tensor


def test_a_step_over_a_layer_beyond_32_bits() -> None:
    """Each element of the file is updated once for each time that it is mapped."""
    rng = np.random.default_rng(3)
    weights, gradients = rng.standard_normal((2, HUGE - 2**31)).astype(np.float32)
    weight, gradient = repeated(1.0, weights), repeated(2.0**-20, gradients)
    group = {"params": [0], "lr": 1.0, "trust": True, "trust_lower": 1.0, "trust_upper": 1.0}
    group["max_grad_norm"] = 1e9  # above the norm: all gradients are scanned, none is clipped
    torch.set_num_threads(1)
    telemetry = Plan("sgd").step([weight], [gradient], {}, [None], [group])

    np.testing.assert_array_equal(weight[2**31 :].numpy(), weights - gradients)
    times = 2**31 * 4 // FILE
    np.testing.assert_array_equal(weight[: FILE // 4].numpy(), np.float32(1 - times * 2.0**-20))
    squares = (np.square(x.astype(np.float64)).sum() for x in (weights, gradients))
    norms = [math.sqrt(2.0**31 * v + tail) for v, tail in zip((1, 2.0**-40), squares, strict=True)]
    measured = [telemetry.weight_norm[0], telemetry.measured_norm[0], telemetry.total_norm]
    np.testing.assert_allclose(measured, [*norms, norms[1]], rtol=1e-12)


# Instruction sets


@pytest.mark.parametrize("target", TARGETS)
def test_a_forced_instruction_set_is_reported(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.TARGET_VARIABLE, target)
    assert info().cpu_target == target


def test_an_unknown_instruction_set_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ", ".join(name for name, _ in native.module().targets())
    message = f"'sse9' is not in this build; compiled in: {names}"
    with pytest.raises(RuntimeError, match=message):
        Plan("sgd", target="sse9")
    monkeypatch.setenv(native.TARGET_VARIABLE, "sse9")
    with pytest.raises(RuntimeError, match=message):
        Plan("sgd")
    assert message in str(info().backends["cpu"])
    assert info().cpu_target is None
    assert Plan("sgd", target="baseline").builds == 0  # an argument comes before the environment


def test_an_unsupported_instruction_set_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = [("baseline", True), ("avx2", True), ("avx512", False)]
    monkeypatch.delenv(native.TARGET_VARIABLE, raising=False)
    monkeypatch.setattr(native, "_native", SimpleNamespace(targets=lambda: targets))
    with pytest.raises(RuntimeError, match="supported here: baseline, avx2"):
        native.find_target("avx512")
    assert native.find_target() == (1, "avx2")
