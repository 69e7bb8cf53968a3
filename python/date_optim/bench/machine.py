"""What was measured, and on what."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from date_kernels import info

from .peers import PEERS, installed_version

ROOT = Path(__file__).resolve().parents[3]
"""Of this project, where the package is not installed elsewhere."""

_CPUS = Path("/sys/devices/system/cpu")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def processor() -> str:
    """Return the processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(": ")[1] for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def commit() -> str:
    """Return the commit that is measured, where it is known: DATE_KERNELS_COMMIT, or git's."""
    return os.environ.get("DATE_KERNELS_COMMIT") or _commit_at(ROOT) or "unknown"


def _commit_at(root: Path) -> str:
    """Return the commit of the repository whose top a folder is, not of one that is around it."""
    command = ["git", "-C", str(root), "rev-parse", "--show-toplevel", "--short", "HEAD"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return ""
    top, *commits = said.stdout.splitlines() or [""]
    return commits[0] if said.returncode == 0 and Path(top).samefile(root) else ""


def cores() -> list[int]:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _caches(core: int) -> list[dict[str, Any]]:
    """Return a core's data caches, the nearest first, with the cores that share each."""
    found = []
    for folder in sorted((_CPUS / f"cpu{core}/cache").glob("index*")):
        try:
            values = {
                key: (folder / key).read_text(encoding="utf-8").strip()
                for key in ("level", "type", "size", "shared_cpu_list")
            }
        except OSError:
            continue
        if values["type"] != "Instruction":
            found.append(
                {
                    "level": int(values["level"]),
                    "bytes": int(values["size"][:-1]) * _UNITS[values["size"][-1]],
                    "shared_by": _numbers(values["shared_cpu_list"]),
                }
            )
    return sorted(found, key=lambda cache: int(cache["level"]))


def _numbers(ranges: str) -> list[int]:
    """Return what ``0-2,5`` lists."""
    ends = [[int(end) for end in part.split("-")] for part in ranges.split(",")]
    return [number for end in ends for number in range(end[0], end[-1] + 1)]


def cache_bytes(device: str) -> int:
    """Return the bytes of the last cache before memory; 0 where it is not known."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    caches = _caches(cores()[0])
    return int(caches[-1]["bytes"]) if caches else 0


def own_cache_bytes(device: str) -> int:
    """Return the bytes of the last cache that who updates a layer has to himself.

    On a CPU that is the core's second level, on a GPU the last one; 0 where it is not known.
    """
    if device == "cuda":
        return cache_bytes(device)
    own = [int(each["bytes"]) for each in _caches(cores()[0]) if each["level"] <= 2]
    return max(own, default=0)


def cores_share_a_cache() -> bool:
    """Whether one cache serves all cores that may be used, as far as the system tells."""
    every = cores()
    caches = _caches(every[0])
    return len(every) == 1 or (bool(caches) and set(every) <= set(caches[-1]["shared_by"]))


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _measured(arguments: Sequence[str]) -> list[str]:
    """Return the words of a command line that decide what is measured."""
    after = ("", *arguments)
    return [
        word
        for before, word in zip(after, arguments, strict=False)
        if before != "--output" and not word.startswith("--output")
    ]


def describe(devices: Sequence[str], arguments: Sequence[str]) -> dict[str, Any]:
    """Return all that a results file says beside its rows.

    Parameters
    ----------
    devices : sequence of {"cpu", "cuda"}
    arguments : sequence of str
        Of the command line.
    """
    every = cores()
    installation = asdict(info())
    if installation["openmp_library"]:  # where it lies is nobody else's business
        installation["openmp_library"] = Path(installation["openmp_library"]).name
    machine: dict[str, Any] = {
        "system": platform.platform(),
        "processor": processor(),
        "cores": len(every),
        "caches": _caches(every[0]),
        "cores_share_a_cache": cores_share_a_cache(),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }
    if "cuda" in devices:
        gpu = torch.cuda.get_device_properties(0)
        machine["gpu"] = {
            "name": gpu.name,
            "multiprocessors": gpu.multi_processor_count,
            "memory_bytes": gpu.total_memory,
            "l2_bytes": gpu.L2_cache_size,
            "cuda": torch.version.cuda,
        }
    return {
        "command": f"python -m date_optim.bench {shlex.join(_measured(arguments))}".strip(),
        "commit": commit(),
        "machine": machine,
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "triton": _version("triton"),
            **{PEERS[peer]: installed_version(peer) for peer in PEERS},
        },
        "date_kernels": installation,
    }
