"""Whether a plan still fits the tensors of a step, asked at every step and so asked cheaply.

A `Watch` looks through the compiled module where that is there and knows torch's exchange, else it
is a `PythonWatch`, which takes five times as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import native
from .collect import same_objects
from .layers import Call

_ADDRESS = torch.Tensor.data_ptr
_STRIDE = torch.Tensor.stride
_IS_NEG = torch.Tensor.is_neg
_DTYPE = attrgetter("dtype")
_EXCHANGE = getattr(Tensor, "__dlpack_c_exchange_api__", None)


class Watch(Protocol):
    """What a plan was built for.

    Attributes
    ----------
    written : list of Tensor
        What the step may change, of the last call that fitted.
    gradients : ndarray of int64
        Where that call's gradients lie.
    """

    written: list[Tensor]
    gradients: NDArray[np.int64]

    def fits(self, call: Call) -> bool:
        """Whether kernels would find in the tensors of this call what they found in the first."""


def make_watch(call: Call) -> Watch:
    """Watch the tensors of a call, which have passed `date_kernels.layers.check_layers`."""
    known = native.why_missing is None and native.module().Memory.knows(_EXCHANGE)
    return NativeWatch(call) if known else PythonWatch(call)


class NativeWatch:
    """A watch whose looks ``csrc/memory.h`` takes; it keeps no gradient alive."""

    def __init__(self, call: Call) -> None:
        tensors = _written(call)
        self._keys = [*call.states]
        self.written = _present(tensors)
        self._memory = native.module().Memory(_EXCHANGE, tensors)
        self._now = self._memory.addresses
        self._addresses = self._now.copy()
        self._of_gradients = native.module().Memory(_EXCHANGE, [*call.grads])
        self._doubtful = self._of_gradients.doubtful.tolist()
        self.gradients = self._of_gradients.addresses

    def fits(self, call: Call) -> bool:
        """See `Watch.fits`."""
        tensors, grads = _written(call), [*call.grads]
        if not (
            [*call.states] == self._keys
            and self._memory.fits(tensors)
            and (self._now == self._addresses).all()
            and self._of_gradients.fits(grads)
        ) or any(grads[i].is_neg() for i in self._doubtful):
            return False
        if self._memory.renewed:
            self.written = _present(tensors)
            return not any(map(_IS_NEG, self.written))
        return True


class PythonWatch:
    """A watch in Python.

    A tensor that is written, a parameter say, is the same object from step to step, and then its
    address tells whether its memory has moved; wrappers made anew are looked at in full. Gradients
    are new objects at every step: of each all is read that decides what a kernel would read. They
    are not kept, since their memory is the user's to free.
    """

    def __init__(self, call: Call) -> None:
        self._keys = [*call.states]
        self._tensors = _written(call)
        self.written = _present(self._tensors)
        self._addresses = [*map(_ADDRESS, self.written)]
        self._strides = [*map(_STRIDE, call.params)]
        self._facts = _in_full(self.written)
        self._of_gradients = _in_columns(call.grads)
        self.gradients = _addresses(call.grads)

    def fits(self, call: Call) -> bool:
        """See `Watch.fits`."""
        if [*call.states] != self._keys:
            return False
        try:
            fits = self._fits_written(call) and self._of_gradients == _in_columns(call.grads)
            if fits:
                self.gradients = _addresses(call.grads)
        except (AttributeError, RuntimeError, TypeError):
            return False  # a sparse tensor has no strides, say: the build's checks will name it
        return fits

    def _fits_written(self, call: Call) -> bool:
        tensors = _written(call)
        if not same_objects(tensors, self._tensors):
            if [x is None for x in tensors] != [x is None for x in self._tensors]:
                return False
            if _in_full(_present(tensors)) != self._facts:
                return False
            self._tensors, self.written = tensors, _present(tensors)
        return (
            self._addresses == [*map(_ADDRESS, self.written)]
            and self._strides == [*map(_STRIDE, call.params)]
        )  # fmt: skip


def _written(call: Call) -> list[Tensor | None]:
    return [*call.params, *call.steps, *chain.from_iterable(call.states.values())]


def _present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _addresses(tensors: Sequence[Tensor]) -> NDArray[np.int64]:
    return np.array([*map(_ADDRESS, tensors)], dtype=np.int64)


def _in_full(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    return [(type(x), x.dtype, x.device, x.shape, x.stride(), x.is_neg()) for x in tensors]


def _in_columns(tensors: Sequence[Tensor]) -> tuple[list[Any], ...]:
    """Memory that is read alike: of one number of elements, strides say in which order."""
    return (
        [*map(type, tensors)],
        [*map(_DTYPE, tensors)],
        [*map(torch.Tensor.get_device, tensors)],
        [*map(torch.Tensor.numel, tensors)],
        [*map(_STRIDE, tensors)],
        [*map(_IS_NEG, tensors)],
    )
