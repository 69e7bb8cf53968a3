"""The engine's C++ by itself: its protocol, its formulas in double, and what its build holds."""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_problem import COUNT, PROBLEMS, Problem
from numpy.typing import NDArray

from date_kernels import info, native, reference
from date_kernels.plan import LEAF, build_items
from date_kernels.rules import RULES, hyper_row, is_measured, trust_row
from date_kernels.testing import assert_close

HERE = Path(__file__).parent
ROOT = HERE.parent
CSRC = ROOT / "csrc"

Doubles = NDArray[np.float64]


def sh(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command that may fail, for at most two minutes."""
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, **options
    )


def out(*command: str | Path, **options: Any) -> str:
    """The standard output of a command that succeeds."""
    done = sh(*command, **options)
    assert done.returncode == 0, f"{command} failed\n{done.stdout}{done.stderr}"
    return done.stdout


def compile_cpp(*arguments: str | Path) -> None:
    """Compile with the warnings and the arithmetic of the build."""
    warnings = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")
    arithmetic = ("-fopenmp-simd", "-ffp-contract=off")
    compiler = os.environ.get("CXX", "g++")
    out(compiler, "-std=c++20", *warnings, *arithmetic, f"-I{CSRC}", *arguments)


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
        _, _, scan, digest = re.split(", |: ", line)
        digests[scan].add(digest)
    assert len(lines) == 5 * 2 * 2, "workers, chunk sizes, with SCANs and without"
    assert [len(digest) for digest in digests.values()] == [1, 1]


@pytest.mark.parametrize("order", ["acquire", "release", "acq_rel", "every"])
def test_each_memory_order_is_needed(race: Path, order: str) -> None:
    """What also proves that a race would be reported."""
    done = sh(race, order, env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1 exitcode=66"})
    assert done.returncode == 66, done.stdout + done.stderr
    assert "ThreadSanitizer: data race" in done.stderr


# The formulas in double


LAYER = np.dtype(
    [
        *((name, np.uintp) for name in ("weights", "gradient")),
        ("states", np.uintp, 3),
        ("step", np.uintp),
        *((name, np.int64) for name in ("size", "slot")),
        *((name, np.int32) for name in ("measures", "options", "row")),
    ],
    align=True,
)
ITEM = np.dtype(
    [
        *((name, np.int64) for name in ("begin", "end")),
        *((name, np.int32) for name in ("layer", "kind")),
    ]
)
"""The structs of csrc/plan.h."""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """native/double.cpp."""
    build = tmp_path_factory.mktemp("double")
    shared = ("-O2", "-fPIC", "-shared", "-fopenmp")
    rules = build / "double.o"
    compile_cpp(*shared, "-DDK_ARCH=baseline", "-c", HERE / "native/double.cpp", "-o", rules)
    compile_cpp(*shared, CSRC / "cpu/launch.cpp", rules, "-o", build / "double.so")
    library = ctypes.CDLL(str(build / "double.so"))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    run = (pointer, pointer, pointer, ctypes.c_int, ctypes.c_double, ctypes.c_bool)
    sizes = [library.engine_layer_size(), library.engine_item_size()]
    assert sizes == [LAYER.itemsize, ITEM.itemsize]
    library.engine_make.argtypes = [ctypes.c_int, pointer, count, pointer, count]
    library.engine_make.restype = pointer
    library.engine_free.argtypes = [pointer]
    library.engine_assign_rows.argtypes = [pointer, pointer]
    library.engine_assign_rows.restype = count
    library.engine_run.argtypes = run
    library.engine_run.restype = None
    library.engine_run_nested.argtypes = [*run, ctypes.c_int]
    library.engine_reports.argtypes = library.engine_verdict.argtypes = [pointer]
    library.engine_reports.restype = ctypes.POINTER(ctypes.c_double)
    library.engine_verdict.restype = ctypes.POINTER(ctypes.c_double)
    return library


class DoubleEngine:
    """A problem in double under the engine: what `date_kernels.plan.Plan` does in float."""

    def __init__(self, library: ctypes.CDLL, problem: Problem, chunk: int) -> None:
        self.problem, self._library = problem, library
        self.weights: list[Doubles] = [weight.astype(np.float64) for weight in problem.weights()]
        self.gradients: list[Doubles] = [np.empty_like(weight) for weight in self.weights]
        self.states: dict[str, list[Doubles | None]] = {
            key: [None if state is None else state.astype(np.float64) for state in states]
            for key, states in problem.states().items()
        }
        self.steps = problem.steps()
        groups = problem.groups(0)
        options = {
            at: (index, group.get("exclude", (False,) * 2)[position])
            for index, group in enumerate(groups)
            for position, at in enumerate(group["params"])
        }
        self._keys = list(dict.fromkeys(options.values()))
        layers = np.zeros(len(self.weights), dtype=LAYER)
        for at, layer in enumerate(layers):
            layer["weights"], layer["gradient"] = (
                arrays[at].ctypes.data for arrays in (self.weights, self.gradients)
            )
            for k, states in enumerate(self.states.values()):
                state = states[at]
                layer["states"][k] = 0 if state is None else state.ctypes.data
            layer["step"], layer["size"] = self.steps[at].ctypes.data, self.weights[at].size
            layer["options"] = self._keys.index(options[at])
        rows = build_items(
            [weight.size for weight in self.weights],
            [is_measured(groups[options[at][0]], options[at][1]) for at in sorted(options)],
            scan=problem.shared != "free",
            chunk=chunk,
        )
        items = np.array([tuple(row) for row in rows], dtype=ITEM)
        family, self._fields, _ = native.module().FAMILIES[problem.rule]
        self._engine = library.engine_make(
            family, layers.ctypes.data, len(layers), items.ctypes.data, len(items)
        )

    def __del__(self) -> None:
        self._library.engine_free(self._engine)

    def step(self, step: int, grad_scale: float, threads: int, levels: int | None = None) -> None:
        """Take a step; with `levels`, from inside a parallel region."""
        for gradient, of in zip(self.gradients, self.problem.gradients(step), strict=True):
            gradient[:] = of
        groups = self.problem.groups(step)
        keys = np.empty((len(self.weights), 2), dtype=np.int64)
        distinct = self._library.engine_assign_rows(self._engine, keys.ctypes.data)
        layers = [(*self._keys[key], k) for key, k in keys[:distinct].tolist()]
        rule, trust_fields = RULES[self.problem.rule], native.module().TRUST_FIELDS
        hyper = [hyper_row(rule, groups[i], excluded, k, grad_scale) for i, excluded, k in layers]
        trust = [trust_row(groups[i], excluded, k) for i, excluded, k in layers]
        rows, trust_rows = _table(hyper, self._fields), _table(trust, trust_fields)
        limit = groups[0]["max_grad_norm"]
        arguments = (
            self._engine,
            rows.ctypes.data,
            trust_rows.ctypes.data,
            threads,
            math.inf if limit is None else limit,
            groups[0]["on_nonfinite"] == "skip",
        )
        if levels is None:
            self._library.engine_run(*arguments)
        else:
            assert self._library.engine_run_nested(*arguments, levels) == 2

    def telemetry(self) -> tuple[Doubles, Doubles]:
        """The reports of all layers, and (total_norm, clip, skip)."""
        reports = self._library.engine_reports(self._engine)
        verdict = self._library.engine_verdict(self._engine)
        shape = (len(self.weights), len(native.module().REPORT_FIELDS))
        return np.ctypeslib.as_array(reports, shape), np.ctypeslib.as_array(verdict, (3,))

    def arrays(self) -> dict[str, Doubles]:
        """Weights and states by name."""
        named: dict[str, Sequence[Doubles | None]] = {"weight": self.weights, **self.states}
        return {
            f"{name} {at}": array
            for name, arrays in named.items()
            for at, array in enumerate(arrays)
            if array is not None
        }


def _table(rows: list[dict[str, float]], fields: tuple[str, ...]) -> Doubles:
    return np.array([[row[field] for field in fields] for row in rows])


SMALL = (9001, 7, 5000, 4097, 4096, 8192, 4100, 1, 6000, 16, 3303, 12_289, 5, 0, 13_000, 64)


@pytest.mark.parametrize(
    "problem", [Problem(p.variant, p.shared, sizes=SMALL) for p in PROBLEMS], ids=str
)
def test_formulas_in_double_are_the_references(library: ctypes.CDLL, problem: Problem) -> None:
    """To 1e-12 of the terms, whole steps with their ratios: no rounding hides a wrong formula."""
    engine, judge = (DoubleEngine(library, problem, LEAF) for _ in range(2))
    steps = [step.astype(np.float64) for step in judge.steps]
    terms = {name: np.abs(array) for name, array in judge.arrays().items()}
    for step, grad_scale in enumerate((1.0, 4.0, 0.5)):
        engine.step(step, grad_scale, threads=2)
        expected = reference.step(
            problem.rule,
            judge.weights,
            [gradient.astype(np.float64) for gradient in problem.gradients(step)],
            judge.states,
            steps,
            problem.groups(step),
            grad_scale=grad_scale,
        )
        for name, array in judge.arrays().items():
            terms[name] += np.abs(array)
            assert_close(engine.arrays()[name], array, 1e-12 * terms[name], f"{name} of {step}")
        assert [float(count) for count in engine.steps] == [float(count) for count in steps]
        reports, (total_norm, clip, _) = engine.telemetry()
        telemetry = dict(zip(native.module().REPORT_FIELDS, reports.T, strict=True))
        for name, actual in {**telemetry, "total_norm": total_norm, "clip": clip}.items():
            truth = np.asarray(getattr(expected, name), dtype=np.float64)
            assert_close(actual, truth, 1e-12 * np.abs(truth), f"{name} of {step}")


@pytest.mark.parametrize("levels", [1, 2])
def test_steps_inside_a_parallel_region(library: ctypes.CDLL, levels: int) -> None:
    """A nested region may get fewer threads than it asks for."""
    problem = Problem("rmsprop-both-inside", "clip")
    engine, expected = (DoubleEngine(library, problem, 4 * LEAF) for _ in range(2))
    for step in range(COUNT):
        engine.step(step, 1.0, 3, levels)
        expected.step(step, 1.0, 1)
        for name, array in expected.arrays().items():
            assert engine.arrays()[name].tobytes() == array.tobytes(), f"{name}, step {step}"
        for actual, of in zip(engine.telemetry(), expected.telemetry(), strict=True):
            assert actual.tobytes() == of.tobytes()


# Memory

COUNT_ALLOCATIONS = """
import ctypes, json, torch
from date_kernels.plan import Plan
from engine_problem import Problem, Tensors, plain

counter = ctypes.CDLL(None)
assert counter.count_alloc_watch(b"/_native.") == 1
problem = Problem("rmsprop-both-inside", "skip")
tensors, plan, calls = Tensors.of(problem), Plan(problem.rule), [0]
for step in range(6):
    gradients, groups = [plain(array) for array in problem.gradients(step)], problem.groups(step)
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


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The object file of each instruction set, by the build's own flags."""
    build = tmp_path_factory.mktemp("objects")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}  # cmake and ninja, installed beside python
    pybind = out(sys.executable, "-m", "pybind11", "--cmakedir").strip()
    python = (f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind}")
    out("cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *python, env=environment)
    names = [name for name, _ in native.module().targets()]
    targets = [f"cpu_{name}" for name in names]
    out("cmake", "--build", build, "--target", *targets, env=environment)
    found = {name: list(build.glob(f"**/cpu_{name}.dir/**/isa.cpp.o")) for name in names}
    assert all(len(files) == 1 for files in found.values()), found
    return {name: files[0] for name, files in found.items()}


def test_instruction_sets_share_no_code(objects: Mapping[str, Path]) -> None:
    """The linker keeps one of equal weak symbols: the baseline might run another set's code."""
    for name, file in objects.items():
        lines = out("nm", "-C", "--defined-only", file).splitlines()
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
