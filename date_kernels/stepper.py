"""What takes steps: one signature for users, one request for whoever takes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from .layers import Call, States
from .options import Group
from .reference import Telemetry


class Request(NamedTuple):
    """A step that is asked for; see `date_kernels.step`."""

    call: Call
    grad_scale: Tensor | float | None
    found_inf: Tensor | float | None
    name_of: Callable[[int], str] | None  # what errors call a layer


class Stepper(ABC):
    """Takes steps of one rule; keeps what it needs from one to the next."""

    def step(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: States,
        steps: Sequence[Tensor | None],
        groups: Sequence[Group],
        *,
        grad_scale: Tensor | float | None = None,
        found_inf: Tensor | float | None = None,
        name_of: Callable[[int], str] | None = None,
    ) -> Telemetry:
        """Take one step in place; see `date_kernels.step`."""
        call = Call(params, grads, states, steps, groups)
        return self.take(Request(call, grad_scale, found_inf, name_of))

    @abstractmethod
    def take(self, request: Request) -> Telemetry:
        """Take the step that is asked for."""
