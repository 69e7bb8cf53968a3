"""The engine on aarch64, under qemu: cross-compiled, with the bits that it has here.

qemu runs the threads of a process, and does not reorder their memory accesses as an aarch64
processor may: what the engine's memory orders are for, ThreadSanitizer judges
(test_engine_native.py).

``DATE_KERNELS_REQUIRE_CROSS`` in the environment makes a missing tool an error.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import engine_problem
import numpy as np
import pytest
import torch
from engine_problem import COUNT, SHARED, Problem, take_steps
from numpy.typing import NDArray
from torch import Tensor
from variants import VARIANTS

from date_kernels import native
from date_kernels.items import LEAF
from date_kernels.plan import Plan

HERE = Path(__file__).parent
ROOT = HERE.parent

COMPILER, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"

SIZES = tuple(min(size, 9001) for size in engine_problem.SIZES)
"""Enough elements for three workers, and several chunks of one leaf in most layers."""


def out(*command: str | Path) -> str:
    """The standard output of a command that succeeds."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(  # cmake and ninja, installed beside python
        command,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, f"{command} failed\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def tools() -> None:
    """The cross compiler and the emulator."""
    missing = [tool for tool in (COMPILER, QEMU) if shutil.which(tool) is None]
    if not missing:
        return
    hint = f"{' and '.join(missing)} not found; apt-get install g++-aarch64-linux-gnu qemu-user"
    if os.environ.get("DATE_KERNELS_REQUIRE_CROSS"):
        pytest.fail(hint)
    pytest.skip(hint)


def compile_cpp(*arguments: str | Path) -> None:
    """Compile what is not the kernels' own code, which the build's flags are for."""
    flags = ("-std=c++20", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-static")
    out(COMPILER, *flags, f"-I{ROOT / 'csrc'}", *arguments)


@pytest.fixture(scope="session")
def kernels(tools: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The baseline's object file, by the build's own flags.

    cmake is not told that it cross-compiles, since it would look for a Python of aarch64: of the
    targets that it then knows, only this one is built.
    """
    build = tmp_path_factory.mktemp("kernels")
    pybind = out(sys.executable, "-m", "pybind11", "--cmakedir").strip()
    python = (f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind}")
    cross = (f"-DCMAKE_CXX_COMPILER={COMPILER}", "-DDATE_KERNELS_WERROR=ON")
    out("cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *python, *cross)
    out("cmake", "--build", build, "--target", "cpu_baseline")
    [kernels] = build.glob("**/cpu_baseline.dir/**/isa.cpp.o")
    return kernels


@pytest.fixture(scope="session")
def replay(kernels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """native/replay.cpp."""
    program = tmp_path_factory.mktemp("replay") / "replay"
    sources = (HERE / "native/replay.cpp", ROOT / "csrc/cpu/launch.cpp", kernels)
    compile_cpp("-O2", "-fopenmp", *sources, "-o", program)
    return program


# What an engine is given and what it leaves

ITEM_SIZES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
WEIGHTS, ROUNDED, *STATES, STEP, SIZE, _, _, _, GRADIENT_TYPE, TYPE, STATE_TYPE = range(13)
"""The columns of a layer (csrc/plan.h)."""


@dataclass
class Memory:
    """An array of a layer: it lies at an address in this process."""

    name: str
    address: int
    length: int
    type: str

    def read(self) -> bytes:
        return ctypes.string_at(self.address, self.length)


def arrays_of(table: NDArray[np.int64]) -> list[Memory]:
    """All that the layers have."""
    arrays: dict[int, Memory] = {}
    for at, layer in enumerate(table.tolist()):
        param = native.module().TYPES[layer[TYPE]]
        wide = "float64" if param == "float64" else "float32"
        state = native.module().TYPES[layer[STATE_TYPE]]
        columns = {WEIGHTS: wide, ROUNDED: param, STEP: "float32", **dict.fromkeys(STATES, state)}
        for column, dtype in columns.items():
            elements = 1 if column == STEP else layer[SIZE]
            address, length = layer[column], elements * ITEM_SIZES[dtype]
            if address != 0:
                name = f"column {column} of layer {at}"
                arrays.setdefault(address, Memory(name, address, length, dtype))
    return list(arrays.values())


Results: TypeAlias = dict[str, NDArray[Any]]


def integers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def block(content: bytes) -> bytes:
    return integers(len(content)) + content


class Recorded:
    """An engine, which writes down what it is given, in the format of native/replay.cpp."""

    def __init__(
        self, family: int, target: int, table: NDArray[np.int64], items: NDArray[np.int64]
    ) -> None:
        self._engine = native.module().Engine(family, target, table, items)
        self._table, self.arrays = table.copy(), arrays_of(table)
        block_of = {array.address: number for number, array in enumerate(self.arrays, 1)}
        numbered = table.copy()
        for column in (WEIGHTS, ROUNDED, STEP, *STATES):
            numbered[:, column] = [block_of.get(address, 0) for address in table[:, column]]
        self._head = (family, len(table), len(items), len(self.arrays))
        self._layers = numbered.tobytes() + items.astype(np.int64).tobytes()
        self._layers += b"".join(block(array.read()) for array in self.arrays)
        self._steps: list[bytes] = []
        self._told: list[bytes] = []
        self._left: list[bytes] = []

    @property
    def reports(self) -> NDArray[np.float64]:
        reports: NDArray[np.float64] = self._engine.reports
        return reports

    @property
    def verdict(self) -> tuple[float, float, bool]:
        verdict: tuple[float, float, bool] = self._engine.verdict
        return verdict

    def check_counters(self) -> None:
        self._engine.check_counters()

    def run(
        self,
        tables: tuple[NDArray[np.int64], NDArray[np.float64]],
        threads: int,
        grad_scale: float,
        max_grad_norm: float,
        skip_nonfinite: bool,
    ) -> None:
        types = (native.module().TYPES[code] for code in self._table[:, GRADIENT_TYPE])
        sizes = (ITEM_SIZES[dtype] for dtype in types)
        lengths = (size * length for size, length in zip(sizes, self._table[:, SIZE], strict=True))
        gradients, rows = tables
        memory = zip(map(int, gradients), map(int, lengths), strict=True)
        step = [block(ctypes.string_at(address, n) if n else b"") for address, n in memory]
        step += [block(rows.tobytes())]
        step += [struct.pack("<ddq", grad_scale, max_grad_norm, skip_nonfinite)]
        self._steps.append(b"".join(step))
        self._engine.run(tables, threads, grad_scale, max_grad_norm, skip_nonfinite)
        self._told.append(self.reports.tobytes() + struct.pack("<3d", *self.verdict))
        self._left = [array.read() for array in self.arrays]

    def file(self) -> bytes:
        """What native/replay.cpp takes."""
        return integers(*self._head, len(self._steps)) + self._layers + b"".join(self._steps)

    def results(self) -> Results:
        """What it gives: by name, in its order."""
        told = {f"report of step {at}": _array(of, "float64") for at, of in enumerate(self._told)}
        left = zip(self.arrays, self._left, strict=True)
        return {**told, **{array.name: _array(bits, array.type) for array, bits in left}}


def _array(content: bytes, dtype: str) -> NDArray[Any]:
    return np.frombuffer(content, np.uint16 if dtype == "bfloat16" else dtype)


class Module:
    """The compiled module with such engines."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self.engines = module, list[Recorded]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def Engine(self, *arguments: Any) -> Recorded:  # noqa: N802
        self.engines.append(Recorded(*arguments))
        return self.engines[-1]


def record(problem: Problem) -> Recorded:
    """The steps of a problem here."""
    plan = Plan(problem.rule, chunk=LEAF)
    module = Module(native.module())
    vars(plan)["_native"] = module
    take_steps(problem, plan)
    [engine] = module.engines
    assert len(engine.results()) == COUNT + len(engine.arrays)
    return engine


def replayed(
    replay: Path, engine: Recorded, folder: Path, threads: int, *modes: str
) -> list[Results]:
    """The same steps under qemu, in each of the floating-point modes."""
    steps, result = folder / "steps", folder / "result"
    steps.write_bytes(engine.file())
    out(QEMU, replay, steps, result, str(threads), *modes)
    content, at, results = result.read_bytes(), 0, []
    for _ in modes:
        results.append(Results())
        for name, like in engine.results().items():
            results[-1][name] = np.frombuffer(content, like.dtype, like.size, at)
            at += like.nbytes
    assert at == len(content)
    return results


def differing(actual: Results, expected: Results) -> list[str]:
    """The arrays that differ in any bit."""
    return [name for name in expected if actual[name].tobytes() != expected[name].tobytes()]


PROBLEMS = [Problem(variant, shared, sizes=SIZES) for variant in VARIANTS for shared in SHARED]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_bits_are_those_of_x86(replay: Path, problem: Problem, tmp_path: Path) -> None:
    """With one worker and with three: weights, states, step counters and reports."""
    engine = record(problem)
    for threads in (1, 3):
        [actual] = replayed(replay, engine, tmp_path, threads, "default")
        assert differing(actual, engine.results()) == []


class Denormal(Problem):
    """Gradients so small that their floats are denormal, and so are the states they leave."""

    def gradients(self, step: int) -> list[Tensor]:
        return [gradient * 2.0**-130 for gradient in super().gradients(step)]


def test_every_worker_has_the_callers_rounding(replay: Path, tmp_path: Path) -> None:
    """FPCR: threads that were started under the default mode take over another."""
    modes = ("default", "flush", "upward")
    engine = record(Denormal("sgd-momentum", sizes=SIZES, dtype=torch.float32))
    alone, together = (replayed(replay, engine, tmp_path, threads, *modes) for threads in (1, 3))
    for at, mode in enumerate(modes):
        assert differing(together[at], alone[at]) == [], mode
    default, *others = alone
    assert differing(default, engine.results()) == []
    for mode, other in zip(modes[1:], others, strict=True):
        assert len(differing(other, default)) > COUNT, f"{mode} matters, not in reports alone"


def test_the_protocol_ends_in_one_result(tools: None, tmp_path: Path) -> None:
    """native/race.cpp with 1 to 32 workers, without ThreadSanitizer."""
    race = tmp_path / "race"
    flags = ("-O1", "-fopenmp-simd", "-ffp-contract=off", "-pthread", "-DDK_ARCH=test")
    compile_cpp(*flags, HERE / "native/race.cpp", "-o", race)
    lines = [line.rsplit(", ", 1)[1].split(": ") for line in out(QEMU, race, "sound").splitlines()]
    assert len(lines) == 5 * 2 * 2 * 2, "workers, whose updates, chunk sizes, SCANs or none"
    digests = {scan: {digest for of, digest in lines if of == scan} for scan, _ in lines}
    assert {scan: len(of) for scan, of in digests.items()} == {"scanned": 1, "not scanned": 1}
