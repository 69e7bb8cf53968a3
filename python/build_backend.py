"""The build: scikit-build-core's, with a way out where the kernels do not compile.

The environment's ``DATE_KERNELS_NATIVE`` chooses. With ``AUTO``, the default, a build that fails is
followed by one of the Python files alone: they work, by the float64 reference, and
``build_failure.txt`` beside the wheel's metadata holds the reason for `date_kernels.info`. With
``ON`` the failure is an error; with ``OFF`` nothing is compiled. CUDA kernels that nobody asked for
(``DATE_KERNELS_CUDA`` is ``AUTO``) and that fail are left out before the CPU's are given up.

There are no hooks that prepare metadata: they would promise a wheel's tag before the build.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import scikit_build_core.build as core
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
]

Settings: TypeAlias = "Mapping[str, str | list[str]]"
Hook: TypeAlias = "Callable[[str, dict[str, str | list[str]]], str]"

VARIABLE = "DATE_KERNELS_NATIVE"
CUDA = "DATE_KERNELS_CUDA"

PURE = {
    "wheel.cmake": "false",
    # Of what a build prints, pip shows no more than the name of a wheel.
    "wheel.build-tag": "0_without_compiled_kernels",
}
"""The settings of a build without the compiled module."""


def build_wheel(
    wheel_directory: str,
    config_settings: Settings | None = None,
    metadata_directory: str | None = None,
) -> str:
    """Build the wheel (PEP 517)."""
    return _build(core.build_wheel, wheel_directory, config_settings)


def build_editable(
    wheel_directory: str,
    config_settings: Settings | None = None,
    metadata_directory: str | None = None,
) -> str:
    """Build the wheel of an editable installation (PEP 660)."""
    return _build(core.build_editable, wheel_directory, config_settings)


def _build(hook: Hook, directory: str, config_settings: Settings | None) -> str:
    mode = os.environ.get(VARIABLE, "AUTO")
    if mode not in ("AUTO", "ON", "OFF"):
        raise ValueError(f"{VARIABLE} must be AUTO, ON or OFF, not {mode!r}")
    settings = dict(config_settings or {})
    if mode == "ON":
        return hook(directory, settings)
    reason = f"{VARIABLE} was OFF when this package was built"
    if mode == "AUTO":
        asked = os.environ.get(CUDA) or settings.get(f"cmake.define.{CUDA}", "AUTO")
        for last in (False, True) if asked == "AUTO" else (True,):
            output = bytearray()
            try:
                with _recorded(output):
                    return hook(directory, settings)
            except (Exception, SystemExit) as error:
                # What is not the compiler's fault, a wrong setting say, fails again below.
                output += f"\n{error!r}".encode()
                reason = f"its build failed: {_head(output.decode(errors='replace'))}"
            if not last:
                print(f"\n*** Once more without CUDA: {reason}", flush=True)
                os.environ[CUDA] = "OFF"  # CMake takes it before its cache
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "build_failure.txt")
        file.write_text(reason, encoding="utf-8")
        destination = f"${{SKBUILD_METADATA_DIR}}/{file.name}"
        wheel = hook(directory, {**settings, **PURE, f"wheel.force-include.{file}": destination})
    print(
        f"\n*** {wheel} holds NO COMPILED KERNELS: {reason}\n"
        f"*** It works, slowly, by the float64 reference. {VARIABLE}=ON makes this an error.",
        flush=True,
    )
    return wheel


@contextmanager
def _recorded(output: bytearray) -> Iterator[None]:
    """Keep what this process and those it starts print, and print it."""
    read, write = os.pipe()
    stdout, stderr = os.dup(1), os.dup(2)

    def copy() -> None:
        while block := os.read(read, 65_536):
            output.extend(block)
            os.write(stdout, block)

    thread = threading.Thread(target=copy)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(write, 1)
    os.dup2(write, 2)
    os.close(write)
    thread.start()
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)  # the pipe's last end: the thread reads to it
        thread.join()
        for descriptor in (read, stdout, stderr):
            os.close(descriptor)


def _head(output: str) -> str:
    """What went wrong, on one line: the compiler's first error, else CMake's, else the end."""
    lines = [" ".join(line.split()) for line in output.splitlines() if line.strip()]
    for sign, length in (("error:", 1), ("CMake Error", 8)):
        found = next((at for at, line in enumerate(lines) if sign in line), None)
        if found is not None:
            lines = lines[found : found + length]
            break
    head = " ".join(lines[-8:]).partition(" Call Stack (")[0]
    return head if len(head) <= 400 else f"{head[:400]}..."
