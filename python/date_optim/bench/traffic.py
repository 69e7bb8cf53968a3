"""The bytes that a step moves, and the rates at which this machine moves bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .clocks import Clock
from .machine import cache_bytes

STATES = {
    "sgd": 0,
    "momentum": 1,
    "adam": 2,
    "adagrad": 1,
    "rmsprop": 1,
    "adadelta": 2,
    "lion": 1,
}
"""By base rule, its states per parameter."""

_AGAIN = {None: 0, "gradient": 8, "update": 12}
"""By what the ratio is of, the bytes per parameter that come again where a layer left the cache:
weights and gradient; or, of Adam's or Lion's update, weights and states, written in between."""

ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 28}
"""By device: of each array that is copied, at least; twice those of the step with five streams."""


def stream_elements(device: str) -> tuple[int, int]:
    """Return those of each array of the copy, and of the five streams.

    Each array has at least the bytes of the last level, so that no rate is that of a cache.
    """
    least = -(-cache_bytes(device) // 4)
    return max(ELEMENTS[device], least), max(ELEMENTS[device] // 2, least)


def floor_bytes(rule: str, sizes: Sequence[int]) -> int:
    """Bytes of a float32 step that reads and writes each array once.

    Weights, gradient and states are read, weights and states are written.
    """
    return (12 + 8 * STATES[rule]) * sum(sizes)


def model_bytes(rule: str, trust: str | None, sizes: Sequence[int], cache: int) -> int:
    """Bytes of a step whose norms come first, in a cache of `cache` bytes.

    What is measured of a layer is read again unless it fits half the cache. Rows have them twice.
    By the last level: the fewest bytes, and those that GB/s and percentages are of, since they
    stand beside the memory's rates and what a cache holds is none of the memory's. And by the cache
    that who updates has to himself: what comes from beyond a core's second level.

    Parameters
    ----------
    rule : str
        A key of `STATES`.
    trust : {None, "gradient", "update"}
        What the ratio is of.
    sizes : sequence of int
        Elements of each layer.
    cache : int
        Bytes.
    """
    read = 8 if trust == "gradient" else 8 + 4 * STATES[rule]
    large = sum(size for size in sizes if size * read > cache / 2)
    return floor_bytes(rule, sizes) + _AGAIN[trust] * large


def copied_bytes(device: str) -> int:
    """Bytes that a large copy reads and writes."""
    return 8 * stream_elements(device)[0]


class Streams:
    """The rates of large arrays: what a step can reach on this machine at this moment."""

    def __init__(self, device: str) -> None:
        copied, stepped = stream_elements(device)
        self._source = torch.ones(copied, device=device)
        self._target = torch.empty_like(self._source)
        self._param = torch.nn.Parameter(torch.ones(stepped, device=device))
        self._param.grad = torch.ones_like(self._param)
        self._momentum = torch.optim.SGD([self._param], lr=1e-6, momentum=0.9, fused=True)
        self._momentum.step()  # makes the buffer

    def copy_time(self, clock: Clock) -> float:
        """Microseconds of a copy."""
        return clock.cold(lambda: self._target.copy_(self._source))

    def copy_rate(self, clock: Clock) -> float:
        """GB/s of a copy, bytes read and written."""
        return copied_bytes(clock.device) / self.copy_time(clock) / 1e3

    def five_stream_rate(self, clock: Clock) -> float:
        """GB/s of torch's fused momentum step on one tensor: three arrays read, two written."""
        moved = floor_bytes("momentum", [self._param.numel()])
        return moved / clock.cold(self._momentum.step) / 1e3
