"""Backends: which are there, why the others are not, and one function that steps through any."""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import native, reference
from .cuda_plan import CudaPlan, why_no_cuda
from .layers import CPU, Call, States, assign, check_layers, states_of, widened
from .options import Group
from .plan import Plan, check_groups, check_scale, find_rule
from .reference import Telemetry
from .stepper import Request, Stepper


class ReferenceStepper(Stepper):
    """The float64 reference behind the tensors' signature: slow, and the truth."""

    def __init__(self, rule: str) -> None:
        self.rule = find_rule(rule)

    def take(self, request: Request) -> Telemetry:
        """Take one step in float64 and round the results into the tensors."""
        (params, grads, states, steps, groups), grad_scale, found_inf, name_of = request
        scale = check_scale(grad_scale)
        groups = [self.rule.complete(group) for group in groups]
        check_groups(self.rule, groups)
        layers = check_layers(self.rule, Call(params, grads, states, steps, groups), name_of, CPU)
        used = [
            states_of(self.rule, groups[index], param)
            for (index, _), param in zip(layers, params, strict=True)
        ]
        arrays = {
            key: _arrays([x if key in of else None for x, of in zip(state, used, strict=True)])
            for key, state in states.items()
        }
        weights, counters = _arrays(params), [_counter(step) for step in steps]
        telemetry = reference.step(
            self.rule.name,
            weights,
            _arrays(grads),
            arrays,
            counters,
            groups,
            grad_scale=scale,
            found_inf=None if found_inf is None else float(found_inf),
        )
        stepped = np.flatnonzero(~telemetry.skipped).tolist()
        columns = [(params, weights), (steps, counters)]
        columns += [(state, arrays[key]) for key, state in states.items()]
        for tensors, results in columns:
            _write([tensors[i] for i in stepped], [results[i] for i in stepped])
        return telemetry


def _arrays(tensors: Sequence[Tensor | None]) -> list[Any]:
    return [None if tensor is None else widened(tensor) for tensor in tensors]


def _counter(step: Tensor | None) -> NDArray[np.float64] | None:
    return None if step is None else np.array(step.item())


def _write(tensors: Sequence[Tensor | None], arrays: Sequence[NDArray[np.float64] | None]) -> None:
    for tensor, array in zip(tensors, arrays, strict=True):
        if tensor is not None and array is not None:
            assign(tensor, array)
            torch.autograd.graph.increment_version(tensor)


def _why_no_triton() -> str | None:
    """Why the Triton backend cannot run here; None where it can."""
    if find_spec("triton") is None:
        return "triton is not installed; it comes with torch's CUDA and ROCm builds"
    from .triton_plan import interpreted  # noqa: PLC0415 - a CPU installation has no triton

    if not interpreted() and not torch.cuda.is_available():
        return "torch sees no GPU: torch.cuda.is_available() is False"
    return None


def _make_triton(rule: str) -> Stepper:
    why = _why_no_triton()
    if why is not None:
        raise RuntimeError(f"backend 'triton' is not available: {why}")
    from .triton_plan import TritonPlan  # noqa: PLC0415 - as above

    return TritonPlan(rule)


def _make_cuda(rule: str) -> Stepper:
    why = why_no_cuda()
    if why is not None:
        raise RuntimeError(f"backend 'cuda' is not available: {why}")
    return CudaPlan(rule)


BACKENDS: Mapping[str, Callable[[str], Stepper]] = {
    "cpu": Plan,
    "cuda": _make_cuda,
    "triton": _make_triton,
    "reference": ReferenceStepper,
}


GPU_BACKENDS: Sequence[tuple[str, Callable[[], str | None]]] = (
    ("triton", _why_no_triton),
    ("cuda", why_no_cuda),
)
"""For parameters on a GPU, and why each is not available: the first that is takes the step."""


GPU_VARIABLE = "DATE_KERNELS_GPU_BACKEND"
"""Environment variable that names the one to take; where that is not available, it says why."""


class AutomaticStepper(Stepper):
    """Takes each step where its parameters are: on a GPU, or on the CPU."""

    def __init__(self, rule: str) -> None:
        find_rule(rule)
        self._rule = rule
        self.steppers: dict[str, Stepper] = {}

    @cached_property
    def _gpu_backend(self) -> str:
        asked = os.environ.get(GPU_VARIABLE)
        if asked is not None and asked not in dict(GPU_BACKENDS):
            names = " or ".join(name for name, _ in GPU_BACKENDS)
            raise ValueError(f"{GPU_VARIABLE} is {asked!r}; it must be {names}")
        available = (name for name, why in GPU_BACKENDS if why() is None)
        return asked or next(available, GPU_BACKENDS[0][0])

    def take(self, request: Request) -> Telemetry:
        """Take one step in place; see `date_kernels.step`."""
        params = request.call.params
        backend = "cpu"
        if params and getattr(params[0], "is_cuda", False):
            backend = self._gpu_backend
        elif native.why_missing is not None:
            backend = "reference"
        stepper = self.steppers.get(backend)
        if stepper is None:
            if backend == "reference":
                warnings.warn(
                    f"steps are taken by the slow float64 reference: {native.why_missing}",
                    RuntimeWarning,
                    stacklevel=2,
                )
            stepper = self.steppers[backend] = BACKENDS[backend](self._rule)
        return stepper.take(request)


def make_stepper(rule: str, backend: str | None = None) -> Stepper:
    """Make what takes an optimizer's steps.

    Parameters
    ----------
    rule : str
        A family of `date_kernels.rules.RULES`.
    backend : {"cpu", "cuda", "triton", "reference"}, optional
        Without it each step is taken where its parameters are: on a GPU by Triton's kernels, or
        where Triton is not there by the CUDA kernels; on the CPU by the compiled kernels where they
        are there, else by the reference, with a warning.

    Raises
    ------
    ValueError
        For an unknown rule or backend.
    RuntimeError
        Where the backend asked for is not available: an explicit request never falls back.
    """
    if backend is None:
        return AutomaticStepper(rule)
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; there are {', '.join(BACKENDS)}")
    return BACKENDS[backend](rule)


def step(
    rule: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: States,
    steps: Sequence[Tensor | None],
    groups: Sequence[Group],
    *,
    grad_scale: Tensor | float | None = None,
    found_inf: Tensor | float | None = None,
    backend: str | None = None,
) -> Telemetry:
    """Take one layer-wise step over all tensors and param groups, in one launch.

    Norms, bounded trust ratio and update of every layer as LARS (You, Gitman, Ginsburg 2017) and
    DATE (You et al. 2019, Algorithm 1) state them. Every call plans anew; an optimizer keeps a plan
    instead (`make_stepper`).

    Parameters
    ----------
    rule : str
        A family of `date_kernels.RULES`: ``"sgd"``, ``"rmsprop"``, ``"adagrad"``, ``"adam"``, ...
    params : sequence of Tensor
        One layer each, all on the CPU or all on one GPU; float32, float64, bfloat16 or float16, of
        any shape; on a GPU dense. Change in place.
    grads : sequence of Tensor
        In their parameters' shapes and dtypes, or float32 beside a 16-bit parameter. Never change.
    states : mapping of str to sequence of (Tensor or None)
        By torch's key, each in its parameter's shape; None where a layer's options do not use that
        state. float64 for a float64 parameter, else float32, the dtype of the arithmetic, or of 16
        bits where a group's ``state_dtype`` is its 16-bit parameters' own; with
        ``master_weights`` the key ``"master"`` holds the weights of a 16-bit parameter, which is
        their rounding. Change in place. Squares of float64 values are float64: norms of values
        beyond 1e154 are infinite and below 1e-162 zero.
    steps : sequence of (Tensor or None)
        One-element float32 counters of the steps taken so far; advanced by 1. None where the
        options need none.
    groups : sequence of mapping
        Plain scalars with torch's names. ``"params"`` holds the indices of the group's tensors and
        ``"exclude"``, optional, a bool each; ``"lr"`` must be there, other options have defaults.
    grad_scale : float or one-element Tensor, optional
        Gradients are divided by it first.
    found_inf : float or one-element Tensor, optional
        Where not 0, nothing changes; where given, a layer whose norm is not finite is skipped.
    backend : {"cpu", "cuda", "triton", "reference"}, optional
        Without it the fastest for the parameters' device.

    Returns
    -------
    Telemetry
        Per layer the norms, the raw and the bounded ratio, whether a bound was hit and whether the
        layer was skipped. After a step on a GPU the first look at it waits for the device.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        Before anything is written, with the tensor's or option's name, what came and what to do.

    Examples
    --------
    >>> import torch, date_kernels
    >>> w, g = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    >>> group = {"params": [0], "lr": 0.1, "trust": True, "trust_upper": 1.0}
    >>> date_kernels.step("sgd", [w], [g], {}, [None], [group]).raw_ratio.tolist()
    [2.5]
    >>> w
    tensor([3.0000, 3.8000])
    """
    return make_stepper(rule, backend).step(
        params, grads, states, steps, groups, grad_scale=grad_scale, found_inf=found_inf
    )


@dataclass(frozen=True)
class Info:
    """What this installation can do here; ``print`` it.

    Attributes
    ----------
    version, torch_version : str
    backends : dict
        Each backend's name with None where it is available, else the reason why not.
    cpu_target : str or None
        The instruction set in use.
    cpu_targets : dict
        Each instruction set with None where it can run here, else the reason why not.
    openmp_library : str or None
        The file that the kernels' OpenMP runtime was loaded from.
    shares_torch_openmp : bool
        Whether it is torch's own: then both use one pool of threads.
    threads : int
        Workers of a large step at most: ``torch.get_num_threads()``.
    """

    version: str
    torch_version: str
    backends: dict[str, str | None]
    cpu_target: str | None
    cpu_targets: dict[str, str | None]
    openmp_library: str | None
    shares_torch_openmp: bool
    threads: int

    def __str__(self) -> str:
        def line(name: str, reason: str | None) -> str:
            return f"  {name:<10} {'available' if reason is None else f'not available: {reason}'}"

        shared = (
            "torch's own: one pool of threads"
            if self.shares_torch_openmp
            else "not torch's: two pools of threads compete, steps are slower"
        )
        compiled = (
            f"cpu targets (in use: {self.cpu_target}):",
            *(line(*item) for item in self.cpu_targets.items()),
            f"openmp: {self.openmp_library} ({shared})",
        )
        return "\n".join(
            (
                f"date-kernels {self.version}, torch {self.torch_version}",
                "backends:",
                *(line(*item) for item in self.backends.items()),
                *(compiled if self.cpu_targets else ()),
                f"threads: {self.threads}",
            )
        )


def info() -> Info:
    """Tell which backends and instruction sets are there, and why the others are not."""
    try:
        own_version = version("date-kernels")
    except PackageNotFoundError:
        own_version = "not installed"
    why = native.why_missing
    targets = [] if why else native.module().targets()
    library = None if why else native.module().openmp_library()
    target = None
    if not why:
        try:
            _, target = native.find_target()
        except RuntimeError as error:
            why = str(error)
    return Info(
        version=own_version,
        torch_version=torch.__version__,
        backends={
            "cpu": why,
            "cuda": why_no_cuda(),
            "triton": _why_no_triton(),
            "reference": None,
        },
        cpu_target=target,
        cpu_targets={
            name: None if supported else "this processor does not support it"
            for name, supported in targets
        },
        openmp_library=library,
        shares_torch_openmp=library is not None and _shares_openmp(),
        threads=torch.get_num_threads(),
    )


def _shares_openmp() -> bool:
    """Whether the kernels and torch resolve OpenMP's functions to the same library.

    A look at which libraries are loaded would not do: other packages bring runtimes of their own.
    """
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not torch_library.exists():
        return False
    try:
        ours, torchs = (
            ctypes.cast(ctypes.CDLL(str(library)).omp_get_max_threads, ctypes.c_void_p).value
            for library in (native.module().__file__, torch_library)
        )
    except AttributeError:  # a torch without OpenMP
        return False
    return ours == torchs
