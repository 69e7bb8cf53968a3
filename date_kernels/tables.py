"""What kernels read of a plan: a row for each layer, and one for each of the layers' options."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .items import LEAF
from .layers import HALF, MASTER, Call, state_dtype, states_of
from .options import Group
from .rules import Rule, row_of

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""In the order of ``csrc/plan.h``."""

MOST_STATES = 3

SIZE = 3 + MOST_STATES
"""The column of a layer's elements."""


def layer_table(
    rule: Rule,
    call: Call,
    of_layer: Sequence[tuple[int, bool]],
    *,
    chunk: int,
    order: Sequence[int] | None = None,
    address: Callable[[Tensor, Tensor], int] = lambda tensor, param: tensor.data_ptr(),
) -> NDArray[np.int64]:
    """The layers as ``csrc/plan.h`` has them.

    Parameters
    ----------
    rule : Rule
    call : Call
    of_layer : sequence of (int, bool)
        Each layer's group, and whether that excludes it.
    chunk : int
        Elements of an item.
    order : sequence of int, optional
        The layers in the order of the table; without it the call's own.
    address : callable
        Where kernels find a tensor of a parameter's layer.

    Returns
    -------
    ndarray of int64, shape (layers, 13)
        weights, rounded, states, step, size, slot, measures, options, and the types of the
        gradient, the parameter and the states.
    """
    params, grads, states, steps, groups = call
    layer_options = list(dict.fromkeys(of_layer))
    table = np.zeros((len(params), 10 + MOST_STATES), dtype=np.int64)
    slot = 0
    for row, i in zip(table, range(len(params)) if order is None else order, strict=True):
        param, step, size = params[i], steps[i], params[i].numel()
        group = groups[of_layer[i][0]]
        used = states_of(rule, group, param)
        weights = rounded = address(param, param)
        if param.dtype not in HALF:
            rounded = 0
        else:
            master = states[MASTER][i] if MASTER in used else None
            weights = 0 if master is None else address(master, param)
        row[:2] = weights, rounded
        for at, key in enumerate(rule.states):
            state = states[key][i] if key in used else None
            row[2 + at] = 0 if state is None else address(state, param)
        row[2 + MOST_STATES :] = (
            0 if step is None else step.data_ptr(),
            size,
            slot,
            -(-size // chunk),
            layer_options.index(of_layer[i]),
            TYPES.index(grads[i].dtype),
            TYPES.index(param.dtype),
            TYPES.index(state_dtype(group, param)),
        )
        slot += -(-size // LEAF)
    return table


def table_of_rows(
    rule: Rule,
    groups: Sequence[Group],
    layer_options: Sequence[tuple[int, bool]],
    fields: Sequence[str],
) -> NDArray[np.float64]:
    """The rows of hyper-parameters of distinct (group, excluded), in a kernel's order of fields."""
    table = np.empty((len(layer_options), len(fields)))
    for numbers, (number, excluded) in zip(table, layer_options, strict=True):
        row = row_of(rule, groups[number], excluded)
        numbers[:] = [row[field] for field in fields]
        numbers.view(np.int64)[fields.index("lr_address")] = row["lr_address"]
    return table
