"""Running compilers, and what they made."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
CSRC = ROOT / "csrc"


def sh(
    *command: str | Path, timeout: float = 120, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command that may fail, for at most two minutes unless told otherwise."""
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=timeout, **options
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
