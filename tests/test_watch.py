"""Both ways to ask whether a plan still fits: through the compiled module, and in Python."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from date_kernels import native
from date_kernels.layers import Call
from date_kernels.watch import NativeWatch, PythonWatch, Watch, make_watch

SHAPES = ((3, 4), (), (5,), (2, 1, 3))

WATCHES = pytest.mark.parametrize("watch", [NativeWatch, PythonWatch])
MakeWatch = Callable[[Call], Watch]


def a_call() -> Any:
    """Parameters, a state of the first three, a counter of the last."""
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    return Call(
        params,
        [torch.ones(shape) for shape in SHAPES],
        {"momentum_buffer": [*(torch.ones(shape) for shape in SHAPES[:3]), None]},
        [None, None, None, torch.zeros(())],
        [],
    )


def test_the_compiled_module_looks_where_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(make_watch(a_call())) is NativeWatch
    monkeypatch.setattr("date_kernels.watch._EXCHANGE", None)  # a torch without it
    assert type(make_watch(a_call())) is PythonWatch
    monkeypatch.undo()
    monkeypatch.setattr(native, "why_missing", "not built")
    assert type(make_watch(a_call())) is PythonWatch


def test_an_exchange_is_known_by_its_name() -> None:
    knows = native.module().Memory.knows
    assert knows(torch.Tensor.__dlpack_c_exchange_api__)
    assert not knows(torch.ones(1).__dlpack__())
    assert not knows(object())


@WATCHES
def test_new_gradients_are_told(watch: MakeWatch) -> None:
    call = a_call()
    watching = watch(call)
    assert watching.gradients.tolist() == [x.data_ptr() for x in call.grads]
    call.grads[:] = [x.clone() for x in call.grads]
    assert watching.fits(call)
    assert watching.gradients.tolist() == [x.data_ptr() for x in call.grads]


@WATCHES
def test_gradients_are_not_kept(watch: MakeWatch) -> None:
    call = a_call()
    watching = watch(call)
    call.grads[2] = torch.ones(5)
    assert watching.fits(call)
    gone = [weakref.ref(x) for x in call.grads]
    call.grads.clear()
    assert [ref() for ref in gone] == [None] * 4


@WATCHES
def test_wrappers_made_anew_are_what_is_written(watch: MakeWatch) -> None:
    call = a_call()
    watching = watch(call)
    anew = torch.nn.Parameter(call.params[0].detach())
    call.params[0] = anew
    assert watching.fits(call)
    written = [*call.params, call.steps[3], *call.states["momentum_buffer"][:3]]
    assert [*map(id, watching.written)] == [*map(id, written)]


def transposed(tensor: Tensor) -> Tensor:
    """As many elements of one shape in another order."""
    return torch.ones(tensor.shape[::-1]).mT


def conjugated(tensor: Tensor) -> Tensor:
    """A lazily negated view of the same shape, dense where that has one element."""
    return torch.ones(tensor.shape, dtype=torch.complex64).conj().imag


class Wrapper(torch.Tensor):
    """A subclass, whose memory may be elsewhere."""


def put(column: Callable[[Call], Any], at: int, new: Callable[[Any], Any]) -> Any:
    """A change of one tensor of a call."""

    def change(call: Call) -> None:
        column(call)[at] = new(column(call)[at])

    return change


def moved(tensor: Tensor) -> Tensor:
    """The same object with other memory, as ``model.to()`` leaves it."""
    tensor.data = tensor.detach().clone()
    return tensor


def turned(tensor: Tensor) -> Tensor:
    """The same object and memory with its dimensions the other way round."""
    tensor.data = tensor.detach().mT
    return tensor


def grads(call: Call) -> Any:
    return call.grads


def params(call: Call) -> Any:
    return call.params


def buffers(call: Call) -> Any:
    return call.states["momentum_buffer"]


def steps(call: Call) -> Any:
    return call.steps


CHANGES: dict[str, Callable[[Any], Any]] = {
    "gradient-dtype": put(grads, 0, Tensor.double),
    "gradient-order": put(grads, 0, transposed),
    "gradient-elements": put(grads, 0, lambda _: torch.ones(4, 4)),
    "gradient-of-one-element-negated": put(grads, 1, conjugated),
    "gradient-negated": put(grads, 0, conjugated),
    "gradient-sparse": put(grads, 0, Tensor.to_sparse),
    "gradient-sparse-of-one-element": put(grads, 1, Tensor.to_sparse),
    "gradient-meta": put(grads, 0, lambda x: x.to("meta")),
    "gradient-subclass": put(grads, 0, lambda x: x.as_subclass(Wrapper)),
    "gradient-gone": put(grads, 0, lambda _: None),
    "gradient-no-tensor": put(grads, 0, Tensor.numpy),
    "fewer-gradients": lambda call: call.grads.pop(),
    "parameter-moved": put(params, 0, moved),
    "parameter-elsewhere": put(params, 0, lambda x: torch.nn.Parameter(x.detach().clone())),
    "parameter-retyped": put(params, 0, lambda x: x.detach().view(torch.int32)),
    "parameter-negated": put(params, 0, lambda x: torch._neg_view(x.detach())),
    "parameter-transposed": put(params, 0, turned),
    "state-moved": put(buffers, 2, moved),
    "state-gone": put(buffers, 2, lambda _: None),
    "state-new": put(buffers, 3, lambda _: torch.ones(2, 1, 3)),
    "state-elsewhere": put(buffers, 2, Tensor.clone),
    "step-moved": put(steps, 3, moved),
    "step-gone": put(steps, 3, lambda _: None),
    "step-retyped": put(steps, 3, lambda x: x.view(torch.int32)),
    "state-of-another-name": lambda call: call.states.update(
        exp_avg=call.states.pop("momentum_buffer")
    ),
}


@WATCHES
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_kernels_would_find_changed(watch: MakeWatch, change: Callable[[Call], Any]) -> None:
    call = a_call()
    watching = watch(call)
    assert watching.fits(call)
    assert watching.fits(call)
    change(call)
    # Plans look in full at gradients without an address.
    assert not watching.fits(call) or not watching.gradients.all()


@WATCHES
def test_what_kernels_would_not_see(watch: MakeWatch) -> None:
    """A gradient that is part of a graph, a parameter that is frozen, a view of the same memory."""
    call = a_call()
    watching = watch(call)
    call.grads[0] = call.grads[0].requires_grad_() * 1
    call.params[2].requires_grad_(False)
    call.states["momentum_buffer"][1] = call.states["momentum_buffer"][1].view(())
    assert watching.fits(call)
