"""The wheel: whole where the kernels compile, the Python files and the reason where they do not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"date_kernels": ROOT / "date_kernels", "date_optim": ROOT / "python/date_optim"}

Run = subprocess.CompletedProcess[str]


def run(*arguments: str | Path, cwd: Path = ROOT, **environment: str | Path) -> Run:
    """Run python with arguments, under no mode of the build unless one is given."""
    inherited = {k: v for k, v in os.environ.items() if k != "DATE_KERNELS_NATIVE"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**inherited, **{name: str(value) for name, value in environment.items()}},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def wheel_in(folder: Path, build: Run) -> zipfile.ZipFile:
    assert build.returncode == 0, build.stdout + build.stderr
    [wheel] = folder.glob("date_kernels-0.1.0-*.whl")
    return zipfile.ZipFile(wheel)


def assert_whole(wheel: zipfile.ZipFile) -> None:
    """All Python files and nothing else but the compiled module and metadata."""
    names = wheel.namelist()
    for package, folder in PACKAGES.items():
        for source in folder.glob("*.py*"):
            assert f"{package}/{source.name}" in names
        assert f"{package}/py.typed" in names
    assert not [n for n in names if not re.match(r"(date_kernels|date_optim)[/-]", n)]


def test_a_wheel_builds_in_isolation_and_holds_everything(tmp_path: Path) -> None:
    command = ("-m", "pip", "wheel", "--no-deps", "-w", tmp_path, ROOT)
    settings = ("--config-settings", f"build-dir={tmp_path / 'build'}")
    wheel = wheel_in(tmp_path, run(*command, *settings, DATE_KERNELS_NATIVE="ON"))
    assert_whole(wheel)
    names = wheel.namelist()
    assert [name for name in names if re.fullmatch(r"date_kernels/_native\.\S+\.so", name)]
    assert not [name for name in names if name.endswith("build_failure.txt")]
    metadata = wheel.read(next(n for n in names if n.endswith(".dist-info/METADATA")))
    needs = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata.decode(), re.MULTILINE)
    assert sorted(needs) == ["numpy", "torch"]


# Without the compiled module

HOOK = """
import sys
sys.path.insert(0, "python")
import build_backend
hook, folder, *settings = sys.argv[1:]
getattr(build_backend, hook)(folder, dict(setting.split("=") for setting in settings))
"""

COMPILERS = {
    "absent": ("", "Could not find the compiler specified in the environment variable CXX"),
    "fails": ("echo 'c++: error: the license has expired' >&2; exit 1", "license has expired"),
    "silent": ("exit 1", "is not able to compile a simple test program"),
    "no-openmp": (
        'case " $* " in *" -fopenmp "*) exit 1;; esac; exec c++ "$@"',
        "Could NOT find OpenMP_CXX",
    ),
    "too-old": (
        'case "$*" in *csrc*) echo "error: too old" >&2; exit 1;; esac; exec c++ "$@"',
        "error: too old",
    ),
}
"""What broken compilers do, in sh, and what is to be said of each."""


def broken_compiler(folder: Path, name: str) -> Path:
    script, _ = COMPILERS[name]
    path = folder / name
    if script:
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    return path


@pytest.fixture
def build(tmp_path: Path) -> Any:
    def build(hook: str, compiler: str, **environment: str) -> Run:
        settings = f"build-dir={tmp_path / 'build'}"
        cxx = broken_compiler(tmp_path, compiler)
        return run("-c", HOOK, hook, tmp_path, settings, cwd=ROOT, CXX=cxx, **environment)

    return build


def reason(wheel: zipfile.ZipFile) -> str:
    assert [Path(name).name for name in wheel.namelist()].count("build_failure.txt") == 1
    return wheel.read("date_kernels-0.1.0.dist-info/build_failure.txt").decode()


@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_failed_build_is_one_of_python_that_says_why(
    build: Any, compiler: str, hook: str, tmp_path: Path
) -> None:
    done = build(hook, compiler)
    wheel = wheel_in(tmp_path, done)
    assert str(wheel.filename).endswith("-0_without_compiled_kernels-py3-none-any.whl")
    said = reason(wheel)
    assert "\n" not in said
    assert len(said) < 500
    assert said.startswith("its build failed: ")
    assert COMPILERS[compiler][1] in said
    assert f"holds NO COMPILED KERNELS: {said}" in done.stdout
    assert "-- Configuring" in done.stdout, "the output of what failed is shown, too"


@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_failed_build_is_an_error_where_kernels_are_demanded(
    build: Any, compiler: str, hook: str, tmp_path: Path
) -> None:
    done = build(hook, compiler, DATE_KERNELS_NATIVE="ON")
    assert done.returncode != 0
    assert COMPILERS[compiler][1] in " ".join((done.stdout + done.stderr).split())
    assert not list(tmp_path.glob("*.whl"))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc is on the PATH")
def test_cuda_kernels_that_nobody_asked_for_may_fail(tmp_path: Path) -> None:
    """The CPU's are built all the same."""
    nvcc = tmp_path / "nvcc"
    fails = 'case "$*" in *csrc/cuda*) echo "error: unsupported" >&2; exit 1;; esac'
    nvcc.write_text(f'#!/bin/sh\n{fails}\nexec {shutil.which("nvcc")} "$@"\n')
    nvcc.chmod(0o755)
    settings = (f"build-dir={tmp_path / 'build'}", "cmake.define.CMAKE_CUDA_ARCHITECTURES=90")
    hook = HOOK.replace('split("=")', 'split("=", 1)')
    command = ("-c", hook, "build_wheel", tmp_path, *settings)
    wheel = wheel_in(tmp_path, run(*command, CUDACXX=nvcc, DATE_KERNELS_CUDA="AUTO"))
    assert "without_compiled_kernels" not in str(wheel.filename)
    assert [name for name in wheel.namelist() if name.startswith("date_kernels/_native.")]


def test_a_build_that_is_not_to_compile_runs_no_compiler(build: Any, tmp_path: Path) -> None:
    done = build("build_wheel", "fails", DATE_KERNELS_NATIVE="OFF")
    assert "license" not in done.stdout + done.stderr
    wheel = wheel_in(tmp_path, done)
    assert_whole(wheel)
    assert reason(wheel) == "DATE_KERNELS_NATIVE was OFF when this package was built"


def test_an_unknown_mode_is_an_error(build: Any, tmp_path: Path) -> None:
    done = build("build_wheel", "fails", DATE_KERNELS_NATIVE="yes")
    assert done.returncode != 0
    assert "DATE_KERNELS_NATIVE must be AUTO, ON or OFF, not 'yes'" in done.stderr
    assert not list(tmp_path.glob("*.whl"))


TRAIN = """
import json, warnings
import torch
import date_kernels, date_optim

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(300, 70), torch.nn.Tanh(), torch.nn.Linear(70, 3))
before = [p.flatten().tolist() for p in model.parameters()]
optimizer = date_optim.RMSprop(
    model.parameters(), 0.01, momentum=0.9, weight_decay=0.01,
    trust=date_optim.TrustRatio(lower=0.1, upper=2.0),
)
torch.nn.functional.cross_entropy(model(torch.randn(20, 300)), torch.arange(20) % 3).backward()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    optimizer.step()
try:
    error = str(date_kernels.make_stepper("rmsprop", "cpu"))
except RuntimeError as raised:
    error = str(raised)
print(json.dumps({
    "files": [date_kernels.__file__, date_optim.__file__],
    "before": before,
    "after": [p.flatten().tolist() for p in model.parameters()],
    "warnings": [[w.category.__name__, str(w.message)] for w in caught],
    "error": error,
    "why": date_kernels.info().backends["cpu"],
    "info": str(date_kernels.info()),
}))
"""


def trained(cwd: Path, *flags: str, **environment: str | Path) -> Mapping[str, Any]:
    done = run(*flags, "-c", TRAIN, cwd=cwd, **environment)
    assert done.returncode == 0, done.stderr
    result: Mapping[str, Any] = json.loads(done.stdout)
    return result


def test_the_source_distribution_installs_and_trains_without_a_compiler(tmp_path: Path) -> None:
    """As a user has it: pip, an isolated build, the defaults."""
    made = run("-c", HOOK, "build_sdist", tmp_path)
    assert made.returncode == 0, made.stderr
    [sdist] = tmp_path.glob("*.tar.gz")
    target = tmp_path / "installed"
    install = ("-m", "pip", "install", "--no-deps", "--target", target, sdist)
    done = run(*install, CXX=broken_compiler(tmp_path, "fails"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "_without_compiled_kernels-py3-none-any.whl" in done.stdout, "what pip shows"

    # Without site, so that the editable installation that runs these tests is not found.
    path = f"{target}{os.pathsep}{sysconfig.get_path('purelib')}"
    pure, native = trained(tmp_path, "-S", PYTHONPATH=path), trained(tmp_path)
    assert pure["files"] == [str(target / package / "__init__.py") for package in PACKAGES]
    why = "the compiled module is missing: its build failed: c++: error: the license has expired"
    warning = f"steps are taken by the slow float64 reference: {why}"
    assert pure["warnings"] == [["RuntimeWarning", warning]]
    assert pure["why"] == why
    assert why in pure["info"]
    assert "two pools of threads" not in pure["info"], "there is one, torch's"
    assert why in pure["error"]
    assert "DATE_KERNELS_NATIVE=ON pip install" in pure["error"]
    assert native["warnings"] == []
    assert native["why"] is None

    assert pure["before"] == native["before"]
    for before, actual, expected in zip(
        *(
            [np.array(layer) for layer in layers]
            for layers in (pure["before"], pure["after"], native["after"])
        ),
        strict=True,
    ):
        change = np.abs(expected - before)
        assert np.all(change[before != 0] > 0)
        # Half an eps of the weight on either side, and some roundings of what is added to it.
        bound = np.finfo(np.float32).eps * (np.abs(expected) + 16 * change)
        assert np.all(np.abs(actual - expected) <= bound)
