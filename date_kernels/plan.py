"""The plan of a step: which layers, cut into which items, under which rows of numbers.

It is built once and reused while it fits. A plan knows tensors; the engine that runs it
(``csrc/engine.h``) knows chunks, and a rule (``csrc/rules``) knows numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from . import native
from .items import build_items, check_order
from .layers import (
    CPU,
    Call,
    check_layers,
    copy_elements,
    dense_like,
    layout,
    name_in,
)
from .options import Group
from .reference import Telemetry
from .rules import (
    RULES,
    Rule,
    check_common,
    check_group,
    check_rate,
    is_measured,
    needs_step,
)
from .stepper import Request, Stepper
from .tables import layer_table, table_of_rows
from .watch import Watch, make_watch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from . import _native

CHUNK = 65_536
"""Elements a worker measures and updates at a time: 32 to 128 thousand are alike on a CPU, less
costs scheduling, more stalls at the end of each layer. A power-of-two number of leaves, so that no
leaf is cut."""


Options: TypeAlias = "list[tuple[Any, ...]]"
"""The values of each group's options, in the order of `Rule.keys`."""


@dataclass
class _Built:
    """A native engine and what goes with it, for the tensors and options it was built for."""

    engine: _native.Engine
    watch: Watch
    reports: NDArray[np.float64]
    copies: list[tuple[Tensor, Tensor]]  # (the user's tensor, the dense copy that kernels see)
    gradient_copies: list[tuple[int, Tensor]]  # (layer, its gradient in the parameter's layout)
    layer_options: list[tuple[int, bool]]  # the distinct (group, excluded) of layers
    clips: bool
    skip_nonfinite: bool
    rows: tuple[Options, NDArray[np.float64]] | None = None  # of these options


class Plan(Stepper):
    """One optimizer's step on the CPU, kept from step to step.

    It is rebuilt when a shape, a layout, the address of a parameter or a state, or the set of
    layers changes; gradients may move freely. A step that raises has changed nothing.

    Parameters
    ----------
    rule : str
        A family of `date_kernels.rules.RULES`.
    chunk : int
        Elements per item: a power of two, at least one leaf.
    order : callable, optional
        Permutes the item list: every order that `check_order` accepts gives the same bits.
    target : str, optional
        Instruction set; without it `date_kernels.native.find_target` chooses.

    Attributes
    ----------
    builds : int
        How often it was built.
    """

    def __init__(
        self,
        rule: str,
        *,
        chunk: int = CHUNK,
        order: Callable[[NDArray[np.int64]], NDArray[np.int64]] | None = None,
        target: str | None = None,
    ) -> None:
        self.rule = find_rule(rule)
        self.builds = 0
        self._chunk = chunk
        self._order = order
        self._native = native.module()
        self._target, _ = native.find_target(target)
        self._options: Options | None = None
        self._signature: tuple[Any, ...] | None = None
        self._built: _Built | None = None

    def take(self, request: Request) -> Telemetry:
        """Take one step in place; see `date_kernels.step`."""
        (params, grads, states, steps, groups), grad_scale, found_inf, name_of = request
        scale = check_scale(grad_scale)
        groups = [self.rule.complete(group) for group in groups]
        options = [self.rule.values(group) for group in groups]
        if options != self._options:
            rates_alone = differ_in_rates_alone(options, self._options)
            check_groups(self.rule, groups, rates_alone=rates_alone)
        call = Call(params, grads, states, steps, groups)
        built = self._fitting(call, found_inf is not None, name_of)
        self._options = options
        if found_inf is not None and float(found_inf) != 0:
            built.engine.skip()
            return _telemetry(built, scanned=False)
        gradients = built.watch.gradients
        if not gradients.all():  # an empty layer, or a gradient that has lost its memory
            check_layers(self.rule, call, name_of, CPU)
        try:
            built.engine.check_counters()
        except ValueError as error:
            layer = int(str(error))
            step = steps[layer]
            raise ValueError(
                f"the step counter of {name_in(name_of, layer)} is "
                f"{'gone' if step is None else step.item()}; it must count steps: 0, 1, 2, ..."
            ) from None
        if built.rows is None or built.rows[0] != options:
            _, fields, _ = self._native.FAMILIES[self.rule.name]
            built.rows = options, table_of_rows(self.rule, groups, built.layer_options, fields)
        for layer, copy in built.gradient_copies:
            copy_elements(grads[layer], copy)
            gradients[layer] = copy.data_ptr()
        for tensor, copy in built.copies:
            copy_elements(tensor, copy)
        built.engine.run(
            (gradients, built.rows[1]),
            torch.get_num_threads(),
            scale,
            float(groups[0]["max_grad_norm"]) if built.clips else math.inf,
            built.skip_nonfinite,
        )
        for tensor, copy in built.copies:
            copy_elements(copy, tensor)
        torch.autograd.graph.increment_version(built.watch.written)
        return _telemetry(built)

    def _fitting(
        self, call: Call, found_inf_given: bool, name_of: Callable[[int], str] | None
    ) -> _Built:
        """The plan of before where it still fits, else a new one."""
        signature = (structure_of(self.rule, call), found_inf_given)
        if self._built is None or signature != self._signature or not self._built.watch.fits(call):
            self._built = None  # a build that raises leaves no plan that seems to fit
            self._built = self._build(call, found_inf_given, name_of)
            self._signature = signature
        return self._built

    def _build(
        self, call: Call, found_inf_given: bool, name_of: Callable[[int], str] | None
    ) -> _Built:
        layers = check_layers(self.rule, call, name_of, CPU)
        params, grads, _, _, groups = call
        copies: list[tuple[Tensor, Tensor]] = []
        like = {id(param): dense_like(param) for param in params}

        def copy_of(tensor: Tensor, param: Tensor) -> Tensor:
            return torch.empty_like(like[id(param)], dtype=tensor.dtype, device=tensor.device)

        def visible(tensor: Tensor, param: Tensor) -> int:
            """The address that kernels see: the tensor's own, or a copy's in the layer's layout."""
            if layout(tensor) == layout(like[id(param)]):
                return tensor.data_ptr()
            copies.append((tensor, copy_of(tensor, param)))
            return copies[-1][1].data_ptr()

        table = layer_table(self.rule, call, layers, chunk=self._chunk, address=visible)
        gradient_copies = [
            (i, copy_of(grad, param))
            for i, (param, grad) in enumerate(zip(params, grads, strict=True))
            if layout(grad) != layout(like[id(param)])
        ]
        clips = bool(groups) and groups[0]["max_grad_norm"] is not None
        skips = bool(groups) and groups[0]["on_nonfinite"] == "skip"
        items = build_items(
            [param.numel() for param in params],
            [is_measured(groups[index], excluded) for index, excluded in layers],
            scan=clips or (skips and not found_inf_given),
            chunk=self._chunk,
        )
        if self._order is not None:
            built = items
            items = self._order(built)
            if sorted(map(tuple, items)) != sorted(map(tuple, built)):
                raise ValueError("an order may neither add nor drop items")
        check_order(items)
        family, _, _ = self._native.FAMILIES[self.rule.name]
        engine = self._native.Engine(family, self._target, table, items)
        self.builds += 1
        return _Built(
            engine=engine,
            watch=make_watch(call),
            reports=engine.reports,
            copies=copies,
            gradient_copies=gradient_copies,
            layer_options=list(dict.fromkeys(layers)),
            clips=clips,
            skip_nonfinite=found_inf_given or skips,
        )


def find_rule(name: str) -> Rule:
    """The family of that name.

    Raises
    ------
    ValueError
        Where there is none.
    """
    if name not in RULES:
        raise ValueError(f"rule {name!r} is unknown; there are {', '.join(RULES)}")
    return RULES[name]


def check_groups(rule: Rule, groups: Sequence[Group], *, rates_alone: bool = False) -> None:
    """Check each group, and that all agree where one decision serves the whole step.

    Parameters
    ----------
    rule : Rule
    groups : sequence of mapping
        Complete.
    rates_alone : bool
        Whether all but the learning rates has been checked before.

    Raises
    ------
    ValueError
        It names the group and the option.
    """
    for index, group in enumerate(groups):
        try:
            check_rate(group) if rates_alone else check_group(rule, group)
        except ValueError as error:
            raise ValueError(f"param group {index}: {error}") from None
    if not rates_alone:
        check_common(groups)


def differ_in_rates_alone(options: Options, before: Options | None) -> bool:
    """Whether the options of all groups, of which the learning rate is the first, are as before."""
    return before is not None and [each[1:] for each in options] == [each[1:] for each in before]


def check_scale(grad_scale: Tensor | float | None) -> float:
    """The gradients' scale as a number; 1 where there is none.

    Raises
    ------
    ValueError
        Where it is not a finite number above 0.
    """
    scale = 1.0 if grad_scale is None else float(grad_scale)
    if not 0 < scale < math.inf:
        raise ValueError(f"grad_scale must be a finite number above 0, not {scale}")
    return scale


def structure_of(rule: Rule, call: Call) -> list[tuple[Any, ...]]:
    """What of the groups decides a plan's tables, beside the tensors."""
    return [
        (
            group["params"],
            group.get("exclude"),
            is_measured(group, excluded=False),
            rule.used(group),
            needs_step(rule, group),
            group["master_weights"],
            group["state_dtype"],
            group["max_grad_norm"] is not None,
            group["on_nonfinite"],
        )
        for group in call.groups
    ]


def _telemetry(built: _Built, *, scanned: bool = True) -> Telemetry:
    report = dict(zip(native.module().REPORT_FIELDS, built.reports.T.copy(), strict=True))
    skipped = report.pop("skipped") != 0
    total_norm, clip = math.nan, 1.0
    if scanned and built.clips:
        total_norm, clip, _ = built.engine.verdict
    return Telemetry(**report, skipped=skipped, total_norm=total_norm, clip=clip)
