"""The plan of a step by the CUDA kernels of ``csrc/cuda``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from . import native
from .device_plan import Built, DevicePlan, Launch, Scalars
from .tables import TYPES


def why_no_cuda(device: int = -1) -> str | None:
    """Why the CUDA kernels cannot run; None where they can.

    Parameters
    ----------
    device : int
        The GPU that is to run them, where CUDA is initialised to find out. Without it only what is
        known without is looked at.
    """
    if native.why_missing is not None:
        return native.why_missing
    kernels = native.module().GPU
    if torch.version.hip is not None and kernels != "HIP":
        return (
            "torch is built for ROCm, but the compiled module has no kernels of that; backend "
            "'triton' serves there"
        )
    if not kernels:
        return (
            "the compiled module was built without a CUDA toolkit; put nvcc on the PATH and rebuild"
        )
    if torch.version.hip is None and kernels == "HIP":
        return "its kernels were compiled for ROCm, but torch is not"
    if not torch.cuda.is_available():
        return "torch sees no GPU: torch.cuda.is_available() is False"
    return native.module().cuda_why_not(device) or None


class CudaPlan(DevicePlan):
    """See `date_kernels.device_plan.DevicePlan`."""

    def _fields_of(self, rule: str) -> Sequence[str]:
        fields: tuple[str, ...] = native.module().FAMILIES[rule][1]
        return fields

    def _check_device(self, device: torch.device, name: str) -> None:
        why: str | None = "it needs a GPU"
        if device.type == "cuda":
            with torch.cuda.device(device):  # asking elsewhere would start CUDA there, too
                why = why_no_cuda(device.index)
        if why is not None:
            raise RuntimeError(
                f"{name} is on {device}, where backend 'cuda' cannot run: {why}; move the "
                "parameters, or let the backend follow them"
            )

    def _item_table(self, items: NDArray[np.int64], first: int) -> NDArray[np.int64]:
        """As ``csrc/plan.h`` has them: begin, end, layer and kind in the halves of one word."""
        table = np.empty((len(items), 3), dtype=np.int64)
        table[:, :2] = items[:, :2]
        halves = table[:, 2:].view(np.int32)
        halves[:, 0] = items[:, 2] + first
        halves[:, 1] = items[:, 3]
        return table

    def _header(self, built: Built, scalars: Scalars) -> NDArray[np.int64]:
        return np.empty(0, dtype=np.int64)  # a launch's parameters hold them

    def _most_in_launch(self) -> int:
        most: int = native.module().LAUNCH_WORDS
        return most

    def _launch(
        self, built: Built, launch: Launch, scalars: Scalars, words: NDArray[np.int64]
    ) -> None:
        n_items = launch.items.shape[0]
        if n_items == 0:
            return
        device = launch.items.device
        carried = words if words.size <= self._most_in_launch() else words[:0]
        names = ("slots", "arrived", "published", "reports", "verdict", "clock")
        work = [built.workspace[name].data_ptr() for name in names]
        n_row_words = self._width * len(built.layer_options)
        n_slots = built.workspace["slots"].numel() // 2
        pair = (-1, -1) if launch.dtypes is None else map(TYPES.index, launch.dtypes[:2])
        native.module().cuda_launch(
            native.module().FAMILIES[self.rule.name][0],
            *pair,
            (launch.items.data_ptr(), built.layers.data_ptr(), built.words.data_ptr(), *work),
            (n_items, launch.scans, launch.first, launch.layers, n_slots, n_row_words),
            carried,
            (scalars.scale_address, scalars.scale),
            (scalars.found_address, scalars.found),
            scalars.max_norm,
            built.skips,
            launch.judged,
            device.index or 0,
            torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0,
        )
