"""What a step calls and allocates: the same for few tensors and for many."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from compiled import out

HERE = Path(__file__).parent

FEW, MANY = 50, 400
"""Tensors."""

COUNT = """
import ctypes, json, sys
from collections import Counter
import torch
import date_optim

counters = ctypes.CDLL(None)
counters.count_alloc_watch_all()
torch.set_num_threads(2)

def counted(name, options, count):
    params = [torch.nn.Parameter(torch.ones(1000)) for _ in range(count)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = getattr(date_optim, name)(params, lr=0.1, **options)
    for _ in range(3):  # states, a plan, Python's own caches
        optimizer.step()
    allocations, regions = counters.count_alloc_calls(), counters.count_regions()
    optimizer.step()
    allocations = counters.count_alloc_calls() - allocations
    regions = counters.count_regions() - regions

    calls = Counter()
    def note(frame, event, function):
        if event == "call":
            calls[frame.f_code.co_name] += 1
        if event == "c_call":
            calls[function.__name__] += 1
    sys.setprofile(note)
    optimizer.step()
    sys.setprofile(None)
    return {"allocations": allocations, "regions": regions, "calls": calls}

cases, sizes = json.loads(sys.argv[1])
print(json.dumps({name: [counted(name, options, n) for n in sizes] for name, options in cases}))
"""

CASES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"momentum": 0.9}),
    ("LARS", {}),
    ("LAMB", {}),
    ("AdamW", {"max_grad_norm": 1.0, "on_nonfinite": "skip"}),
]


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """By optimizer: of a step of few tensors, and of one of many."""
    folder = tmp_path_factory.mktemp("counters")
    flags = ("-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared")
    counters = [folder / f"{name}.so" for name in ("count_alloc", "count_regions")]
    for counter in counters:
        source = HERE / f"native/{counter.stem}.c"
        out(os.environ.get("CC", "gcc"), *flags, source, "-o", counter)
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(map(str, counters)),
        "PYTHONMALLOC": "malloc",  # each of Python's objects is an allocation of its own
    }
    argument = json.dumps([CASES, (FEW, MANY)])
    counted: dict[str, list[dict[str, Any]]] = json.loads(
        out(sys.executable, "-c", COUNT, argument, env=environment)
    )
    return counted


@pytest.mark.parametrize("name", [name for name, _ in CASES])
def test_a_step_is_one_region_and_nothing_for_each_tensor(
    counts: dict[str, list[dict[str, Any]]], name: str
) -> None:
    """Not a call, of Python's or of C's functions, and no object: only lists that grow."""
    few, many = counts[name]
    for counted in few, many:
        calls = sum(counted["calls"].values())
        print(f"{name}: {counted['allocations']} allocations, {calls} calls")
        assert counted["regions"] == 1
        assert counted["calls"]["run"] == 1
    assert few["calls"] == many["calls"]
    more = many["allocations"] - few["allocations"]
    # A list that is appended to asks for an eighth more each time, 18 times from 50 to 400.
    assert more < (MANY - FEW) / 2, f"{more} allocations more for {MANY - FEW} tensors more"
