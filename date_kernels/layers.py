"""What may be a layer: the checks on its tensors, and how their memory is laid out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .options import Group
from .rules import RULES, Rule, needs_step

States: TypeAlias = Mapping[str, Sequence[Tensor | None]]
"""By torch's key, a tensor for each layer that uses it."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""What parameters may hold."""

HALF = (torch.bfloat16, torch.float16)
"""What is rounded from the float32 of its arithmetic."""

MOST_STEPS = 1 << 24
"""A float32 counts no further (``csrc/cpu/launch.cpp``)."""

MASTER = "master"
"""The key of a state that any rule may have: the float32 weights that a parameter rounds."""

CPU = torch.device("cpu")

_KNOWN_TYPES = (Tensor, torch.nn.Parameter)


def arithmetic(param: Tensor) -> torch.dtype:
    """The dtype of a layer's arithmetic: float64 for float64, else float32."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def state_dtype(group: Group, param: Tensor, key: str = "") -> torch.dtype:
    """The dtype of a layer's state: its arithmetic's, or what the group's ``state_dtype`` says.

    Master weights are never narrower than the arithmetic.
    """
    asked: torch.dtype | None = group["state_dtype"]
    return arithmetic(param) if asked is None or key == MASTER else asked


def check_state_dtype(rule: Rule, group: Group, param: Tensor, name: str) -> None:
    """Refuse a ``state_dtype`` that no kernel keeps a parameter's states in, or that loses them.

    A float16 square of what is below 2e-4 is 0, and of what is beyond 255 infinite: a step would
    divide by the one and stand still by the other.

    Raises
    ------
    ValueError
        It names the parameter, and what there is.
    """
    asked = group["state_dtype"]
    if asked is not None and asked not in (arithmetic(param), param.dtype):
        have = f"{arithmetic(param)}, the dtype of its arithmetic"
        have += f", or {param.dtype}, its own" if param.dtype in HALF else ""
        raise ValueError(
            f"Invalid state_dtype value: {asked!r}; {name} is {param.dtype}, whose states are kept "
            f"in {have}: give its param group that, or None"
        )
    squares = [key for key in rule.used(group) if key in rule.squares]
    if asked == torch.float16 and squares:
        raise ValueError(
            f"Invalid state_dtype value: {asked!r}; {name} has {squares[0]!r}, and squares leave "
            "float16's range: take None, or bfloat16 parameters and states"
        )


def has_master(group: Group, param: Tensor) -> bool:
    """Whether a layer keeps master weights: its group wants them and it is of 16 bits."""
    return group["master_weights"] and param.dtype in HALF


def states_of(rule: Rule, group: Group, param: Tensor) -> tuple[str, ...]:
    """The states of a layer: those of its rule's options, and its master weights."""
    return (*rule.used(group), MASTER) if has_master(group, param) else rule.used(group)


def check_tensor(
    tensor: object,
    what: str,
    device: torch.device | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> Tensor:
    """Refuse what no kernel here can serve.

    Parameters
    ----------
    tensor : object
    what : str
        Its name in errors.
    device : torch.device, optional
        Where the step takes place; without it, wherever there are kernels.
    dtypes : sequence of torch.dtype
        What it may hold.

    Raises
    ------
    TypeError
        Another dtype, or a subclass of Tensor whose memory is not its own.
    RuntimeError
        A sparse or complex tensor, a lazily negated view, one without memory, or on another device.
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
    if device is None and tensor.device.type not in ("cpu", "cuda"):
        raise RuntimeError(
            f"{what} is on {tensor.device}, but there are kernels for cpu and cuda alone; "
            "move it there, e.g. with .to_empty(device='cpu') if it is meta"
        )
    if device is not None and tensor.device != device:
        raise RuntimeError(
            f"{what} is on {tensor.device}, but this step takes place on {device}; "
            f"move it with .to('{device}'), or give each device an optimizer of its own"
        )
    if tensor.is_neg():
        raise RuntimeError(
            f"{what} is a lazily negated view (of a conjugate's imaginary part, say), whose memory "
            "holds other values; pass its .resolve_neg()"
        )
    if tensor.dtype not in dtypes:
        raise TypeError(
            f"{what} has dtype {tensor.dtype}, but it must be {' or '.join(map(str, dtypes))}"
        )
    if tensor.data_ptr() == 0 and tensor.numel() > 0:
        raise RuntimeError(
            f"{what} has no memory (its storage was freed, or it is a lazy zero); pass its .clone()"
        )
    return tensor


def check_shape(tensor: Tensor, what: str, param: Tensor) -> Tensor:
    """Refuse a gradient or a state of another shape than its parameter's."""
    if tensor.shape != param.shape:
        raise ValueError(
            f"{what} has shape {tuple(tensor.shape)}, but its parameter has {tuple(param.shape)}"
        )
    return tensor


def check_gradient(grad: object, what: str, param: Tensor) -> Tensor:
    """Refuse a gradient that no kernel takes for its parameter.

    It has the parameter's dtype, or the float32 of its arithmetic.
    """
    dtypes = tuple(dict.fromkeys((param.dtype, arithmetic(param))))
    return check_shape(check_tensor(grad, what, param.device, dtypes), what, param)


def check_state(state: object, what: str, param: Tensor, dtype: torch.dtype) -> Tensor:
    """Refuse a state of another shape than its parameter's, or of another dtype."""
    checked = check_tensor(state, what, param.device, (dtype,))
    return check_shape(checked, what, param)


def check_step(step: object, what: str, device: torch.device) -> Tensor:
    """Refuse a step counter that is not one float32 element on the step's device."""
    counter = check_tensor(step, what, device, (torch.float32,))
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
    """Copy between tensors of one dtype in this thread.

    torch's own copy would wait for ever for its pool in a forked child.
    """
    np.copyto(_bits(target), _bits(source))


def _bits(tensor: Tensor) -> NDArray[Any]:
    """The tensor's memory; bfloat16, which NumPy does not know, as int16."""
    known = tensor.detach()
    return (known.view(torch.int16) if known.dtype == torch.bfloat16 else known).numpy()


def widened(tensor: Tensor) -> NDArray[np.float64]:
    """A copy of the values in float64, made in this thread as `copy_elements` does."""
    if tensor.dtype == torch.bfloat16:  # the upper half of a float32
        upper = np.asarray(_bits(tensor).astype(np.uint32) << 16)  # an array also of no dimensions
        return upper.view(np.float32).astype(np.float64)
    return _bits(tensor).astype(np.float64)


def assign(tensor: Tensor, values: NDArray[np.float64]) -> None:
    """Round values into a tensor, in this thread; into 16 bits by way of a step's float32."""
    target = _bits(tensor)
    with np.errstate(over="ignore"):  # what is too large becomes infinite, as in any step
        if tensor.dtype not in HALF:
            np.copyto(target, values, casting="same_kind")
        elif tensor.dtype == torch.float16:
            np.copyto(target, values.astype(np.float32), casting="same_kind")
        else:
            bits = np.asarray(values.astype(np.float32)).view(np.uint32)
            nearest = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16  # ties to even
            nearest = np.where(np.isnan(values), np.uint32(0x7FC0), nearest)
            np.copyto(target, nearest.astype(np.uint16).view(np.int16))


def new_state(rule: Rule, group: Group, param: Tensor, key: str, what: str) -> Tensor:
    """Make a state of a layer, filled in this thread as `copy_elements` copies.

    Parameters
    ----------
    rule : Rule
    group : mapping
        The layer's options, complete.
    param : Tensor
        The layer's parameter; the state has its shape and order of dimensions.
    key : str
        One of the rule's states, which starts from its option, or `MASTER`, a copy of the weights.
    what : str
        The parameter's name in errors.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        Where no kernel serves the parameter, or keeps its states in the group's ``state_dtype``.
    """
    check_tensor(param, what)
    check_state_dtype(rule, group, param, what)
    start = None if key == MASTER else rule.start(key, group)
    state = torch.empty_like(
        param,
        dtype=state_dtype(group, param, key),
        memory_format=torch.preserve_format,
        requires_grad=False,
    )
    if param.device != CPU:
        return state.copy_(param.detach()) if start is None else state.fill_(start)
    if start is None:
        assign(state, widened(param))
    else:
        first = torch.empty((), dtype=state.dtype)
        assign(first, np.asarray(start))
        copy_elements(first, state)
    return state


_STATES_OF_TORCHS_OTHERS = {
    *("mu_product", "exp_inf", "prev", "step_size", "ax", "eta", "mu"),
    *("row_var", "col_var", "variance"),
}
"""Of torch.optim's rules that are not among ours: NAdam, Adamax, Rprop, ASGD, Adafactor."""


def check_saved_state(
    rule: Rule, group: Group, param: Tensor, saved: Mapping[str, Any], *, of_torch: bool
) -> None:
    """Refuse a checkpoint's state of a parameter that these options do not make.

    Parameters
    ----------
    rule : Rule
    group : mapping
        The options that it would be used with.
    param : Tensor
    saved : mapping
        By key; None counts as missing, and a parameter that took no step has nothing. States that
        the rule has and the options do not use are welcome, and so is what no rule knows: a wrapper
        of the optimizer keeps it there, as Lookahead does its slow weights.
    of_torch : bool
        Whether torch's twin saved it: what only the options here need is not in it.

    Raises
    ------
    ValueError
        It names the keys that are missing or another rule's, or the state of another shape or kind.
    """
    saved = {key: value for key, value in saved.items() if value is not None}
    if not saved:
        return  # it has not taken a step
    own = {*rule.states, MASTER, "step"}
    others = {key for each in RULES.values() for key in each.states} | _STATES_OF_TORCHS_OTHERS
    extra = saved.keys() & others - own
    saved = {key: value for key, value in saved.items() if key in own}
    if extra:
        raise ValueError(
            f"it holds {', '.join(map(repr, sorted(extra)))}, which rule {rule.name!r} does not "
            "have; load it into the optimizer that saved it"
        )
    if MASTER in saved and param.dtype not in HALF:
        raise ValueError(
            f"it holds '{MASTER}', but a parameter of {param.dtype} is its own; load it with the "
            "parameter in the dtype that it was saved with, or leave it out"
        )
    needed = rule.used(group) if of_torch else states_of(rule, group, param)
    if (
        (rule.torch_saves_step and rule.counts_steps(group))
        if of_torch
        else needs_step(rule, group)
    ):
        needed = (*needed, "step")
    missing = [key for key in needed if key not in saved]
    if missing:
        raise ValueError(
            f"it lacks {', '.join(map(repr, missing))}, which these options need; load it with the "
            "options that it was saved with, or leave this parameter's state out to start it anew"
        )
    for key, value in saved.items():
        if key != "step":
            if not isinstance(value, Tensor):
                raise ValueError(f"{key!r} is a {type(value).__name__}, not a tensor")
            if not value.dtype.is_floating_point or value.layout != torch.strided or value.is_meta:
                raise ValueError(
                    f"{key!r} is {value.dtype}, {value.layout}, on {value.device}; a state is "
                    "dense floating-point numbers"
                )
            if key == MASTER and value.dtype in HALF:
                raise ValueError(
                    f"'{MASTER}' is {value.dtype}: it was rounded on its way and may be older; "
                    "leave it out, and the parameter's own values start a new one"
                )
            check_shape(value, repr(key), param)
        elif isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"'step' has shape {tuple(value.shape)}, but is one number")
    if of_torch and group["momentum_scaling"] != "outside" and "momentum_buffer" in saved:
        raise ValueError(
            f"its 'momentum_buffer' holds gradients as torch scales them, but "
            f"momentum_scaling={group['momentum_scaling']!r} has the rate or the ratio in it; "
            "leave the buffer out to start it anew, or use 'outside'"
        )


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
    rule: Rule, call: Call, name_of: Callable[[int], str] | None, device: torch.device
) -> list[tuple[int, bool]]:
    """Check every tensor of a step on `device` before anything is written.

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
        written.append((name, check_tensor(param, name, device)))
        check_state_dtype(rule, group, param, name)
        what = f"the gradient of {name}"
        read.append((what, check_gradient(grad, what, param)))
        step = steps[i]
        if step is not None:
            what = f"the step counter of {name}"
            written.append((what, check_step(step, what, device)))
        elif needs_step(rule, group):
            raise ValueError(f"{name} needs a step counter, but steps[{i}] is None")
        for key in states_of(rule, group, param):
            state = states[key][i] if key in states else None
            what = f"state {key!r} of {name}"
            if state is None:
                raise ValueError(f"{what} is missing; create it before the step")
            dtype = state_dtype(group, param, key)
            written.append((what, check_state(state, what, param, dtype)))
    check_disjoint(written, read)
    return layers


def check_layout(rule: Rule, call: Call, name_of: Callable[[int], str] | None) -> None:
    """Refuse layers whose elements do not lie densely, in one order, in all of their tensors.

    Raises
    ------
    RuntimeError
        It names the tensor and says how to lay it out.
    """
    params, grads, states, _, _ = call
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        name = name_in(name_of, i)
        if not is_dense(param):
            raise RuntimeError(
                f"{name} has gaps or overlaps in memory: shape {tuple(param.shape)}, stride "
                f"{param.stride()}; kernels on {param.device} need it dense, e.g. its .contiguous()"
            )
        named: list[tuple[str, Tensor | None]] = [(f"the gradient of {name}", grad)]
        named += [(f"state {key!r} of {name}", column[i]) for key, column in states.items()]
        for what, tensor in named:
            if tensor is not None and layout(tensor) != layout(param):
                raise RuntimeError(
                    f"{what} has stride {tensor.stride()}, but its parameter has "
                    f"{param.stride()}; kernels on {param.device} need one layout: copy it into a "
                    "torch.empty_like of the parameter"
                )


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
