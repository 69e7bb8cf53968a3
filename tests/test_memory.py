"""What an optimizer keeps, and what a step takes for itself."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch_runs import FULL, TWINS

from date_kernels.plan import CHUNK
from date_optim import LAMB, LARS, SGD, AdamW


def bytes_of(optimizer: Optimizer) -> int:
    return sum(
        value.nbytes
        for of in optimizer.state.values()
        for value in of.values()
        if isinstance(value, Tensor)
    )


def stepped(cls: Any, dtype: torch.dtype, **options: Any) -> Any:
    params = [Parameter(torch.ones(n, dtype=dtype)) for n in (1, 100, 5000)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = cls(params, **options)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_states_are_no_more_bytes_than_torchs(name: str, dtype: torch.dtype) -> None:
    """But for a counter a layer with dampening: that of torch is whether there is a buffer."""
    ours, torchs = TWINS[name.split("-", maxsplit=1)[0]]
    options = FULL[name]
    one, other = (stepped(cls, dtype, **options) for cls in (ours, torchs))
    counters = 4 * len(one.state) if options.get("dampening") else 0
    assert bytes_of(one) - counters <= bytes_of(other)


@pytest.mark.parametrize(
    ("cls", "options", "states"), [(SGD, {"momentum": 0.9}, 1), (LARS, {}, 1), (LAMB, {}, 2)]
)
@pytest.mark.parametrize("master", [False, True])
def test_16_bit_parameters_have_float32_states(
    cls: Any, options: dict[str, Any], states: int, master: bool
) -> None:
    optimizer = stepped(cls, torch.bfloat16, lr=0.1, master_weights=master, **options)
    for param, values in optimizer.state.items():
        counters = values["step"].nbytes if "step" in values else 0
        assert sum(x.nbytes for x in values.values()) - counters == 4 * param.numel() * (
            states + master
        )


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in FULL), ("SGD", torch.float16)],
)
def test_state_dtype_halves_the_states_of_16_bit_parameters(name: str, dtype: torch.dtype) -> None:
    """To what torch keeps, which has them in the parameter's dtype."""
    cls, torchs = TWINS[name.split("-", maxsplit=1)[0]]
    wide = stepped(cls, dtype, **FULL[name])
    narrow = stepped(cls, dtype, state_dtype=dtype, **FULL[name])
    counters = sum(values["step"].nbytes for values in wide.state.values() if "step" in values)
    assert bytes_of(narrow) - counters == (bytes_of(wide) - counters) / 2
    others = sum(4 for values in narrow.state.values() if "step" in values)
    assert bytes_of(narrow) - others <= bytes_of(stepped(torchs, dtype, **FULL[name]))


PEAK = """
import re, sys, torch
from date_optim import {name}

def kibibytes(key):
    return int(re.search(rf"{{key}}:\\s+(\\d+)", open("/proc/self/status").read())[1])

params = [torch.nn.Parameter(torch.ones({size})) for _ in range({count})]
for param in params:
    param.grad = torch.ones_like(param)
optimizer = {name}(params, lr=0.1)
optimizer.step()  # makes states, wakes threads
del optimizer._stepper, optimizer._gathered
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak until now
before = kibibytes("VmRSS")
optimizer.step()
print(kibibytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("cls", [LARS, AdamW, LAMB])
@pytest.mark.parametrize(("size", "count"), [(1 << 24, 2), (1 << 10, 2000)])
def test_a_step_takes_little_for_itself(cls: Any, size: int, count: int) -> None:
    """Under 1 MB and 64 bytes a chunk, its plan included, whatever the parameters' size."""
    script = PEAK.format(name=cls.__name__, size=size, count=count)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    chunks = count * -(-size // CHUNK)
    [kibibytes] = re.findall(r"\d+", done.stdout)
    assert int(kibibytes) * 1024 < 1e6 + 64 * chunks
