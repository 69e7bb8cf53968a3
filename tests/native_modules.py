"""C++ of the tests that Python calls."""

from __future__ import annotations

import atexit
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).parent
EMULATED = HERE / "native/emulated"
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")


PATH = "EMULATED_CUDA"
"""Environment variable by which a process finds what the one that started it has compiled."""


@cache
def emulated_cuda() -> ModuleType:
    """The kernels of ``csrc/cuda`` on this machine's processor: native/emulated."""
    if PATH not in os.environ:
        folder = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, folder)
        os.environ[PATH] = compiled(folder)
    spec = importlib.util.spec_from_file_location("emulated_cuda", os.environ[PATH])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled(folder: str) -> str:
    """The module's path."""
    includes = (HERE.parent / "csrc", EMULATED, pybind11.get_include())
    compiler = [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", *WARNINGS]
    compiler += ["-ffp-contract=off", "-fPIC", "-fvisibility=hidden"]
    compiler += [f"-I{path}" for path in (*includes, sysconfig.get_paths()["include"])]

    def one(name: str, *arguments: str) -> str:
        run(*compiler, *arguments, "-c", "-o", f"{folder}/{name}.o")
        return f"{folder}/{name}.o"

    def rule(name: str) -> str:
        defined = (f"-DDK_RULE={name}", f"-DDK_KERNELS=kKernelsOf{name}")
        return one(name, *defined, str(EMULATED / "rule.cpp"))

    rules = re.findall(r'X\("\w+", (\w+)\)', (HERE.parent / "csrc/rules/all.h").read_text())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [*pool.map(rule, rules), one("module", str(EMULATED / "module.cpp"))]
    path = f"{folder}/emulated_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    run(compiler[0], "-shared", "-pthread", *objects, "-o", path)
    return path


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
