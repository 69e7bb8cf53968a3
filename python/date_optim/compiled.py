"""What torch.compile sees of a step: one operator, which changes parameters, states and counters.

Note [Traced steps]. Dynamo runs `LayerwiseOptimizer._init_group` while it traces, as it does for
torch's own optimizers, and so states exist before the graph runs. The operator gets every tensor
that it reads or writes from the graph, which may hand it copies; the options it reads in the
optimizer itself, since a graph that does not read a number is not made anew when that changes. What
options decide which states there are is traced, and so a graph is never run with others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from date_kernels.rules import Rule, needs_step

if TYPE_CHECKING:
    from .optimizer import LayerwiseOptimizer

_OPTIMIZERS: WeakValueDictionary[int, LayerwiseOptimizer] = WeakValueDictionary()


def handle_of(optimizer: LayerwiseOptimizer) -> int:
    """A number by which the operator finds an optimizer as long as that lives."""
    _OPTIMIZERS[id(optimizer)] = optimizer
    return id(optimizer)


def kind_of(rule: Rule, groups: list[dict[str, Any]]) -> str:
    """What of the param groups' options decides which states their layers have."""
    # Branches, which Dynamo guards, where it would carry a number along.
    kinds = [
        (
            *rule.used(group),
            "step" if needs_step(rule, group) else "",
            "masters" if group["master_weights"] else "",
        )
        for group in groups
    ]
    return ";".join([",".join(kind) for kind in kinds])


@torch.library.custom_op("date_optim::step", mutates_args=("params", "grads", "states", "steps"))
def take_step(
    handle: int,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    steps: list[Tensor],
    rates: list[Tensor],
    members: list[int],
    counts: list[int],
    kind: str,
) -> None:
    """Take one step of an optimizer: Note [Traced steps].

    Parameters
    ----------
    handle : int
        See `handle_of`.
    params, grads : list of Tensor
        The layers that have a gradient, group by group. Gradients change where a GradScaler leaves
        unscaling to the step.
    states, steps : list of Tensor
        Layer by layer those that it has, in the rule's order, and its counter.
    rates : list of Tensor
        The learning rates of the groups whose rate is a tensor.
    members, counts : list of int
        Each layer's place in its param group, and how many layers each group has.
    kind : str
        See `kind_of`.
    """
    _OPTIMIZERS[handle].take_traced(params, grads, states, steps, rates, members, counts, kind)


@take_step.register_fake
def _(*arguments: object) -> None:
    """Nothing comes out of it."""
