"""Both ways to take up the layers of the step before: the compiled module's, and Python's."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from date_kernels import native
from date_kernels.collect import Collect, collect, make_collect

COLLECTS = pytest.mark.parametrize("collecting", [native.module().collect, collect])


class Layers:
    """Three layers in two groups; the last has no state, no layer a second one."""

    def __init__(self) -> None:
        self.params = [torch.nn.Parameter(torch.ones(n)) for n in (1, 2, 3)]
        for param in self.params:
            param.grad = torch.ones_like(param)
        self.members = [self.params[:2], self.params[2:]]
        self.state: dict[Any, Any] = defaultdict(dict)
        for param in self.params[:2]:
            self.state[param] = {"exp_avg": torch.ones_like(param), "other": 1}
        self.states: list[Any] = [*self.state.values()]
        self.saved: list[Any] = [*self.states, {}]
        self.column = [*(values["exp_avg"] for values in self.states), None]
        self.columns = [("exp_avg", self.column)]

    def arguments(self) -> tuple[Any, ...]:
        return self.members, self.params, self.state, self.states, self.saved, self.columns


def test_the_compiled_module_collects_where_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_collect() is native.module().collect
    monkeypatch.setattr(native, "why_missing", "not built")
    assert make_collect() is collect


@COLLECTS
def test_gradients_come_in_the_order_of_the_layers(collecting: Collect) -> None:
    layers = Layers()
    grads = collecting(*layers.arguments())
    assert grads is not None
    assert [*map(id, grads)] == [id(param.grad) for param in layers.params]
    assert collecting([], [], {}, [], [], []) == []


@COLLECTS
def test_states_in_the_place_of_others_are_taken_up(collecting: Collect) -> None:
    layers = Layers()
    new = layers.states[1]["exp_avg"] = torch.zeros(2)
    column = [layers.column[0], new, None]
    assert collecting(*layers.arguments()) is not None
    assert [*map(id, layers.column)] == [*map(id, column)]


@COLLECTS
def test_nothing_is_kept_or_lost(collecting: Collect) -> None:
    """References are counted by hand in C++."""
    layers = Layers()
    old = weakref.ref(layers.column[1])
    layers.states[1]["exp_avg"] = torch.zeros(2)
    for _ in range(100):
        collecting(*layers.arguments())
    assert old() is None
    gradients = [weakref.ref(param.grad) for param in layers.params]
    for param in layers.params:
        param.grad = None
    assert [ref() for ref in gradients] == [None] * 3
    for param in layers.params:
        param.grad = torch.ones_like(param)
    new = weakref.ref(layers.states[1].pop("exp_avg"))
    assert collecting(*layers.arguments()) is None
    layers.column.clear()
    assert new() is None


def changes() -> dict[str, Callable[[Layers], Any]]:
    another = torch.nn.Parameter(torch.ones(2))
    return {
        "a-member-more": lambda x: x.members[1].append(another),
        "a-member-fewer": lambda x: x.members[1].pop(),
        "another-member": lambda x: x.members[0].__setitem__(1, another),
        "members-in-another-order": lambda x: x.members[0].reverse(),
        "a-group-more": lambda x: x.members.append([another]),
        "a-gradient-gone": lambda x: setattr(x.params[2], "grad", None),
        "a-dict-more": lambda x: x.state.update({x.params[2]: {}}),
        "a-dict-fewer": lambda x: x.state.pop(x.params[1]),
        "another-dict": lambda x: x.state.update({x.params[0]: dict(x.states[0])}),
        "a-state-gone": lambda x: x.states[0].pop("exp_avg"),
        "a-state-none": lambda x: x.states[0].update(exp_avg=None),
        "a-state-new": lambda x: x.saved[2].update(exp_avg=torch.ones(3)),
    }


@COLLECTS
@pytest.mark.parametrize("change", changes().values(), ids=changes())
def test_what_has_come_or_gone(collecting: Collect, change: Callable[[Layers], Any]) -> None:
    layers = Layers()
    layers.members = [*map(list, layers.members)]
    assert collecting(*layers.arguments()) is not None
    change(layers)
    assert collecting(*layers.arguments()) is None


@COLLECTS
def test_what_other_keys_hold_does_not_matter(collecting: Collect) -> None:
    layers = Layers()
    layers.states[0].update(other=2)
    assert collecting(*layers.arguments()) is not None


class Broken(torch.nn.Parameter):
    @property
    def grad(self) -> Any:  # type: ignore[override]
        raise KeyError("broken")


@COLLECTS
def test_an_error_on_the_way_comes_through(collecting: Collect) -> None:
    layers = Layers()
    layers.params[1] = layers.members[0][1] = Broken(torch.ones(2))
    with pytest.raises(KeyError, match="broken"):
        collecting(*layers.arguments())
