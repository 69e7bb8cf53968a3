"""The CUDA kernels' build: registers, what the module needs, what CMake refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from date_kernels import native
from date_kernels.cuda_plan import why_no_cuda
from date_kernels.rules import RULES

ROOT = Path(__file__).parent.parent

built = pytest.mark.skipif(
    native.module().GPU != "CUDA", reason="the compiled module was built without a CUDA toolkit"
)


class Kernel(NamedTuple):
    """One kernel for one architecture."""

    rule: str
    pair: str
    architecture: str
    registers: int
    stack: int
    spilled: int


ENTRY = re.compile(
    r"Compiling entry function '\w*?layerwise_stepI(?P<pair>\w+?)EvNS\w*' for '(?P<arch>sm_\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
NAMES = {"Bfloat16": "bfloat16", "Float16": "float16", "f": "float32", "d": "float64", "v": "scan"}


def pair_of(mangled: str) -> str:
    """The parameter's and the gradient's type, of the names that C++ gives them."""
    types = re.findall(r"NS\w*?_\d(Bfloat16|Float16)E|S\w*_|([fdv])", mangled)
    first, second = (NAMES.get(named or letter, "") for named, letter in types)
    second = second or first  # C++ does not name a type twice
    return "scan" if first == "scan" else f"{first}/{second}"


def kernels_in(folder: Path) -> list[Kernel]:
    """What the logs of a build say."""
    return [
        Kernel(
            log.stem.removeprefix("cuda-"),
            pair_of(entry["pair"]),
            entry["arch"],
            int(entry["registers"]),
            int(entry["stack"]),
            int(entry["stores"]) + int(entry["loads"]),
        )
        for log in sorted(folder.glob("cuda-*.txt"))
        for entry in ENTRY.finditer(log.read_text())
    ]


def table(kernels: Sequence[Kernel]) -> str:
    """Registers by rule and pair, a column for each architecture; spilled bytes where there are."""
    architectures = sorted({kernel.architecture for kernel in kernels}, key=lambda x: int(x[3:]))
    cells = {(k.rule, k.pair, k.architecture): k for k in kernels}
    lines = [f"{'registers':30}" + "".join(f"{name:>8}" for name in architectures)]
    for rule, pair in sorted({(k.rule, k.pair) for k in kernels}):
        line = f"{rule:10}{pair:20}"
        for name in architectures:
            kernel = cells[rule, pair, name]
            line += f"{kernel.registers:>8}" + (f"+{kernel.spilled}" if kernel.spilled else "")
        lines.append(line)
    return "\n".join(lines)


@built
def test_two_blocks_share_a_multiprocessor_and_nothing_spills() -> None:
    """In the build that is installed; `python tests/test_cuda_build.py FOLDER` shows another's."""
    built_by = sys.implementation.cache_tag.replace("cpython-", "cp")
    [folder] = ROOT.glob(f"build/{built_by}-*/")  # `make test` installs an editable build
    kernels = kernels_in(folder)
    print(f"\n{table(kernels)}")
    architectures = {kernel.architecture for kernel in kernels}
    assert len(kernels) == len(RULES) * 7 * len(architectures) > 0
    for kernel in kernels:
        assert kernel.registers <= 128, kernel
        assert kernel.stack == kernel.spilled == 0, kernel


@built
def test_the_module_needs_no_library_of_cuda_or_torch() -> None:
    needed = subprocess.run(
        ["readelf", "-d", str(native.module().__file__)], capture_output=True, text=True, check=True
    ).stdout
    names = re.findall(r"NEEDED.*\[(.+)\]", needed)
    assert names
    assert not [name for name in names if re.match(r"lib(cuda|cudart|torch|c10|nv)", name)], names


@built
def test_without_a_driver_it_says_so() -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    code = "from date_kernels import native; print(native.module().cuda_why_not(0))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=hidden, capture_output=True, text=True, check=True
    )
    assert re.search("no NVIDIA driver|cudaErrorNoDevice|driver knows CUDA", done.stdout)


@built
def test_a_driver_of_an_older_release_is_named(tmp_path: Path) -> None:
    """By a library that stands in for it and tells its release alone."""
    source, library = tmp_path / "driver.c", tmp_path / "libcuda.so.1"
    source.write_text("int cuDriverGetVersion(int *version) { *version = 11040; return 0; }\n")
    compiler = os.environ.get("CC", "gcc")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    code = "from date_kernels import native; print(native.module().cuda_why_not(-1))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.fullmatch(
        r"the driver knows CUDA 11\.4, but the kernels were compiled by CUDA 1\d\.\d: "
        "update the driver, or rebuild with an older toolkit",
        done.stdout.strip(),
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"DATE_KERNELS_CUDA": "ON"},
            "DATE_KERNELS_CUDA=ON, but CMake finds no CUDA compiler: install a CUDA toolkit",
        ),
        (
            {"DATE_KERNELS_CUDA": "OFF", "DATE_KERNELS_HIP": "ON"},
            "DATE_KERNELS_HIP=ON, but CMake finds no HIP compiler: install ROCm",
        ),
    ],
    ids=["cuda", "hip"],
)
def test_a_toolkit_that_is_asked_for_and_missing_stops_the_build(
    settings: dict[str, str], message: str, tmp_path: Path
) -> None:
    """With one sentence that says what to do."""
    cmake = Path(sys.executable).parent / "cmake"
    pybind = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
    ).stdout.strip()
    missing = {name: str(tmp_path / "missing") for name in ("CUDACXX", "HIPCXX")}
    environment = {**os.environ, **missing, **settings}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command: list[str | Path] = [cmake, "-G", "Ninja", "-S", ROOT, "-B", tmp_path / "build"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("kernels", "hip", "why"),
    [
        ("HIP", None, "compiled for ROCm, but torch is not"),
        ("CUDA", "7.0", "torch is built for ROCm, .* backend 'triton' serves there"),
        ("", "7.0", "torch is built for ROCm, .* backend 'triton' serves there"),
        ("", None, "built without a CUDA toolkit; put nvcc on the PATH"),
    ],
)
def test_kernels_of_another_vendor_do_not_run(
    kernels: str, hip: str | None, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native.module(), "GPU", kernels)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert re.search(why, str(why_no_cuda()))


if __name__ == "__main__":
    print(table(kernels_in(Path(sys.argv[1]))))
