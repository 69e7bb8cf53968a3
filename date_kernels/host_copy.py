"""Numbers of a device on their way to the host, for which nobody has to wait."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class HostCopy:
    """A tensor as it is once its device has done what it was told so far, in the host's memory.

    The copy is ordered behind the work of the device's current stream, and before what that is told
    later: what overwrites the tensor then is no part of it.

    Parameters
    ----------
    source : Tensor
        Of any shape, float64.
    """

    def __init__(self, source: Tensor) -> None:
        # torch keeps pinned memory for the next one: there is none to allocate from step to step.
        self._host = torch.empty_like(source, device="cpu", pin_memory=source.is_cuda)
        self._host.copy_(source, non_blocking=True)
        self._event = record_event(source.device)

    @property
    def has_arrived(self) -> bool:
        """Whether `numpy` waits for nothing."""
        return self._event is None or bool(self._event.query())

    def numpy(self) -> NDArray[np.float64]:
        """The values; waits for them."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy()


def record_event(device: torch.device) -> Any:
    """What tells when a device has done all that it was told so far; None for a CPU, which has."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
