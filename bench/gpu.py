"""Times steps on a GPU against torch's fused and foreach optimizers, on real models' shapes.

    python bench/gpu.py --output bench/results

Contestants take turns within one run, each timed step on cold caches: 256 MiB are rewritten before
it, and the device sleeps until the host has issued it, so that device time is device time. Each of
ours is checked first: one step against the same step on the CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import date_kernels
from date_kernels import make_stepper
from date_kernels.cuda_plan import why_no_cuda
from date_optim import LAMB, LARS, SGD, AdamW, TrustRatio
from date_optim.bench.clocks import CudaClock
from date_optim.bench.machine import commit
from date_optim.bench.models import parameters, shapes_of, sizes_of
from date_optim.bench.statistics import quantiles
from date_optim.bench.traffic import Streams, floor_bytes, model_bytes
from date_optim.optimizer import LayerwiseOptimizer

ROOT = Path(__file__).parent.parent
MODELS = ("resnet50", "bert-large", "llama-1b", "many-tiny")
REPEATS = 21


def lars(params: list[Tensor]) -> torch.optim.Optimizer:
    """LARS with bounds."""
    return LARS(params, lr=1e-3, weight_decay=1e-4, exclude=None, lower=0.0, upper=1.0)


def lamb(params: list[Tensor]) -> torch.optim.Optimizer:
    """LAMB with an upper bound."""
    return LAMB(params, lr=1e-3, weight_decay=1e-2, exclude=None, upper=10.0)


CASES: dict[str, dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]]] = {
    "momentum": {
        "ours": lambda p: SGD(p, lr=1e-3, momentum=0.9),
        "ours, LARS": lars,
        "torch fused": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, fused=True),
        "torch foreach": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, foreach=True),
    },
    "adam": {
        "ours": lambda p: AdamW(p, lr=1e-3),
        "ours, DATE": lambda p: AdamW(p, lr=1e-3, trust=TrustRatio(lower=0.1, upper=1.0)),
        "ours, LAMB": lamb,
        "torch fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
        "torch foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    },
}
"""By base rule, what steps over the same parameters. AdamW's decay costs no bytes."""

ON_CUDA = "cuda: "
"""What a contestant's name begins with if the CUDA backend takes its steps, not Triton."""

TRUST = {"ours, LARS": "gradient", "ours, DATE": "gradient", "ours, LAMB": "update"}
"""By contestant's name: what its ratio is of."""


def contestants(rule: str) -> dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]]:
    """All of a base rule: ours once for each backend that is there."""
    cases = dict(CASES[rule])
    if why_no_cuda(0) is None:
        for name, make in CASES[rule].items():
            if name.startswith("ours"):
                cases[ON_CUDA + name] = partial(by_cuda, make)
    return cases


def by_cuda(
    make: Callable[[list[Tensor]], torch.optim.Optimizer], params: list[Tensor]
) -> torch.optim.Optimizer:
    """The optimizer, stepped by the CUDA backend."""
    optimizer = make(params)
    assert isinstance(optimizer, LayerwiseOptimizer)
    if params[0].is_cuda:
        optimizer._stepper = make_stepper(optimizer.rule, "cuda")
    return optimizer


def check(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> None:
    """Hold one step on the GPU to the same step on the CPU."""
    results = []
    for device in ("cpu", "cuda"):
        params = parameters(shapes_of("resnet50"), device)
        make(params).step()
        results.append([param.detach().cpu() for param in params])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def copy_rate(clock: CudaClock) -> float:
    """GB/s of a large copy, bytes read and written."""
    streams = Streams("cuda")
    return statistics.median(streams.copy_rate(clock) for _ in range(REPEATS))


def measure(model: str, rule: str, copy: float, clock: CudaClock) -> list[dict[str, Any]]:
    """One row for each contestant, which take turns."""
    cache = torch.cuda.get_device_properties("cuda").L2_cache_size
    params = parameters(shapes_of(model), "cuda")
    optimizers = {name: make(params) for name, make in contestants(rule).items()}
    for optimizer in optimizers.values():
        for _ in range(3):
            optimizer.step()
    device: dict[str, list[float]] = {name: [] for name in optimizers}
    host: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(REPEATS):
        for name, optimizer in optimizers.items():
            device[name].append(clock.cold(optimizer.step))
            host[name].append(clock.host(optimizer.step))
    sizes = sizes_of(shapes_of(model))
    fused = statistics.median(device["torch fused"])
    rows = []
    for name, times in device.items():
        trust = TRUST.get(name.removeprefix(ON_CUDA))
        moved = model_bytes(rule, trust, sizes, cache)
        p20, median, p80 = quantiles(times)
        rows.append(
            {
                "model": model,
                "rule": rule,
                "contestant": name,
                "tensors": len(sizes),
                "parameters": sum(sizes),
                "us_p20": p20,
                "us_p50": median,
                "us_p80": p80,
                "host_us_p50": statistics.median(host[name]),
                "model_bytes": moved,
                "gb_per_s": moved / median / 1e3,
                "of_copy": moved / median / 1e3 / copy,
                "of_torch_fused": median / fused,
                "bound_of_torch_fused": 1.0
                if name.endswith("ours")
                else 1.1 * moved / floor_bytes(rule, sizes),
            }
        )
    return rows


def save(path: Path, where: dict[str, Any], command: str, rows: list[dict[str, Any]]) -> None:
    """Leave results with what they were measured on."""
    versions = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date_kernels": date_kernels.info().version,
        "commit": commit(),
        "command": command,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**where, **versions, "rows": rows}, indent=1) + "\n")


def main() -> None:
    """Measure, print a table and leave a file named after the device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results")
    arguments = parser.parse_args()
    for rule in CASES:
        for name, make in contestants(rule).items():
            if not name.startswith("torch"):
                check(make)
    properties = torch.cuda.get_device_properties("cuda")
    clock = CudaClock()
    copy = copy_rate(clock)
    print(f"{properties.name}, copy {copy:.0f} GB/s")
    print(
        f"{'':40} {'us':>9} {'p20':>9} {'p80':>9} {'GB/s':>6} {'copy':>5} {'fused':>6} "
        f"{'bound':>5} {'host':>7}"
    )
    rows = []
    for model in arguments.models:
        for rule in CASES:
            for row in measure(model, rule, copy, clock):
                rows.append(row)
                print(
                    f"{model:11} {rule:8} {row['contestant']:19} {row['us_p50']:9.1f} "
                    f"{row['us_p20']:9.1f} {row['us_p80']:9.1f} {row['gb_per_s']:6.0f} "
                    f"{row['of_copy']:5.2f} {row['of_torch_fused']:6.2f} "
                    f"{row['bound_of_torch_fused']:5.2f} {row['host_us_p50']:7.0f}",
                    flush=True,
                )
            torch.cuda.empty_cache()
    where = {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "copy_gb_per_s": copy,
        "triton": __import__("triton").__version__,
    }
    command = f"python bench/gpu.py --models {' '.join(arguments.models)}"
    name = properties.name.lower().replace(" ", "-")
    save(arguments.output / f"{name}.json", where, command, rows)


if __name__ == "__main__":
    main()
