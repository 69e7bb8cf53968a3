"""Whether a plan still fits the tensors of a step, asked at every step and so asked cheaply.

A tensor that is written, a parameter say, is the same object from step to step, and then its
address tells whether its memory has moved; wrappers made anew are looked at in full. Gradients are
new objects at every step: of each all is read that decides what a kernel would read. They are not
kept, since their memory is the user's to free.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from .layers import Call

_ADDRESS = torch.Tensor.data_ptr
_STRIDE = torch.Tensor.stride
_DTYPE = attrgetter("dtype")


class Watch:
    """What a plan was built for."""

    def __init__(self, call: Call) -> None:
        self._keys = [*call.states]
        self._columns = [[*column] for column in _written(call)]
        self._addresses = [*map(_ADDRESS, _present(self._columns))]
        self._strides = [*map(_STRIDE, call.params)]
        self._written = _in_full(_present(self._columns))
        self._gradients = _of_gradients(call.grads)

    def fits(self, call: Call) -> bool:
        """Whether kernels would find in the tensors of this call what they found in the first."""
        if [*call.states] != self._keys:
            return False
        try:
            return self._fits_written(call) and self._gradients == _of_gradients(call.grads)
        except (AttributeError, RuntimeError, TypeError):
            return False  # a sparse tensor has no strides, say: the build's checks will name it

    def _fits_written(self, call: Call) -> bool:
        columns = [*_written(call)]
        if any(map(_differ, columns, self._columns)):
            if [[x is None for x in column] for column in columns] != [
                [x is None for x in column] for column in self._columns
            ]:
                return False
            if _in_full(_present(columns)) != self._written:
                return False
            self._columns = [[*column] for column in columns]
        return (
            self._addresses == [*map(_ADDRESS, _present(columns))]
            and self._strides == [*map(_STRIDE, call.params)]
        )  # fmt: skip


def _written(call: Call) -> Iterable[Sequence[Tensor | None]]:
    return (call.params, call.steps, *call.states.values())


def _present(columns: Iterable[Sequence[Tensor | None]]) -> list[Tensor]:
    return [tensor for column in columns for tensor in column if tensor is not None]


def _differ(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether they hold other objects; equality would compare elements."""
    return len(a) != len(b) or not all(map(is_, a, b))


def _in_full(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    return [(type(x), x.dtype, x.device, x.shape, x.stride(), x.is_neg()) for x in tensors]


def _of_gradients(grads: Sequence[Tensor]) -> tuple[list[Any], ...]:
    """Memory that is read alike: of one number of elements, strides say in which order."""
    return (
        [*map(type, grads)],
        [*map(_DTYPE, grads)],
        [*map(torch.Tensor.get_device, grads)],
        [*map(torch.Tensor.numel, grads)],
        [*map(_STRIDE, grads)],
        [*map(torch.Tensor.is_neg, grads)],
    )
