"""Whether an optimizer still holds the layers of the step before, asked at every step.

The compiled module looks where it is there: in Python it takes several times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import Any, TypeAlias

from torch import Tensor

from . import native

Column: TypeAlias = "tuple[str, list[Tensor | None]]"
"""A key of a parameter's state, and what stands there for each layer."""

Collect: TypeAlias = """Callable[
    [
        list[list[Tensor]],
        list[Tensor],
        dict[Tensor, dict[str, Any]],
        list[dict[str, Any]],
        list[dict[str, Any]],
        list[Column],
    ],
    list[Tensor] | None,
]"""

_GRADIENT = attrgetter("grad")


def make_collect() -> Collect:
    """Return `collect` or its compiled twin."""
    if native.why_missing is not None:
        return collect
    compiled: Collect = native.module().collect
    return compiled


def collect(
    members: list[list[Tensor]],
    params: list[Tensor],
    state: dict[Tensor, dict[str, Any]],
    states: list[dict[str, Any]],
    saved: list[dict[str, Any]],
    columns: list[Column],
) -> list[Tensor] | None:
    """Take up the gradients and the states of layers that are as they were.

    Parameters
    ----------
    members : list of list of Tensor
        The parameters of each param group.
    params : list of Tensor
        The layers as they were.
    state : dict
        An optimizer's; `states` are the values that it had.
    saved : list of dict
        Each layer's dict among `states`.
    columns : list of (str, list of (Tensor or None))
        What each layer's dict held under a key. Tensors that have taken another's place are put in.

    Returns
    -------
    list of Tensor or None
        The layers' gradients; None where a layer, its dict, a gradient or a state has come or gone.
    """
    if not same_objects([*chain.from_iterable(members)], params):
        return None
    if not same_objects([*state.values()], states):
        return None
    grads = [*map(_GRADIENT, params)]
    if any(map(is_, grads, repeat(None))):
        return None
    for key, column in columns:
        now = [of_layer.get(key) for of_layer in saved]
        if not same_objects(now, column):
            if [x is None for x in now] != [x is None for x in column]:
                return None
            column[:] = now
    return grads


def same_objects(a: Sequence[object], b: Sequence[object]) -> bool:
    """Whether they hold the same objects; equality would compare elements."""
    return len(a) == len(b) and all(map(is_, a, b))
