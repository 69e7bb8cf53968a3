"""Steps in every variant of the rules, and the bits that they leave.

As a program it takes the steps of all problems and prints their digests: the tests run it under
other environments. Its gradients lie on read-only pages then.

    python engine_problem.py THREADS
"""

from __future__ import annotations

import ctypes
import hashlib
import json
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

from date_kernels import Telemetry
from date_kernels.dispatch import Stepper
from date_kernels.plan import Plan
from date_kernels.rules import RULES

Array: TypeAlias = NDArray[np.float32]
Options: TypeAlias = dict[str, Any]
Bits: TypeAlias = dict[str, bytes]

FORMS = ("outside", "inside", "ratio_inside")
CENTERED = {"centered": True}
TF1 = {"alpha": 0.9, "eps": 1e-10, "eps_inside_sqrt": True, "initial_square_avg": 1.0}


def _momentum(**options: Any) -> Iterator[tuple[str, Options]]:
    for form in FORMS:
        yield form, {"momentum": 0.9, "momentum_scaling": form, **options}


VARIANTS: dict[str, tuple[str, Options]] = {
    "sgd": ("sgd", {}),
    **{f"sgd-momentum-{form}": ("sgd", o) for form, o in _momentum(dampening=0.25)},
    **{f"sgd-nesterov-{form}": ("sgd", o) for form, o in _momentum(nesterov=True)},
    "rmsprop": ("rmsprop", {}),
    "rmsprop-centered": ("rmsprop", CENTERED),
    **{f"rmsprop-momentum-{form}": ("rmsprop", o) for form, o in _momentum()},
    **{f"rmsprop-both-{form}": ("rmsprop", o) for form, o in _momentum(**CENTERED)},
    "rmsprop-tf1": ("rmsprop", TF1),
    **{f"rmsprop-tf1-momentum-{form}": ("rmsprop", o) for form, o in _momentum(**TF1)},
}
"""Every loop of every family, in every form of momentum scaling."""

BOUNDED: Options = {"trust": True, "trust_lower": 0.1, "trust_upper": 1.0}

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
)
"""The param groups of a step, two layers each: without trust, and with it in each of its modes."""

SIZES = (
    70_001,
    7,
    140_000,
    4097,
    4096,
    8192,
    20_000,
    1,
    65_536,
    16,
    33_003,
    12_289,
    5,
    0,
    33_000,
    64,
)
"""Elements of each layer: ends at, before and behind those of leaves and chunks, and in all twelve
times the 32,768 elements that start another worker. The last layer's weights are zero."""

INFINITE = 8
"""The layer with an infinite weight in the problems that skip: it is skipped alone."""

SHARED: dict[str, Options] = {
    "free": {},
    "clip": {"max_grad_norm": 100.0},
    "skip": {"max_grad_norm": 100.0, "on_nonfinite": "skip"},
}
"""What all groups must agree on. The problems that skip have something to skip."""

COUNT = 3
"""Steps taken: learning rates, gradients and step counters differ from one to the next."""


@cache
def _drawn(layer: int, size: int, what: str) -> Array:
    seed = [layer, *what.encode()]
    drawn = np.random.default_rng(seed).standard_normal(size, dtype=np.float32)
    drawn.setflags(write=False)
    return drawn


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
    """

    variant: str
    shared: str = "free"
    members: tuple[int, ...] = tuple(range(len(SIZES)))
    sizes: tuple[int, ...] = SIZES

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
            group["lr"] = (0.01, 0.003, 0.02)[step % 3] / (1 + index)
            group["params"] = positions
            if "exclude" in options:
                group["exclude"] = tuple(
                    options["exclude"][self.members[at] % 2] for at in positions
                )
            groups.append(RULES[self.rule].complete(group))
        return groups

    def weights(self) -> list[Array]:
        """The weights before the first step."""
        weights = [np.float32(0.1) * _drawn(i, self.sizes[i], "weight") for i in self.members]
        for weight, i in zip(weights, self.members, strict=True):
            if i == len(self.sizes) - 1:
                weight[:] = 0
            if i == INFINITE and self.shared == "skip":
                weight[-1] = np.inf
        return weights

    def gradients(self, step: int) -> list[Array]:
        """The gradients of a step. One of step 1 of the problems that skip is not finite."""
        gradients = [_drawn(i, self.sizes[i], f"gradient {step}") for i in self.members]
        if step == 1 and self.shared == "skip":
            gradients[0] = gradients[0].copy()
            gradients[0][-1] = np.nan
        return gradients

    def states(self) -> dict[str, list[Array | None]]:
        """The states before the first step: of a run under way in the first layer of each group,
        fresh in the second."""
        rule, groups = RULES[self.rule], self.groups(0)
        states: dict[str, list[Array | None]] = {
            key: [None] * len(self.members) for key in rule.states
        }
        for group in groups:
            for at in group["params"]:
                i = self.members[at]
                for key in rule.used(group):
                    state = np.zeros(self.sizes[i], dtype=np.float32)
                    if key == "square_avg":
                        state += np.float32(group["initial_square_avg"])
                    if i % 2 == 0:
                        state += np.float32(0.1) * _drawn(i, self.sizes[i], key)
                        if key == "square_avg":  # above the mean's square, as in any run
                            state = 1 + np.abs(state)
                    states[key][at] = state
        return states

    def steps(self) -> list[Array]:
        """The step counters before the first step."""
        return [np.array(4.0 if i % 2 == 0 else 0.0, dtype=np.float32) for i in self.members]


@dataclass
class Tensors:
    """What the steps of a problem change."""

    params: list[Tensor]
    states: dict[str, list[Tensor | None]]
    steps: list[Tensor]

    @classmethod
    def of(cls, problem: Problem) -> Tensors:
        """Memory of their own for the problem's values."""
        return cls(
            params=[torch.from_numpy(weight) for weight in problem.weights()],
            states={
                key: [None if state is None else torch.from_numpy(state) for state in states]
                for key, states in problem.states().items()
            },
            steps=[torch.from_numpy(step) for step in problem.steps()],
        )

    def bits(self) -> Bits:
        """Their bytes by name."""
        named: dict[str, Sequence[Tensor | None]] = {
            "weight": self.params,
            "step": self.steps,
            **self.states,
        }
        return {
            f"{name} {at}": tensor.numpy().tobytes()
            for name, tensors in named.items()
            for at, tensor in enumerate(tensors)
            if tensor is not None
        }


def plain(array: Array) -> Tensor:
    """A gradient."""
    return torch.from_numpy(array.copy())


def read_only(array: Array) -> Tensor:
    """A gradient on pages that cannot be written."""
    if array.size == 0:
        return torch.empty(0)
    pages = mmap.mmap(-1, array.nbytes)
    pages[:] = array.tobytes()
    tensor = torch.frombuffer(pages, dtype=torch.float32)
    address, length = ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(array.nbytes)
    assert ctypes.CDLL(None).mprotect(address, length, mmap.PROT_READ) == 0
    return tensor


def take_steps(
    problem: Problem, stepper: Stepper, gradient: Callable[[Array], Tensor] = plain
) -> Bits:
    """Take the problem's steps and return every bit that they leave: weights, states, counters and
    what each step reports."""
    tensors, reports = Tensors.of(problem), {}
    for step in range(COUNT):
        arrays = problem.gradients(step)
        gradients = [gradient(array) for array in arrays]
        telemetry = stepper.step(
            tensors.params, gradients, tensors.states, tensors.steps, problem.groups(step)
        )
        reports.update(report_bits(telemetry, step))
        for at, (array, tensor) in enumerate(zip(arrays, gradients, strict=True)):
            same = np.array_equal(array.view(np.int32), tensor.numpy().view(np.int32))
            assert same, f"gradient {at} was written"
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
