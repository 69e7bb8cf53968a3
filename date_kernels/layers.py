"""What may be a layer: the checks on its tensors, and how their memory is laid out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .rules import Group, Rule, needs_step

States: TypeAlias = Mapping[str, Sequence[Tensor | None]]
"""By torch's key, a tensor for each layer that uses it."""

_KNOWN_TYPES = (Tensor, torch.nn.Parameter)


def check_tensor(tensor: object, what: str, param: Tensor | None = None) -> Tensor:
    """Refuse what no kernel here can serve.

    Parameters
    ----------
    tensor : object
    what : str
        Its name in errors.
    param : Tensor, optional
        The parameter that a gradient or a state must match in shape, dtype and device.

    Raises
    ------
    TypeError
        Not a float32 tensor, or a subclass of Tensor whose memory is not its own.
    RuntimeError
        A sparse or complex tensor, a lazily negated view, one without memory, or not on the CPU.
    ValueError
        Another shape than the parameter's.
    """
    if type(tensor) not in _KNOWN_TYPES:
        raise TypeError(
            f"{what} is a {type(tensor).__name__}; only a plain torch.Tensor or Parameter has "
            "memory that a kernel may write to"
        )
    assert isinstance(tensor, Tensor)
    if tensor.layout != torch.strided:
        raise RuntimeError(
            f"{what} is sparse ({tensor.layout}), which layer-wise optimizers do not support; "
            "make it dense, e.g. nn.Embedding(sparse=False)"
        )
    if tensor.is_complex():
        raise RuntimeError(
            f"{what} is complex ({tensor.dtype}), which is not supported; "
            "optimize torch.view_as_real of it"
        )
    if tensor.device.type != "cpu":
        raise RuntimeError(
            f"{what} is on {tensor.device}, but this version has kernels for the CPU alone; "
            "move it with .cpu()"
        )
    if tensor.is_neg():
        raise RuntimeError(
            f"{what} is a lazily negated view (of a conjugate's imaginary part, say), whose memory "
            "holds other values; pass its .resolve_neg()"
        )
    if tensor.dtype != torch.float32:
        raise TypeError(f"{what} has dtype {tensor.dtype}, but only torch.float32 is supported")
    if tensor.data_ptr() == 0 and tensor.numel() > 0:
        raise RuntimeError(
            f"{what} has no memory (its storage was freed, or it is a lazy zero); pass its .clone()"
        )
    if param is not None and tensor.shape != param.shape:
        raise ValueError(
            f"{what} has shape {tuple(tensor.shape)}, but its parameter has {tuple(param.shape)}"
        )
    return tensor


def check_step(step: object, what: str) -> Tensor:
    """Refuse a step counter that is not one float32 element on the CPU."""
    counter = check_tensor(step, what)
    if counter.numel() != 1:
        raise ValueError(
            f"{what} has shape {tuple(counter.shape)}, but a step counter is one element"
        )
    return counter


def layout(tensor: Tensor) -> tuple[tuple[int, int], ...]:
    """(size, stride) of the dimensions that matter: equal layouts address equal elements alike."""
    return tuple(
        (size, stride)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        if size != 1
    )


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gap or overlap, in any order of dimensions."""
    expected = 1
    for size, stride in sorted(layout(tensor), key=lambda x: x[1]):
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two indices may address one element (an expanded tensor, say)."""
    if tensor.numel() == 0:
        return False
    reach = 0
    for size, stride in sorted(layout(tensor), key=lambda x: x[1]):
        if stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def _addresses(tensor: Tensor) -> NDArray[np.int64]:
    """The addresses of all elements, in bytes."""
    addresses = np.array([tensor.data_ptr()], dtype=np.int64)
    for size, stride in layout(tensor):
        steps = np.arange(size, dtype=np.int64) * stride * tensor.element_size()
        addresses = (addresses[:, None] + steps).reshape(-1)
    return addresses


def check_disjoint(
    written: Iterable[tuple[str, Tensor]], read: Iterable[tuple[str, Tensor]]
) -> None:
    """Refuse tensors to be written that share memory with each other or with what is read.

    Raises
    ------
    ValueError
        It names the two tensors.
    """
    spans = []
    for is_written, tensors in ((True, written), (False, read)):
        for what, tensor in tensors:
            if is_written and overlaps_itself(tensor):
                raise ValueError(
                    f"{what} overlaps itself: shape {tuple(tensor.shape)}, stride "
                    f"{tensor.stride()}; pass a tensor whose elements have memory of their own, "
                    "e.g. its .clone()"
                )
            if tensor.numel() > 0:
                reach = sum((size - 1) * stride for size, stride in layout(tensor)) + 1
                begin = tensor.data_ptr()
                end = begin + reach * tensor.element_size()
                spans.append((begin, end, is_written, what, tensor))
    spans.sort(key=lambda span: span[:2])
    open_spans: list[tuple[int, int, bool, str, Tensor]] = []
    for span in spans:
        open_spans = [other for other in open_spans if other[1] > span[0]]
        for other in open_spans:
            if (span[2] or other[2]) and _share_elements(span[4], other[4]):
                raise ValueError(
                    f"{other[3]} and {span[3]} overlap in memory: what is written to the one "
                    "changes the other; pass each element once"
                )
        open_spans.append(span)


def _share_elements(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors whose ranges of memory meet have an element in common.

    Interleaved columns have none; dense tensors do.
    """
    dense = is_dense(a) and is_dense(b)
    return dense or bool(np.intersect1d(_addresses(a), _addresses(b)).size)


def copy_elements(source: Tensor, target: Tensor) -> None:
    """Copy in this thread: torch's own copy would wait for ever for its pool in a forked child."""
    np.copyto(target.detach().numpy(), source.detach().numpy())


def new_state(param: Tensor, value: float, what: str) -> Tensor:
    """Make a state of a layer, filled in this thread as `copy_elements` copies.

    Parameters
    ----------
    param : Tensor
        The layer's parameter; the state has its shape and order of dimensions.
    value : float
        What the state starts from.
    what : str
        The parameter's name in errors.

    Raises
    ------
    TypeError, RuntimeError
        Where no kernel serves the parameter.
    """
    check_tensor(param, what)
    state = torch.empty_like(param, memory_format=torch.preserve_format, requires_grad=False)
    state.numpy().fill(value)
    return state


def dense_like(param: Tensor) -> Tensor:
    """The layout of a layer, on the meta device.

    It is the parameter's own order of dimensions where that is dense, else contiguous.
    """
    shape = param if is_dense(param) else torch.empty(param.shape, device="meta")
    return torch.empty_like(shape, device="meta", memory_format=torch.preserve_format)


class Call(NamedTuple):
    """What a step is asked for: its tensors, and complete groups with their options."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: States
    steps: Sequence[Tensor | None]
    groups: Sequence[Group]


def name_in(name_of: Callable[[int], str] | None, layer: int) -> str:
    """What errors call a layer."""
    return f"params[{layer}]" if name_of is None else name_of(layer)


def check_layers(
    rule: Rule, call: Call, name_of: Callable[[int], str] | None
) -> list[tuple[int, bool]]:
    """Check every tensor of a step before anything is written.

    Returns
    -------
    list of (int, bool)
        For each parameter, its group and whether the group excludes it from trust and weight decay.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        It names the tensor, shows what came and says what to do.
    """
    params, grads, states, steps, groups = call
    count = len(params)
    for what, sequence in (("grads", grads), ("steps", steps), *states.items()):
        if len(sequence) != count:
            raise ValueError(f"{what} has {len(sequence)} entries for {count} params")
    layers = _assign_groups(groups, count)
    written: list[tuple[str, Tensor]] = []
    read: list[tuple[str, Tensor]] = []
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        name = name_in(name_of, i)
        group = groups[layers[i][0]]
        written.append((name, check_tensor(param, name)))
        what = f"the gradient of {name}"
        read.append((what, check_tensor(grad, what, param)))
        step = steps[i]
        if step is not None:
            what = f"the step counter of {name}"
            written.append((what, check_step(step, what)))
        elif needs_step(rule, group):
            raise ValueError(f"{name} needs a step counter, but steps[{i}] is None")
        for key in rule.used(group):
            state = states[key][i] if key in states else None
            what = f"state {key!r} of {name}"
            if state is None:
                raise ValueError(f"{what} is missing; create it before the step")
            written.append((what, check_tensor(state, what, param)))
    check_disjoint(written, read)
    return layers


def _assign_groups(groups: Sequence[Group], count: int) -> list[tuple[int, bool]]:
    layers: list[tuple[int, bool] | None] = [None] * count
    for index, group in enumerate(groups):
        members = group["params"]
        excluded = group.get("exclude")
        if excluded is None:
            excluded = (False,) * len(members)
        if len(excluded) != len(members):
            raise ValueError(
                f"param group {index}: exclude has {len(excluded)} entries "
                f"for {len(members)} params"
            )
        for member, is_excluded in zip(members, excluded, strict=True):
            if not 0 <= member < count or layers[member] is not None:
                raise ValueError(
                    f"param group {index}: params[{member}] is out of range or in a group already"
                )
            layers[member] = (index, bool(is_excluded))
    placed = [layer for layer in layers if layer is not None]
    if len(placed) < count:
        raise ValueError(f"params[{layers.index(None)}] is in no group")
    return placed
