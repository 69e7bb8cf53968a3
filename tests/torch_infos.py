"""Our optimizers as torch's own suite describes an optimizer to itself: an `OptimizerInfo` each.

A class with a twin in torch.optim takes the twin's inputs, error inputs and schedulers, and ours on
top; the presets take those of the class that they derive from.
"""

from __future__ import annotations

import unittest
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from helpers import Options
from setups import OF_UPDATE, TRUST
from torch import Tensor
from torch.nn import Parameter
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
    optim_db,
)
from torch.testing._internal.opinfo.core import DecorateInfo

import date_optim
from date_optim import TrustRatio
from date_optim.optimizer import Layerwise
from date_optim.trust_ratio import group_options

SUITE = "TestOptimRenewed"
"""The class of torch's suite that reads the infos."""

NO_GPU = "what it compares lies on a GPU"
DECLARED: dict[str, str] = {
    "test_complex": "complex parameters are refused: error inputs say so",
    "test_complex_2d": "it splits one parameter into two, which have norms of their own",
    "test_rosenbrock_sparse": "sparse gradients are refused: error inputs say so",
    "test_defaults_changed_to_foreach": "it replaces a function of torch's own for-each",
    "test_set_default_dtype_works_with_foreach": "it wants a float64 count of torch's for-each; "
    "ours is float32, as torch's fused one",
    "test_foreach_large_tensor": "it takes 72 GB of a GPU's memory",
    "test_fused_large_tensor": "it takes 64 GB of memory",
    "test_peak_memory_foreach": NO_GPU,
    "test_forloop_goes_right_direction_multigpu": NO_GPU,
    "test_mixed_device_dtype": NO_GPU,
    "test_cpu_load_state_dict": NO_GPU,
    "test_state_dict_with_cuda_params": NO_GPU,
    "test_fused_cpu_matches_cuda": NO_GPU,
}
"""Tests of torch's suite that are not restated in tests/test_torch_suite.py, and why."""

SKIPPED_EVERYWHERE = (
    "test_complex",
    "test_complex_2d",
    "test_rosenbrock_sparse",
    "test_defaults_changed_to_foreach",
    "test_set_default_dtype_works_with_foreach",
)
"""Those that no machine runs; the others ask for theirs themselves."""

TORCHS: dict[str, Any] = {info.name: info for info in optim_db}
"""What torch's suite knows of its own optimizers, before anyone puts ours in their place."""

RATIO: tuple[Options, ...] = (
    {"trust": TRUST},
    {"trust": OF_UPDATE, "weight_decay": 0.1, "exclude": "1d"},
    {"trust": TrustRatio(bounds="adabound", final=0.5, gamma=0.1)},
    {"trust": TRUST, "maximize": True},
    {"trust": TRUST, "lr": torch.tensor(0.001)},
    {"trust": TRUST, "master_weights": True},
    {"trust": TRUST, "exclude": lambda name, param: param.ndim == 0},
)
EVERY: tuple[Options, ...] = (
    {"lr": torch.tensor(0.001)},
    {"master_weights": True, "weight_decay": 0.1},
    {"weight_decay": 0.1, "weight_decay_in": "gradient"},
    {"weight_decay": 0.1, "weight_decay_in": "update"},
    {"weight_decay": 0.1, "weight_decay_in": "weights"},
)
BUFFER: tuple[Options, ...] = (
    {"momentum": 0.9, "momentum_scaling": "inside"},
    {"momentum": 0.9, "momentum_scaling": "ratio_inside"},
)
NO_RATIO = ("LARS", "LAMB", "DATE")
"""They have a ratio of their own, whose parts are arguments of the constructor alone."""

OWN: dict[str, tuple[Options, ...]] = {
    "SGD": BUFFER + tuple({**options, "trust": TRUST} for options in BUFFER),
    "RMSprop": (
        *BUFFER,
        {"eps_inside_sqrt": True, "initial_square_avg": 1.0, "alpha": 0.9, "trust": TRUST},
    ),
    "Adam": ({"bias_correction": False, "trust": OF_UPDATE}, {"betas": (0.8, torch.tensor(0.9))}),
    "AdamW": ({"bias_correction": False},),
    "Lion": (
        {},
        {"lr": 0.01},
        {"weight_decay": 0.1, "maximize": True},
        {"betas": (0.8, 0.95), "weight_decay": 0.1},
    ),
    "LARS": ({"momentum_scaling": "outside"}, {"exclude": None, "weight_decay": 0.1}),
    "LAMB": ({"exclude": None, "weight_decay": 0.1}, {"bias_correction": False}),
    "DATE": (
        *BUFFER,
        {"exclude": "1d", "weight_decay": 0.1},
        {"centered": True, "maximize": True},
    ),
}
"""What a class has alone."""

WHOLE: tuple[Options, ...] = ({"max_grad_norm": 1.0}, {"on_nonfinite": "skip"})
BOUNDS: Options = {"lower": 0.1, "upper": 2.0}
OWN_WHOLE: dict[str, tuple[Options, ...]] = {
    "SGD": ({"max_grad_norm": 0.5, "trust": TRUST, "momentum": 0.9},),
    "Adam": ({"decoupled_weight_decay": True, "weight_decay": 0.1},),
    "LARS": ({"coefficient": 0.1, **BOUNDS},),
    "LAMB": ({"coefficient": 0.5, **BOUNDS},),
    "DATE": (
        BOUNDS,
        *(
            {"rule": rule}
            for rule in ("sgd", "momentum", "nesterov", "adagrad", "adam", "adadelta")
        ),
    ),
}
"""Options that a group cannot have of its own."""

TWIN = {"LARS": "SGD", "LAMB": "Adam", "DATE": "RMSprop"}
"""Whose inputs a preset takes."""


def _fresh(options: Options) -> OptimizerInput:
    """An input with a tensor of its own: schedulers write to a rate that is one."""
    kwargs = {key: x.clone() if isinstance(x, Tensor) else x for key, x in options.items()}
    return OptimizerInput(params=None, kwargs=kwargs, desc=", ".join(kwargs) or "default")  # type: ignore[arg-type]


def _inputs_of(name: str) -> Callable[..., list[OptimizerInput]]:
    torchs = TORCHS.get(TWIN.get(name, name))
    ours = (*EVERY, *(() if name in NO_RATIO else RATIO), *OWN.get(name, ()))

    def inputs(device: Any, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
        theirs = torchs.optim_inputs_func(device=device) if torchs else []
        return [*theirs, *map(_fresh, ours)]

    return inputs


def whole_inputs(name: str) -> list[OptimizerInput]:
    """Return the inputs of a class that stand in its constructor only, not in a group.

    torch's suite hands every option of an info to a group, too, so that infos cannot have them.
    """
    return [_fresh(options) for options in (*WHOLE, *OWN_WHOLE.get(name, ()))]


def _is_a_limit(error: Any) -> bool:
    """Whether torch refuses what only its for-each cannot do; ours reads tensors as numbers."""
    return "foreach=True" in error.error_regex or "both Tensors" in error.error_regex


class Bad(NamedTuple):
    """An input that is refused; where it has no parameters, by the constructor."""

    error: type[Exception]
    match: str
    options: Options
    params: Callable[[], list[Parameter]] | None = None
    on_step: bool = False


def _with_gradient(param: Tensor, grad: Tensor) -> Callable[[], list[Parameter]]:
    def params() -> list[Parameter]:
        made = Parameter(param.clone())
        made.grad = grad
        return [made]

    return params


BAD: tuple[Bad, ...] = (
    Bad(ValueError, "Invalid learning rate: -1", {"lr": -1}),
    Bad(ValueError, "Invalid weight_decay value: -1", {"weight_decay": -1}),
    Bad(ValueError, "Invalid max_grad_norm value: -1", {"max_grad_norm": -1}),
    Bad(ValueError, "weight_decay_in", {"weight_decay_in": "nowhere"}),
    Bad(ValueError, "momentum_scaling", {"momentum_scaling": "nowhere"}),
    Bad(ValueError, "on_nonfinite", {"on_nonfinite": "stop"}),
    Bad(ValueError, "Invalid exclude value: '2d'", {"exclude": "2d"}),
    Bad(TypeError, "unexpected keyword argument 'clamp'", {"clamp": 1.0}),
    Bad(
        RuntimeError,
        "`fused` and `foreach` cannot be `True` together",
        {"fused": True, "foreach": True},
    ),
    Bad(RuntimeError, "does not support `differentiable`", {"differentiable": True}),
    Bad(
        RuntimeError,
        "does not support `capturable` on the CPU",
        {"capturable": True},
        _with_gradient(torch.ones(2), torch.ones(2)),
    ),
    Bad(
        RuntimeError,
        "is complex",
        {},
        _with_gradient(torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.complex64)),
        on_step=True,
    ),
    Bad(
        RuntimeError,
        "is sparse",
        {},
        _with_gradient(torch.ones(2), torch.ones(2).to_sparse()),
        on_step=True,
    ),
)
BAD_RATIO: tuple[Bad, ...] = (
    Bad(TypeError, "trust must be a TrustRatio or None", {"trust": True}),
    Bad(
        ValueError,
        "trust_lower=2.0 is above trust_upper=1.0",
        {"trust": TrustRatio(lower=2.0, upper=1.0)},
    ),
)
BAD_LION: tuple[Bad, ...] = (
    Bad(ValueError, "Invalid beta parameter at index 0: 1.0", {"betas": (1.0, 0.0)}),
)


def _error_of(bad: Bad) -> ErrorOptimizerInput:
    when = OptimizerErrorEnum.STEP_ERROR if bad.on_step else OptimizerErrorEnum.CONSTRUCTION_ERROR
    params: Any = bad.params() if bad.params else None
    return ErrorOptimizerInput(  # type: ignore[no-untyped-call]
        OptimizerInput(params, dict(bad.options), bad.match),
        error_on=when,
        error_type=bad.error,
        error_regex=bad.match,
    )


def _errors_of(name: str) -> Callable[..., list[ErrorOptimizerInput]]:
    torchs = TORCHS.get(TWIN.get(name, name))
    known = torchs.optim_error_inputs_func if torchs else get_error_inputs_for_all_optims
    ratio = (Bad(TypeError, f"{name} has its own trust ratio", {"trust": TRUST}),)
    own = ratio if name in NO_RATIO else BAD_RATIO

    def errors(device: Any, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
        theirs = [error for error in known(device, dtype) if not _is_a_limit(error)]
        ours = (*BAD, *own, *(BAD_LION if name == "Lion" else ()))
        return [*theirs, *map(_error_of, ours if torch.device(device).type == "cpu" else ())]

    return errors


def _info(name: str) -> OptimizerInfo:
    torchs = TORCHS.get(TWIN.get(name, name), TORCHS["Adadelta"])
    return OptimizerInfo(
        getattr(date_optim, name),
        optim_inputs_func=_inputs_of(name),
        optim_error_inputs_func=_errors_of(name),
        scheduler_inputs=torchs.scheduler_inputs,
        supported_impls=("foreach", "fused"),
        supports_fused_on=("cpu", "cuda"),
        has_capturable_arg=True,
        supports_complex=False,
        not_og_supported_flags=(
            *("foreach", "differentiable", "fused", "maximize", "capturable"),
            # "trust" stays: without it a state is torch's, whose buffer has no other scaling.
            *((Layerwise.__annotations__.keys() | group_options(None).keys()) - {"trust"}),
        ),
        skips=tuple(
            DecorateInfo(unittest.skip(DECLARED[test]), SUITE, test)  # type: ignore[no-untyped-call]
            for test in SKIPPED_EVERYWHERE
        ),
    )


INFOS = [
    _info(name)
    for name in (
        *("SGD", "RMSprop", "Adagrad", "Adam", "AdamW", "Adadelta", "Lion"),
        *NO_RATIO,
    )
]
"""What may take the place of torch's own ``optim_db``."""
