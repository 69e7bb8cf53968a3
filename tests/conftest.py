"""Settings of the whole suite."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from compiled import ROOT, out
from hypothesis import settings

# Where there is no GPU its kernels are interpreted. Triton asks once, when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Builds of the tests leave the CUDA kernels out, which compile for minutes.
os.environ.setdefault("DATE_KERNELS_CUDA", "OFF")

# The machines that run this are shared: how long one example took says nothing.
settings.register_profile("date-kernels", deadline=None)
settings.load_profile("date-kernels")


@pytest.fixture(scope="session")
def object_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The object file of an instruction set, by the build's own flags, compiled when asked for."""
    build = tmp_path_factory.mktemp("objects")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}  # cmake and ninja, installed beside python
    pybind = out(sys.executable, "-m", "pybind11", "--cmakedir").strip()
    python = (f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind}")
    out("cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *python, env=environment)

    @cache
    def compiled(name: str) -> Path:
        target = ("--target", f"cpu_{name}")
        out("cmake", "--build", build, *target, env=environment, timeout=600)
        [file] = build.glob(f"**/cpu_{name}.dir/**/isa.cpp.o")
        return file

    return compiled
