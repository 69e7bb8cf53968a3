"""The engine's C++ by itself: its protocol, its formulas in double, and what its build holds."""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compiled import compile_cpp, out, sh
from engine_problem import PROBLEMS, Bits, Problem, Tensors, assert_same, take_steps
from torch import Tensor
from variants import FULL

from date_kernels import Telemetry, info, native, reference
from date_kernels.items import LEAF
from date_kernels.plan import Plan
from date_kernels.testing import assert_close

HERE = Path(__file__).parent


# The protocol, under ThreadSanitizer


@pytest.fixture(scope="session")
def race(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("race") / "race"
    tsan = ("-O1", "-g1", "-fsanitize=thread", "-pthread")
    compile_cpp(*tsan, "-DDK_ARCH=test", HERE / "native/race.cpp", "-o", program)
    return program


def test_the_protocol_has_no_race(race: Path) -> None:
    """With 1 to 32 workers, over several steps: no report, and one result."""
    lines = out(race, "sound").splitlines()
    digests: dict[str, set[str]] = {scan: set() for scan in ("scanned", "not scanned")}
    for line in lines:
        _, _, _, scan, digest = re.split(", |: ", line)
        digests[scan].add(digest)
    assert len(lines) == 5 * 2 * 2 * 2, "workers, whose updates, chunk sizes, SCANs or none"
    assert [len(digest) for digest in digests.values()] == [1, 1]


def test_random_plans_have_no_race(race: Path) -> None:
    """By 1 to 32 workers that own their updates or share them: one result each, and no report."""
    assert out(race, "random", "0", "60") == "60 plans\n"


def test_random_plans_stay_in_their_memory(tmp_path: Path) -> None:
    """The same, and more, under AddressSanitizer and UBSan."""
    flags = ("-O1", "-g1", "-pthread", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    program = tmp_path / "race"
    compile_cpp(*flags, "-DDK_ARCH=test", HERE / "native/race.cpp", "-o", program)
    assert out(program, "random", "100", "200") == "200 plans\n"


@pytest.mark.parametrize("updates", ["own", "shared"])
@pytest.mark.parametrize("order", ["acquire", "release", "acq_rel", "every"])
def test_each_memory_order_is_needed(race: Path, order: str, updates: str) -> None:
    """What also proves that a race would be reported."""
    done = sh(
        race, order, updates, env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
    )
    assert done.returncode == 66, done.stdout + done.stderr
    assert "ThreadSanitizer: data race" in done.stderr


# The formulas in double


SMALL = (
    *(9001, 7, 5000, 4097, 4096, 8192, 4100, 1, 6000, 16, 3303, 12_289),
    *(5, 0, 13_000, 64, 5001, 9003, 4200, 17, 1025, 2048, 300, 64),
)


@pytest.mark.parametrize(
    "problem",
    [Problem(p.variant, p.shared, sizes=SMALL, dtype=torch.float64) for p in PROBLEMS],
    ids=str,
)
def test_formulas_in_double_are_the_references(problem: Problem) -> None:
    """To 1e-12 of the terms, whole steps with their ratios: no rounding hides a wrong formula."""
    tensors, judge = Tensors.of(problem), Tensors.of(problem)
    plan = Plan(problem.rule, chunk=LEAF)
    weights, counts = arrays(judge.params), [step.double().numpy() for step in judge.steps]
    states = {key: arrays(column) for key, column in judge.states.items()}
    named: dict[str, tuple[Sequence[Tensor | None], list[Any]]] = {}
    named["weight"] = (tensors.params, weights)
    named |= {key: (column, states[key]) for key, column in tensors.states.items()}
    terms = {key: [0 if x is None else np.abs(x) for x in of] for key, (_, of) in named.items()}
    for step, grad_scale in enumerate((1.0, 4.0, 0.5)):
        gradients, groups = problem.gradients(step), problem.groups(step)
        telemetry = plan.step(
            tensors.params, gradients, tensors.states, tensors.steps, groups, grad_scale=grad_scale
        )
        expected = reference.step(
            problem.rule, weights, arrays(gradients), states, counts, groups, grad_scale=grad_scale
        )
        for key, (actual, of) in named.items():
            for at, (tensor, truth) in enumerate(zip(actual, of, strict=True)):
                if tensor is not None:
                    terms[key][at] = terms[key][at] + np.abs(truth)
                    what = f"{key} {at} of step {step}"
                    assert_close(tensor.numpy(), truth, 1e-12 * terms[key][at], what)
        assert [float(step) for step in tensors.steps] == [float(count) for count in counts]
        for name in (field.name for field in fields(Telemetry)):
            truth = np.asarray(getattr(expected, name), dtype=np.float64)
            assert_close(getattr(telemetry, name), truth, 1e-12 * np.abs(truth), name)


def arrays(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Copies of the values."""
    return [None if tensor is None else tensor.numpy().copy() for tensor in tensors]


# Parallel regions


@pytest.mark.parametrize("name", FULL.values())
@pytest.mark.parametrize("levels", [1, 2])
def test_steps_inside_a_parallel_region(tmp_path: Path, levels: int, name: str) -> None:
    """A nested region may get fewer threads than it asks for."""
    flags = ("-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-fopenmp")
    out(os.environ.get("CC", "gcc"), *flags, HERE / "native/nested.c", "-o", tmp_path / "nested.so")
    library = ctypes.CDLL(str(tmp_path / "nested.so"))
    problem = Problem(name, "clip")
    inside: list[Bits] = []

    def step() -> None:
        inside.append(take_steps(problem, Plan(problem.rule, chunk=4 * LEAF)))

    assert library.call_nested(ctypes.CFUNCTYPE(None)(step), levels) == 2
    assert_same(inside[0], take_steps(problem, Plan(problem.rule)))


# Memory

COUNT_ALLOCATIONS = """
import ctypes, json, torch
from date_kernels.plan import Plan
from engine_problem import Problem, Tensors

counter = ctypes.CDLL(None)
assert counter.count_alloc_watch(b"/_native.") == 1
problem = Problem("rmsprop-centered-momentum-inside", "skip")
tensors, plan, calls = Tensors.of(problem), Plan(problem.rule), [0]
for step in range(6):
    gradients, groups = problem.gradients(step), problem.groups(step)
    plan.step(tensors.params, gradients, tensors.states, tensors.steps, groups)
    calls.append(counter.count_alloc_calls())
print(json.dumps(calls))
"""


def test_only_the_first_step_allocates_native_memory(tmp_path: Path) -> None:
    """Other learning rates, step counts and gradients, and a step that is skipped, included."""
    counter = tmp_path / "count_alloc.so"
    flags = ("-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared")
    out(os.environ.get("CC", "gcc"), *flags, HERE / "native/count_alloc.c", "-o", counter)
    environment = {**os.environ, "PYTHONPATH": str(HERE), "LD_PRELOAD": str(counter)}
    calls = json.loads(out(sys.executable, "-c", COUNT_ALLOCATIONS, env=environment))
    first, *later = [after - before for before, after in pairwise(calls)]
    assert first > 8, "layers, items, slots, counters, links, reports, rows"
    assert later == [0] * 5


# The build


def test_instruction_sets_share_no_code(object_of: Callable[[str], Path]) -> None:
    """The linker keeps one of equal weak symbols: the baseline might run another set's code."""
    for name, _ in native.module().targets():
        lines = out("nm", "-C", "--defined-only", object_of(name)).splitlines()
        symbols = {symbol: kind for _, kind, symbol in (line.split(maxsplit=2) for line in lines)}
        assert symbols[f"dk::{name}::kWorkers"] in "DR"
        weak = [symbol for symbol, kind in symbols.items() if kind in "uvVwW"]
        assert [symbol for symbol in weak if f"dk::{name}::" not in symbol] == []


def test_the_module_needs_no_torch() -> None:
    dynamic = out("readelf", "-dW", str(native.module().__file__))
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert "libgomp.so.1" in needed, "by its plain name, which torch's own has too"
    assert [name for name in needed if re.match(r"lib(torch|c10|cuda|cudart)", name)] == []


def test_the_module_shares_torchs_threads() -> None:
    assert info().shares_torch_openmp, info()


def test_a_runtime_that_another_package_brings_is_not_torchs() -> None:
    code = "import sklearn.utils._openmp_helpers, date_kernels as d; print(d.info())"
    assert "torch's own: one pool of threads" in out(sys.executable, "-c", code)
