"""The compiled module: whether it is there, and which instruction set of it serves here."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, distribution
from types import ModuleType
from typing import TYPE_CHECKING

# torch loads its OpenMP runtime first; the compiled module, linked to it by its plain name,
# then shares it.
import torch  # noqa: F401

if TYPE_CHECKING:
    from . import _native

    why_missing: str | None
else:
    try:
        from . import _native

        why_missing = None
    except ImportError as error:
        _native = None
        try:  # what python/build_backend.py wrote down
            why_missing = distribution("date-kernels").read_text("build_failure.txt")
        except PackageNotFoundError:
            why_missing = None
        why_missing = f"the compiled module is missing: {why_missing or error}"

TARGET_VARIABLE = "DATE_KERNELS_CPU_TARGET"
"""Environment variable that forces an instruction set."""


def module() -> ModuleType:
    """Return the compiled module.

    Raises
    ------
    RuntimeError
        Where it is missing, with the reason.
    """
    if why_missing is not None:
        raise RuntimeError(
            f"backend 'cpu' is not available: {why_missing}; `DATE_KERNELS_NATIVE=ON pip install "
            "--no-cache-dir --force-reinstall --no-deps .` builds it or stops at the error"
        )
    return _native


def find_target(name: str | None = None) -> tuple[int, str]:
    """Choose an instruction set.

    Parameters
    ----------
    name : str, optional
        Its name; without one the environment's ``DATE_KERNELS_CPU_TARGET``, else the best that the
        processor supports.

    Returns
    -------
    (int, str)
        Its index in ``targets()`` and its name.

    Raises
    ------
    RuntimeError
        Where the one asked for is not in this build or not supported by this processor: never
        silently another.
    """
    targets = module().targets()
    wanted = name or os.environ.get(TARGET_VARIABLE)
    for index, (target, supported) in reversed(list(enumerate(targets))):
        if wanted is None and supported:
            return index, target
        if target == wanted:
            if not supported:
                raise RuntimeError(
                    f"CPU target {wanted!r} is compiled in, but not supported by this processor; "
                    f"supported here: {', '.join(t for t, ok in targets if ok)}"
                )
            return index, target
    raise RuntimeError(
        f"CPU target {wanted!r} is not in this build; "
        f"compiled in: {', '.join(t for t, _ in targets)}"
    )
