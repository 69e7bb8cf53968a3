"""Steps in every variant of the rules, and the bits that they leave.

As a program it takes the steps of all problems and prints their digests: the tests run it under
other environments. Its gradients lie on read-only pages then.

    python engine_problem.py THREADS
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from variants import VARIANTS

from date_kernels import Telemetry
from date_kernels.layers import MASTER, assign, copy_elements, state_dtype, states_of, widened
from date_kernels.plan import Plan
from date_kernels.rules import RULES
from date_kernels.stepper import Stepper

Array: TypeAlias = NDArray[np.float32]
Options: TypeAlias = dict[str, Any]
Bits: TypeAlias = dict[str, bytes]

BOUNDED: Options = {"trust": True, "trust_lower": 0.1, "trust_upper": 1.0}

UPDATE: Options = {**BOUNDED, "trust_of": "update"}

GROUPS: tuple[Options, ...] = (
    {"weight_decay": 0.01},
    BOUNDED,
    {
        "trust": True,
        "trust_coefficient": 0.001,
        "trust_weight_decay": "added",
        "weight_decay": 0.1,
        "exclude": (False, True),
    },
    {**BOUNDED, "trust_weight_decay": "combined", "weight_decay": 0.02, "maximize": True},
    {"trust": True, "trust_bounds": "adabound", "trust_final": 0.1, "trust_gamma": 0.5},
    {"trust": True, "trust_clip_by_lr": True, "trust_upper": 2.0, "trust_eps": 1e-3},
    {"trust": True, "trust_skip_without_decay": True},
    {**BOUNDED, "trust_weight_norm_bounds": (0.0, 0.5), "trust_zero_norm": 0.75},
    {**UPDATE, "weight_decay": 0.05, "weight_decay_in": "update", "master_weights": True},
    {**UPDATE, "weight_decay": 0.05, "weight_decay_in": "weights"},
    {"weight_decay": 0.1, "weight_decay_in": "weights", "master_weights": True},
    {**UPDATE, "trust_bounds": "adabound", "trust_final": 0.1, "trust_gamma": 0.5},
)
"""The param groups of a step, two layers each: without trust, and with it in each of its modes."""

F32, F64, B16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
LAYERS: tuple[tuple[int, torch.dtype, torch.dtype], ...] = (
    (70_001, F32, F32),
    (7, B16, B16),
    (140_000, F32, F32),
    (4097, F16, F32),
    (4096, F64, F64),
    (8192, B16, F32),
    (20_000, F32, F32),
    (1, F16, F16),
    (65_536, F32, F32),
    (16, F64, F64),
    (33_003, F16, F16),
    (12_289, F32, F32),
    (5, F32, F32),
    (0, B16, B16),
    (33_000, B16, B16),
    (64, F32, F32),
    (20_001, B16, F32),
    (70_003, F32, F32),
    (34_000, F64, F64),
    (9001, F16, F16),
    (3001, F16, F32),
    (4099, B16, B16),
    (5003, F32, F32),
    (64, F32, F32),
)
"""Elements, dtype and gradient's dtype of each layer: ends at, before and behind those of blocks,
leaves and chunks, and in all sixteen times the 32,768 elements that start another worker. The last
layer's weights are zero."""

SIZES = tuple(size for size, _, _ in LAYERS)

INFINITE = 8
"""The layer with an infinite weight in the problems that skip: it is skipped alone."""

SHARED: dict[str, Options] = {
    "free": {},
    "clip": {"max_grad_norm": 100.0},
    "skip": {"max_grad_norm": 100.0, "on_nonfinite": "skip"},
}
"""What all groups must agree on. The problems that skip have something to skip."""

SQUARES = ("square_avg", "sum", "exp_avg_sq", "max_exp_avg_sq", "acc_delta")
"""States that are never negative."""

COUNT = 3
"""Steps taken: learning rates, gradients and step counters differ from one to the next."""


@cache
def _drawn(layer: int, size: int, what: str) -> Array:
    seed = [layer, *what.encode()]
    drawn = np.random.default_rng(seed).standard_normal(size, dtype=np.float32)
    drawn.setflags(write=False)
    return drawn


def _tensor(values: Array, dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(values.shape, dtype=dtype)
    assign(tensor, values.astype(np.float64))
    return tensor


@dataclass(frozen=True)
class Problem:
    """Steps of one variant over the layers `members`, alone or together.

    Attributes
    ----------
    variant : str
        A key of `VARIANTS`.
    shared : str
        A key of `SHARED`.
    members : tuple of int
        Indices into `sizes`.
    sizes : tuple of int
        Elements of each layer; two layers for each of `GROUPS`.
    dtype : torch.dtype, optional
        Of all parameters and gradients, instead of those that `LAYERS` says.
    """

    variant: str
    shared: str = "free"
    members: tuple[int, ...] = tuple(range(len(SIZES)))
    sizes: tuple[int, ...] = SIZES
    dtype: torch.dtype | None = None

    def __str__(self) -> str:
        return f"{self.variant}-{self.shared}"

    @property
    def rule(self) -> str:
        """Its family."""
        return VARIANTS[self.variant][0]

    def alone(self) -> Iterator[Problem]:
        """One problem for each layer."""
        return (replace(self, members=(i,)) for i in self.members)

    def groups(self, step: int) -> list[Options]:
        """The param groups of a step, complete."""
        groups = []
        for index, options in enumerate(GROUPS):
            positions = [at for at, i in enumerate(self.members) if i // 2 == index]
            if not positions:
                continue
            group = {**options, **SHARED[self.shared], **VARIANTS[self.variant][1]}
            if group["momentum_scaling"] != "outside":
                group["trust_of"] = "gradient"  # of the update it would be circular
            group["lr"] = (0.01, 0.003, 0.02)[step % 3] / (1 + index)
            group["params"] = positions
            if "exclude" in options:
                group["exclude"] = tuple(
                    options["exclude"][self.members[at] % 2] for at in positions
                )
            groups.append(RULES[self.rule].complete(group))
        return groups

    def weights(self) -> list[Tensor]:
        """The weights before the first step."""
        weights = []
        for i in self.members:
            values = np.float32(0.1) * _drawn(i, self.sizes[i], "weight")
            if i == len(self.sizes) - 1:
                values[:] = 0
            if i == INFINITE and self.shared == "skip":
                values[-1] = np.inf
            weights.append(_tensor(values, self.dtype or LAYERS[i][1]))
        return weights

    def gradients(self, step: int) -> list[Tensor]:
        """The gradients of a step. One of step 1 of the problems that skip is not finite."""
        gradients = [
            _tensor(_drawn(i, self.sizes[i], f"gradient {step}"), self.dtype or LAYERS[i][2])
            for i in self.members
        ]
        if step == 1 and self.shared == "skip":
            gradients[0][-1] = math.nan
        return gradients

    def states(self) -> dict[str, list[Tensor | None]]:
        """The states before the first step: of a run under way in the first layer of each group,
        fresh in the second."""
        rule, weights = RULES[self.rule], self.weights()
        states: dict[str, list[Tensor | None]] = {
            key: [None] * len(self.members) for key in (*rule.states, MASTER)
        }
        for group in self.groups(0):
            for at in group["params"]:
                i = self.members[at]
                dtype = state_dtype(rule.complete(group), weights[at])
                for key in states_of(rule, group, weights[at]):
                    noise = np.float32(0.1) * _drawn(i, self.sizes[i], key)
                    if key == MASTER:  # of the weights and what their rounding lost
                        values = (widened(weights[at]) * (1 + noise / 100)).astype(np.float32)
                    elif i % 2 == 1:
                        values = np.full_like(noise, rule.start(key, group))
                    else:  # squares above the mean's square, as in any run
                        values = 1 + np.abs(noise) if key in SQUARES else noise
                    states[key][at] = _tensor(values, dtype)
        return states

    def steps(self) -> list[Tensor]:
        """The step counters before the first step."""
        return [torch.tensor(4.0 if i % 2 == 0 else 0.0) for i in self.members]


@dataclass
class Tensors:
    """What the steps of a problem change."""

    params: list[Tensor]
    states: dict[str, list[Tensor | None]]
    steps: list[Tensor]

    @classmethod
    def of(cls, problem: Problem) -> Tensors:
        """Memory of their own for the problem's values."""
        return cls(problem.weights(), problem.states(), problem.steps())

    def bits(self) -> Bits:
        """Their bytes by name."""
        named: dict[str, Sequence[Tensor | None]] = {
            "weight": self.params,
            "step": self.steps,
            **self.states,
        }
        return {
            f"{name} {at}": tensor_bits(tensor)
            for name, tensors in named.items()
            for at, tensor in enumerate(tensors)
            if tensor is not None
        }


def tensor_bits(tensor: Tensor) -> bytes:
    """The bytes of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def plain(tensor: Tensor) -> Tensor:
    """A copy of the gradient, made in this thread: torch's own would hang in a forked child."""
    copy = torch.empty_like(tensor)
    copy_elements(tensor, copy)
    return copy


def read_only(tensor: Tensor) -> Tensor:
    """The gradient on pages that cannot be written."""
    content = tensor_bits(tensor)
    if not content:
        return tensor
    pages = mmap.mmap(-1, len(content))
    pages[:] = content
    copy = torch.frombuffer(pages, dtype=tensor.dtype)
    address, length = ctypes.c_void_p(copy.data_ptr()), ctypes.c_size_t(len(content))
    assert ctypes.CDLL(None).mprotect(address, length, mmap.PROT_READ) == 0
    return copy


def take_steps(
    problem: Problem,
    stepper: Stepper,
    gradient: Callable[[Tensor], Tensor] = plain,
    **arguments: Any,
) -> Bits:
    """Take the problem's steps and return every bit that they leave: weights, states, counters and
    what each step reports."""
    tensors, reports = Tensors.of(problem), {}
    for step in range(COUNT):
        originals = problem.gradients(step)
        gradients = [gradient(original) for original in originals]
        telemetry = stepper.step(
            tensors.params,
            gradients,
            tensors.states,
            tensors.steps,
            problem.groups(step),
            **arguments,
        )
        reports.update(report_bits(telemetry, step))
        for at, (original, tensor) in enumerate(zip(originals, gradients, strict=True)):
            assert tensor_bits(original) == tensor_bits(tensor), f"gradient {at} was written"
    return {**tensors.bits(), **reports}


def report_bits(telemetry: Telemetry, step: int) -> Bits:
    """The bytes of a step's telemetry by name."""
    return {f"{k} of step {step}": np.asarray(v).tobytes() for k, v in vars(telemetry).items()}


def assert_same(actual: Bits, expected: Bits) -> None:
    """Assert equal bits, and name those that differ."""
    differ = [name for name in expected if actual.get(name) != expected[name]]
    assert not differ, f"the bits differ of {', '.join(differ[:8])} ({len(differ)} arrays)"
    assert actual.keys() == expected.keys()


def digest(bits: Bits) -> str:
    """One word for all bits."""
    word = hashlib.sha256()
    for name in sorted(bits):
        word.update(name.encode() + b"\0" + bits[name])
    return word.hexdigest()


PROBLEMS = tuple(Problem(variant, shared) for variant in VARIANTS for shared in SHARED)

if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    print(json.dumps({str(p): digest(take_steps(p, Plan(p.rule), read_only)) for p in PROBLEMS}))
