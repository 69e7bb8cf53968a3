"""What torch.compile sees of a step: one operator, which changes parameters, states and counters.

Note [Traced steps]. Dynamo runs `LayerwiseOptimizer._init_group` while it traces, as it does for
torch's own optimizers, and so states exist before the graph runs. The operator gets every tensor
that it reads or writes from the graph, which may hand it copies; the options, which guards hold to
what they were, it reads in the optimizer itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .optimizer import LayerwiseOptimizer

_OPTIMIZERS: WeakValueDictionary[int, LayerwiseOptimizer] = WeakValueDictionary()


def handle_of(optimizer: LayerwiseOptimizer) -> int:
    """A number by which the operator finds an optimizer as long as that lives."""
    _OPTIMIZERS[id(optimizer)] = optimizer
    return id(optimizer)


@torch.library.custom_op("date_optim::step", mutates_args=("params", "states", "steps"))
def take_step(
    handle: int,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    steps: list[Tensor],
    rates: list[Tensor],
    members: list[int],
    counts: list[int],
) -> None:
    """Take one step of an optimizer: Note [Traced steps].

    Parameters
    ----------
    handle : int
        See `handle_of`.
    params, grads : list of Tensor
        The layers that have a gradient, group by group.
    states, steps : list of Tensor
        Layer by layer those that it has, in the rule's order, and its counter.
    rates : list of Tensor
        The learning rates of the groups whose rate is a tensor.
    members, counts : list of int
        Each layer's place in its param group, and how many layers each group has.
    """
    _OPTIMIZERS[handle].take_traced(params, grads, states, steps, rates, members, counts)


@take_step.register_fake
def _(*arguments: object) -> None:
    """Nothing comes out of it."""
