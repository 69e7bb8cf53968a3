"""Compiles the Triton engine ahead of time, for GPUs that need not be there, and prints a table.

As a program, and without TRITON_INTERPRET: where that is set there is nothing to compile.

    python triton_compiled.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from date_kernels import RULES
from date_kernels.device_plan import Dtypes
from date_kernels.triton_engine import layerwise_step
from date_kernels.triton_plan import REGISTERS, compile_options, constants_of
from date_kernels.triton_rules import TRITON_RULES

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
F32, F64, B16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (
    (F32, F32, F32),
    (F64, F64, F64),
    (B16, B16, F32),
    (B16, F32, F32),
    (F16, F16, F32),
    (F16, F32, F32),
    (B16, B16, B16),
)
"""Of parameters, gradients and states."""

POINTERS = {
    "items": "*i32",
    "layers": "*i64",
    "words": "*i64",
    "values": "*fp64",
    "gradients": "*i64",
    "slots": "*fp64",
    "reports": "*fp64",
    "verdict": "*fp64",
    "arrived": "*i32",
    "published": "*i32",
    "clock": "*i32",
}

Case = tuple[str, int, Dtypes | None, str]


def cases() -> list[Case]:
    """Every rule with each set of states that its variants use, over all dtypes and targets."""
    of_rules: list[tuple[str, int]] = []
    for name, rule in RULES.items():
        for variant in rule.variants.values():
            used = rule.used(rule.complete({"lr": 1.0, **variant}))
            uses = sum(1 << bit for bit, key in enumerate(rule.states) if key in used)
            of_rules.append((name, uses))
    every: list[Case] = []
    for name in RULES:
        distinct = sorted({uses for rule, uses in of_rules if rule == name})
        for target in TARGETS:
            every += [(name, uses, DTYPES[0], target) for uses in distinct]
            every += [(name, distinct[-1], each, target) for each in DTYPES[1:]]
    return [*every, *(("sgd", 0, None, target) for target in TARGETS)]


def short(dtype: torch.dtype) -> str:
    """``f32`` for float32, and so on."""
    return re.sub("torch.(b?f)loat", r"\1", str(dtype))


def compiled(case: Case) -> dict[str, Any]:
    """Compile a case and read what it takes off its artifacts."""
    name, uses, dtypes, target = case
    functions = TRITON_RULES[name]
    constants = constants_of(functions, uses, dtypes)
    parameters = [parameter.name for parameter in layerwise_step.params]
    signature = {key: POINTERS.get(key, "i32") for key in parameters}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(parameters.index(key),): [["tt.divisibility", 16]] for key in POINTERS}
    options = {key: value for key, value in compile_options().items() if key != "maxnreg"}
    if TARGETS[target].backend == "cuda":  # also where torch itself was built without it
        options["maxnreg"] = REGISTERS
    source = ASTSource(layerwise_step, signature, constants, aligned)
    kernel = triton.compile(source, target=TARGETS[target], options=options)
    row: dict[str, Any] = {
        "rule": name,
        "uses": uses,
        "tile": constants["TILE"],
        "dtypes": "scan" if dtypes is None else "/".join(map(short, dtypes)),
        "target": target,
    }
    return row | (of_ptx(kernel) if "ptx" in kernel.asm else of_amdgcn(kernel))


def of_ptx(kernel: Any) -> dict[str, Any]:
    """Registers and spills of a cubin; wide and narrow accesses that carry the engine's hints."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    ptx = kernel.asm["ptx"]

    def count(pattern: str) -> int:
        return len(re.findall(pattern, ptx))

    return {
        "registers": int(found["REG"]),
        "spilled_bytes": int(found["STACK"]) + int(found["LOCAL"]),
        "wide_loads": count(r"ld\.global\S*\.v4\.b32"),
        "wide_stores": count(r"st\.global\S*\.v4\.b32"),
        "local": count(r"\b(?:ld|st)\.local"),
        "fused": count(r"\bfma\."),
    }


def of_amdgcn(kernel: Any) -> dict[str, Any]:
    """The same of a code object for AMD's processors, as far as its text tells."""
    text = kernel.asm["amdgcn"]
    found = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", text))
    return {
        "vector_registers": int(found["vgpr_count"]),
        "private_bytes": int(found["private_segment_fixed_size"]),
        "wide_loads": len(re.findall(r"(?:global|buffer|flat)_load_dwordx4", text)),
        "wide_stores": len(re.findall(r"(?:global|buffer|flat)_store_dwordx4", text)),
    }


def main() -> None:
    """Compile all cases on all cores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(compiled, cases(), chunksize=4))
    columns = ("registers", "spilled_bytes", "wide_loads", "wide_stores", "local", "fused")
    of_amd = {"registers": "vector_registers", "spilled_bytes": "private_bytes"}
    print(f"{'rule':9} uses tile {'dtypes':18} {'target':7}", *(f"{name:>13}" for name in columns))
    for row in rows:
        read = (row.get(name, row.get(of_amd.get(name, ""), "-")) for name in columns)
        values = (f"{value:>13}" for value in read)
        print(
            f"{row['rule']:9} {row['uses']:4} {row['tile']:4} {row['dtypes']:18} {row['target']:7}",
            *values,
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
