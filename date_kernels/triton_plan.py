"""The plan of a step by the Triton engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from . import triton_engine
from .device_plan import CLOCK, Built, DevicePlan, Dtypes, Launch, Scalars
from .items import LEAF
from .layers import HALF
from .tables import TYPES
from .triton_engine import (
    COMMON_FIELDS,
    FOUND,
    FOUND_ADDRESS,
    HEADER,
    ITEM,
    MAX_NORM,
    ONE,
    SCALE,
    SCALE_ADDRESS,
    SKIPS,
    layerwise_step,
)
from .triton_rules import TRITON_RULES, TritonRule

WARPS = 8
REGISTERS = 128
PROGRAMS = 2
"""Two programs of 256 threads share a multiprocessor's 65,536 registers. Three of 80 spill: LARS
250 instead of 252, LAMB 401 instead of 378; four of 64: 281 and 465."""

_TRITON_TYPES = (tl.float32, tl.float64, tl.bfloat16, tl.float16)

assert triton_engine.CLOCK.value * triton_engine.LINE.value == CLOCK


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors in the CPU's memory."""
    return bool(triton.knobs.runtime.interpret)


class TritonPlan(DevicePlan):
    """See `date_kernels.device_plan.DevicePlan`."""

    _n_header = HEADER.value

    # So what stands behind any number of rows is aligned alike, and Triton compiles once.
    _row_multiple = 2

    def _fields_of(self, rule: str) -> Sequence[str]:
        return (*COMMON_FIELDS, *TRITON_RULES[rule].fields)

    def _check_device(self, device: torch.device, name: str) -> None:
        if (device.type == "cuda") == interpreted():
            where = "interprets kernels on the CPU" if interpreted() else "needs a GPU"
            raise RuntimeError(
                f"{name} is on {device}, but Triton {where}; move the parameters, "
                "or let the backend follow them"
            )

    def _item_table(self, items: NDArray[np.int64], first: int) -> NDArray[np.int32]:
        table = np.empty((len(items), ITEM.value), dtype=np.int32)
        table[:, 0] = items[:, 0] // LEAF
        table[:, 1] = -(-(items[:, 1] - items[:, 0]) // LEAF)
        table[:, 2] = items[:, 2] + first
        table[:, 3] = items[:, 3]
        return table

    def _header(self, built: Built, scalars: Scalars) -> NDArray[np.int64]:
        words = np.zeros(HEADER.value, dtype=np.int64)
        values = words.view(np.float64)
        words[SCALE_ADDRESS.value], values[SCALE.value] = scalars.scale_address, scalars.scale
        words[FOUND_ADDRESS.value], values[FOUND.value] = scalars.found_address, scalars.found
        values[MAX_NORM.value] = scalars.max_norm
        words[SKIPS.value] = built.skips
        values[ONE.value] = 1.0
        return words

    def _launch(
        self, built: Built, launch: Launch, scalars: Scalars, words: NDArray[np.int64]
    ) -> None:
        n_items = launch.items.shape[0]
        if n_items == 0:
            return
        functions = TRITON_RULES[self.rule.name]
        rows = HEADER.value + len(built.layer_options) * self._width
        work = built.workspace
        args = (
            launch.items,
            n_items,
            launch.scans,
            int(launch.judged),
            built.layers,
            launch.first,
            launch.layers,
            built.words,
            built.words.view(torch.float64),
            built.words[rows:],
            self._width,
            work["slots"],
            work["slots"].numel() // 2,
            work["reports"],
            work["verdict"],
            work["arrived"],
            work["published"],
            work["clock"],
        )
        constants = constants_of(functions, built.uses, launch.dtypes)
        if interpreted():
            layerwise_step[(2,)](*args, **constants)
            return
        properties = torch.cuda.get_device_properties(launch.items.device)
        programs = min(n_items, PROGRAMS * properties.multi_processor_count)
        layerwise_step[(programs,)](*args, **constants, **compile_options())


def constants_of(functions: TritonRule, uses: int, dtypes: Dtypes | None) -> dict[str, Any]:
    """What the kernel is compiled for; without dtypes it only scans."""
    w, g, s = (None, None, None) if dtypes is None else map(triton_type, dtypes)
    return {
        "PREPARE": functions.prepare,
        "DIRECTION": functions.direction,
        "CONCLUDE": functions.conclude,
        "USES": uses,
        "W": w,
        "G": g,
        "S": s,
        "T": tl.float64 if w == tl.float64 else tl.float32,
        "TILE": tile_of(functions, dtypes),
    }


def tile_of(functions: TritonRule, dtypes: Dtypes | None) -> int:
    """Elements that a program holds at a time.

    A leaf of float32 where the rule's registers suffice: LARS 233 us instead of 252 on ResNet-50,
    3054 instead of 3269 on BERT-large; other rules would spill. 16-bit values take registers to
    convert, and float64 twice as many.
    """
    if dtypes is None or dtypes[0] in HALF:
        return LEAF // 2
    if dtypes[0] == torch.float64:
        return LEAF // 4
    return LEAF if functions.light else LEAF // 2


def triton_type(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a torch dtype."""
    return _TRITON_TYPES[TYPES.index(dtype)]


def compile_options() -> dict[str, Any]:
    """How the kernel is compiled: nothing fused, so that it rounds as ``csrc`` does."""
    options: dict[str, Any] = {"num_warps": WARPS, "enable_fp_fusion": False}
    if torch.version.cuda is not None:
        options["maxnreg"] = REGISTERS
    return options
