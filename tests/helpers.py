"""What several tests share: calls of the kernels, the judge of a step, and snapshots of bits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from date_kernels import MASTER, RULES, Telemetry, native, new_state, reference
from date_kernels.dispatch import AutomaticStepper
from date_kernels.layers import HALF, states_of, widened
from date_kernels.plan import Plan
from date_kernels.rules import needs_step
from date_kernels.testing import assert_close, norm_tolerance, storage_error, tolerance
from date_optim.optimizer import LayerwiseOptimizer

Options = dict[str, Any]

TARGETS = [name for name, supported in native.module().targets() if supported]
"""The instruction sets that this machine can run."""

TF1: Options = dict(RULES["rmsprop"].variants["tf1"])
DECAY: Options = {"weight_decay": 0.03}

SQUARES = {key for rule in RULES.values() for key in rule.squares}
"""States that are never negative."""

DTYPES = (
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
)
"""Every pair of a parameter's and its gradient's dtype."""

TRUST: Options = {"trust": True, "trust_coefficient": 0.5, "trust_lower": 0.2, "trust_upper": 2.0}


class Steps(Protocol):
    """What takes a step: `date_kernels.Stepper`, or `date_kernels.step` with its rule given."""

    def __call__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Mapping[str, Sequence[Tensor | None]],
        steps: Sequence[Tensor | None],
        groups: Sequence[Mapping[str, Any]],
        *,
        grad_scale: Tensor | float | None = None,
        found_inf: Tensor | float | None = None,
    ) -> Telemetry: ...


@dataclass
class Call:
    """The arguments of one step."""

    rule: str
    params: list[Tensor]
    grads: list[Tensor]
    states: dict[str, list[Tensor | None]]
    steps: list[Tensor | None]
    groups: list[Options]

    def copy(self) -> Call:
        """Return a copy whose tensors are its own."""
        return Call(
            self.rule,
            [tensor.detach().clone() for tensor in self.params],
            [tensor.clone() for tensor in self.grads],
            {key: _clones(column) for key, column in self.states.items()},
            _clones(self.steps),
            [dict(group) for group in self.groups],
        )

    def written(self) -> list[Tensor]:
        """Return all that a step may write: parameters, states, step counters."""
        every = [*self.params, *self.steps, *(x for column in self.states.values() for x in column)]
        return [tensor for tensor in every if tensor is not None]

    def layer(self, i: int) -> list[Tensor]:
        """Return what a step may write of one layer."""
        every = [self.params[i], self.steps[i], *(column[i] for column in self.states.values())]
        return [tensor for tensor in every if tensor is not None]

    def take(self, step: Steps, **kwargs: Any) -> Telemetry:
        """Take the step; the gradients must come out of it as they went in."""
        with unchanged(self.grads):
            return step(self.params, self.grads, self.states, self.steps, self.groups, **kwargs)


def _clones(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.clone() for tensor in tensors]


def random_tensors(
    shapes: Iterable[int | tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Return standard normal tensors: the same float32 numbers, rounded where `dtype` is less."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def make_call(
    rule: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    *groups: Options,
    taken: int | None = None,
) -> Call:
    """Make a step's arguments, with the states that the options use.

    Parameters
    ----------
    taken : int, optional
        Steps taken so far; where given, the states are random, as in the middle of a run.
    """
    options: list[Options] = [{"lr": 0.05, **group} for group in groups]
    if len(options) == 1:
        options[0].setdefault("params", list(range(len(params))))
    of = {i: RULES[rule].complete(group) for group in options for i in group["params"]}
    generator = torch.Generator().manual_seed(len(params) + (taken or 0))

    def state(key: str, i: int) -> Tensor | None:
        if key not in states_of(RULES[rule], of[i], params[i]):
            return None
        tensor = new_state(RULES[rule], of[i], params[i], key, f"params[{i}]")
        if taken is not None:
            noise = torch.randn(params[i].shape, generator=generator)
            if key == MASTER:  # within what the parameter's rounding lost
                tensor *= 1 + noise.clamp(-1, 1) * torch.finfo(params[i].dtype).eps / 4
            else:
                # A square's average is above the average's square, which is below 0.25 * noise^2.
                tensor.copy_(1 + noise.square() if key in SQUARES else noise / 2)
        return tensor

    return Call(
        rule,
        list(params),
        list(grads),
        {key: [state(key, i) for i in range(len(params))] for key in (*RULES[rule].states, MASTER)},
        [torch.tensor(float(taken or 0)) for _ in params],
        options,
    )


def float64(call: Call) -> tuple[Any, ...]:
    """Return the call as the reference takes it: params, grads, states, steps, groups."""

    def arrays(tensors: Sequence[Tensor | None]) -> list[Any]:
        return [None if tensor is None else widened(tensor) for tensor in tensors]

    return (
        arrays(call.params),
        arrays(call.grads),
        {key: arrays(column) for key, column in call.states.items()},
        arrays(call.steps),
        [RULES[call.rule].complete(group) for group in call.groups],
    )


def judge(
    before: Call, after: Call, telemetry: Telemetry, *, grad_scale: float | None = None
) -> None:
    """Hold a step in which no layer was skipped to the float64 reference.

    Norms and ratios to 1e-6 relative; then weights and states, given the step's own ratio and clip
    factor, to `date_kernels.testing.tolerance`.
    """
    params, grads, states, steps, groups = float64(before)
    gradients, total_norm, clip = reference.prepare(grads, groups, grad_scale=grad_scale)
    np.testing.assert_allclose(telemetry.total_norm, total_norm, rtol=1e-6)
    np.testing.assert_allclose(telemetry.clip, clip, rtol=1e-6)
    layers = reference.layers(before.rule, params, gradients, states, steps, groups)
    ratios = [reference.trust_ratio(layer) for layer in layers]
    dtypes = [np.float64 if p.dtype == torch.float64 else np.float32 for p in before.params]
    errors = [norm_error(*case) for case in zip(layers, ratios, dtypes, strict=True)]
    for key in ("weight_norm", "measured_norm", "raw_ratio", "ratio", "clamp"):
        expected = np.array([getattr(ratio, key) for ratio in ratios])
        allowed = np.abs(expected) * (1e-6 if key in ("weight_norm", "clamp") else errors)
        assert_close(getattr(telemetry, key), expected, allowed, key)
    assert not telemetry.skipped.any()
    for i, reference_layer in enumerate(layers):
        gradient = np.asarray(reference_layer.gradient * (telemetry.clip / clip))
        layer = replace(reference_layer, gradient=gradient)
        ratio = float(telemetry.ratio[i])
        param, master = after.params[i].detach(), after.states.get(MASTER, [None] * (i + 1))[i]
        storage = name_of(param.dtype) if param.dtype in HALF else None
        if master is None:
            weight = param
        else:
            weight, storage = master, None
            assert bits(param) == bits(master.to(param.dtype)), f"params[{i}] rounds its master"
        allowed, allowed_states = tolerance(layer, ratio, dtypes[i], storage)
        if dtypes[i] == np.float64:  # the reference rounds as often
            allowed, allowed_states = 2 * allowed, {k: 2 * v for k, v in allowed_states.items()}
        reference.update(layer, ratio)
        assert_close(widened(weight), layer.weight, allowed, f"params[{i}]")
        for key, before_rounding in allowed_states.items():
            state = after.states[key][i]
            assert state is not None
            kept = layer.state[key]
            bound = before_rounding
            if state.dtype in HALF:
                bound = storage_error(name_of(state.dtype), kept, bound)
            assert_close(widened(state), kept, bound, f"{key} of params[{i}]")
        counter = after.steps[i]
        assert counter is None or counter.item() == steps[i] + 1


def name_of(dtype: torch.dtype) -> str:
    """Return its name without torch's."""
    return str(dtype).removeprefix("torch.")


def norm_error(
    layer: reference.Layer, ratio: reference.TrustRatio, dtype: type[np.floating[Any]]
) -> float:
    """Return the relative error that a layer's measured norm, and so its ratio, may have.

    It is large where an update cancels; the same kernels in double are held to 1e-12
    (tests/test_engine_native.py).
    """
    group = layer.group
    adds = group["trust_of"] == "update" or group["trust_weight_decay"] == "combined"
    if not adds or math.isnan(ratio.measured_norm):
        return 1e-6
    share = norm_tolerance(layer, dtype) / ratio.measured_norm if ratio.measured_norm else 0.0
    return 1e-6 + 2 * share


def judged_step(call: Call, step: Steps, *, grad_scale: float | None = None) -> Telemetry:
    """Take a step and hold it to the reference."""
    before = call.copy()
    telemetry = call.take(step, grad_scale=grad_scale)
    judge(before, call, telemetry, grad_scale=grad_scale)
    return telemetry


def call_of(optimizer: LayerwiseOptimizer) -> Call:
    """Return an optimizer's next step as a call of the kernels, on copies of its tensors."""
    rule = RULES[optimizer.rule]
    params: list[Tensor] = []
    groups: list[Options] = []
    states: dict[str, list[Tensor | None]] = {key: [] for key in (*rule.states, MASTER)}
    steps: list[Tensor | None] = []
    for group in optimizer.param_groups:
        members = [p for p in group["params"] if p.grad is not None]
        excluded = [
            bool(excluded)
            for p, excluded in zip(group["params"], group["exclude"], strict=True)
            if p.grad is not None
        ]
        first = len(params)
        indices = list(range(first, first + len(members)))
        groups.append({**group, "lr": float(group["lr"]), "params": indices, "exclude": excluded})
        params += members
        for param in members:
            saved = optimizer.state.get(param, {})
            used = states_of(rule, group, param)
            for key, column in states.items():
                fresh = saved.get(key, new_state(rule, group, param, key, ""))
                column.append(fresh if key in used else None)
            # A buffer without a count, torch's, has seen its first step.
            steps.append(saved.get("step", torch.tensor(float("momentum_buffer" in saved))))
    call = Call(optimizer.rule, params, [], states, steps, groups).copy()
    call.grads = [param.grad.clone() for param in params if param.grad is not None]
    return call


def plan_of(optimizer: LayerwiseOptimizer) -> Plan:
    """Return what an optimizer on the CPU keeps from step to step."""
    stepper = optimizer._stepper_of()
    assert isinstance(stepper, AutomaticStepper)
    plan = stepper.steppers["cpu"]
    assert isinstance(plan, Plan)
    return plan


def judged_optimizer_step(optimizer: LayerwiseOptimizer) -> Telemetry:
    """Take an optimizer's step and hold it to the reference."""
    before = call_of(optimizer)
    optimizer.step()
    after = call_of(optimizer)
    for group in before.groups:
        if not needs_step(RULES[optimizer.rule], group):  # its layers' counts stand still
            for i in group["params"]:
                before.steps[i] = after.steps[i] = None
    layers = list(optimizer.read_telemetry().values())
    assert len(layers) == len(before.params)
    columns = {
        key: np.array([getattr(layer, key) for layer in layers])
        for key in ("weight_norm", "measured_norm", "raw_ratio", "ratio", "clamp", "skipped")
    }
    _, grads, _, _, groups = float64(before)
    _, total_norm, clip = reference.prepare(grads, groups)
    telemetry = Telemetry(**columns, total_norm=total_norm, clip=clip)
    judge(before, after, telemetry)
    return telemetry


def bits(tensor: Tensor) -> bytes:
    """Return a tensor's elements in the order of its indices, NaN and the sign of 0 included."""
    if tensor.is_meta or tensor.is_sparse:
        return repr(tensor).encode()
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Assert that the tensors are equal in every bit."""
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == b.shape, f"tensor {i}"
        assert bits(a) == bits(b), f"tensor {i} of shape {tuple(a.shape)} differs"


@contextmanager
def unchanged(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Assert that what happens inside leaves the tensors equal in every bit."""
    before = [bits(tensor) for tensor in tensors]
    yield
    for i, (tensor, then) in enumerate(zip(tensors, before, strict=True)):
        assert bits(tensor) == then, f"tensor {i} of shape {tuple(tensor.shape)} has changed"


@contextmanager
def optimizer_unchanged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Assert that what happens inside leaves parameters, gradients and states, the set of states
    included, as they were.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [p.grad for p in params if p.grad is not None]
    states = {p: dict(optimizer.state[p]) for p in params if p in optimizer.state}
    tensors = [x for values in states.values() for x in values.values()]
    with unchanged([*params, *grads, *tensors]):
        yield
    now = {p: dict(optimizer.state[p]) for p in params if p in optimizer.state}
    assert {p: list(values) for p, values in now.items()} == {
        p: list(values) for p, values in states.items()
    }
