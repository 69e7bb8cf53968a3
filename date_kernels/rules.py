"""The families of rules: their states, their options and the rows of numbers that kernels read.

This is the only Python list of rules; ``csrc/rules/all.h`` is the C++ one. A *group* is a dict of
plain scalars with torch's names; a *row* holds what a kernel needs of it, derived in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from typing import Any

from .options import (
    CHOICES,
    COMMON_OPTIONS,
    DeviceNumber,
    Group,
    finite,
    is_on_device,
    number,
)


@dataclass(frozen=True)
class Rule:
    """A family of rules.

    Attributes
    ----------
    name : str
        Its name in :func:`date_kernels.step`.
    states : tuple of str
        torch's keys of its states, in the kernels' order.
    options : dict
        Options beyond the common ones, with their defaults.
    used : callable
        The states that a group's options use.
    counts_steps : callable
        Whether a group's layers need a step counter.
    check : callable
        Raises ValueError for options that contradict each other or leave their range.
    constants : callable
        ``constants(group)``: the rule's own numbers (`row_of`).
    variants : mapping
        Options by name that together reach every loop and every option of the rule: what tests
        and benchmarks run over.
    starts : mapping
        The option that a state starts from, by the state's key; other states start from 0.
    squares : tuple of str
        States that are sums or averages of squares.
    torch_saves_step : bool
        Whether the checkpoints of torch's twin hold a step counter.
    """

    name: str
    states: tuple[str, ...]
    options: dict[str, Any]
    used: Callable[[Group], tuple[str, ...]]
    counts_steps: Callable[[Group], bool]
    check: Callable[[Group], None]
    constants: Callable[[Group], dict[str, float]]
    variants: Mapping[str, Mapping[str, Any]]
    starts: Mapping[str, str] = field(default_factory=dict)
    squares: tuple[str, ...] = ()
    torch_saves_step: bool = True

    def start(self, state: str, group: Group) -> float:
        """What a state starts from."""
        return float(group[self.starts[state]]) if state in self.starts else 0.0

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Every option of a group."""
        return ("lr", *COMMON_OPTIONS, *self.options)

    @cached_property
    def values(self) -> Callable[[Group], tuple[Any, ...]]:
        """Every option of a complete group in one order: equal values make equal rows."""
        return itemgetter(*self.keys)

    def complete(self, group: Group, *, rate_on_device: bool = False) -> dict[str, Any]:
        """The group with the options that it leaves out at their defaults, as plain values.

        One-element tensors, which schedulers fill in place, become numbers, and lists tuples: what
        was compared with the last step must not change under it.

        Parameters
        ----------
        group : mapping
        rate_on_device : bool
            A learning rate on another device than the CPU stays there, as a `DeviceNumber`.

        Raises
        ------
        ValueError
            Where ``lr`` is missing, or an option is a tensor of several elements.
        """
        if "lr" not in group:
            raise ValueError("a group must state its learning rate: 'lr' is missing")
        complete = {**COMMON_OPTIONS, **self.options, **group}
        if rate_on_device and is_on_device(group["lr"]):
            complete["lr"] = DeviceNumber(group["lr"])
        for key in self.keys:
            if type(complete[key]) not in _PLAIN:
                complete[key] = _plain(complete[key], key)
        for key in ("params", "exclude"):
            if isinstance(complete.get(key), list):
                complete[key] = tuple(complete[key])
        return complete


_PLAIN = frozenset((float, int, bool, str, type(None)))


def _plain(value: Any, key: str) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_plain(part, key) for part in value)
    if not hasattr(value, "item"):
        return value
    try:
        return value.item()
    except (RuntimeError, ValueError):
        raise ValueError(f"Invalid {key} value: {value}; {key} must be one number") from None


def check_rate(group: Group) -> None:
    """Refuse a learning rate below 0; one on a device is the device's own."""
    if not isinstance(group["lr"], DeviceNumber):
        finite(group, "lr", what="learning rate")


def check_group(rule: Rule, group: Group) -> None:
    """Refuse options out of their range or at odds with each other.

    Parameters
    ----------
    rule : Rule
    group : mapping
        Complete: every option of the rule stands in it.

    Raises
    ------
    ValueError
        It names the option, shows what came and says what to do.
    """
    check_rate(group)
    finite(group, "weight_decay")
    for key in group:
        if key.startswith("trust_") and key not in COMMON_OPTIONS:
            known = ", ".join(name for name in COMMON_OPTIONS if name.startswith("trust_"))
            raise ValueError(f"{key!r} is no option of the ratio; there are {known}")
    for key, default in (COMMON_OPTIONS | rule.options).items():
        if isinstance(default, bool) and not isinstance(group[key], bool):
            raise ValueError(f"Invalid {key} value: {group[key]!r}; {key} must be True or False")
    for key, words in CHOICES.items():
        if key in group and group[key] not in words:
            raise ValueError(f"Invalid {key} value: {group[key]!r}; take one of {', '.join(words)}")
    if group["max_grad_norm"] is not None and finite(group, "max_grad_norm") == 0:
        raise ValueError(
            "Invalid max_grad_norm value: 0; it must be above 0, or None for no clipping"
        )
    rule.check(group)
    _check_trust(group)
    if group["momentum_scaling"] != "outside":
        _check_momentum_scaling(rule, group)


def _check_momentum_scaling(rule: Rule, group: Group) -> None:
    scaling = group["momentum_scaling"]
    if group.get("momentum", 0) == 0:
        raise ValueError(
            f"momentum_scaling={scaling!r} needs a momentum buffer, but "
            + ("momentum is 0" if "momentum" in rule.options else f"rule {rule.name!r} has none")
            + "; use momentum_scaling='outside', which is the same without one"
        )
    if group["trust_of"] == "update":
        raise ValueError(
            f"momentum_scaling={scaling!r} with trust_of='update' is circular: the buffer would "
            "depend on the ratio that its own norm decides; use 'outside'"
        )


def _check_trust(group: Group) -> None:
    for key in ("trust_coefficient", "trust_eps", "trust_zero_norm"):
        finite(group, key)
    number(group, "trust_upper")
    if finite(group, "trust_lower") > group["trust_upper"]:
        raise ValueError(
            f"trust_lower={group['trust_lower']} is above trust_upper={group['trust_upper']}; "
            "a lower bound may not exceed the upper one"
        )
    if group["trust_bounds"] == "adabound":
        for key in ("trust_final", "trust_gamma"):
            if group[key] is None or finite(group, key) == 0:
                raise ValueError(
                    f"trust_bounds='adabound' needs {key} above 0, but it is {group[key]}"
                )
    if group["trust_weight_norm_bounds"] is not None:
        _check_weight_norm_bounds(group["trust_weight_norm_bounds"])
    if group["trust_of"] == "update" and group["trust_weight_decay"] != "ignored":
        raise ValueError(
            f"trust_weight_decay={group['trust_weight_decay']!r} is for trust_of='gradient': an "
            "update's norm holds its decay already"
        )


def _check_weight_norm_bounds(bounds: Any) -> None:
    pair = bounds if isinstance(bounds, tuple) else ()
    numbers = len(pair) == 2 and all(isinstance(bound, (int, float)) for bound in pair)
    if not numbers or not 0 <= pair[0] <= pair[1] or math.isinf(pair[0]):
        raise ValueError(
            f"Invalid trust_weight_norm_bounds value: {bounds!r}; take None or (low, high) "
            "with 0 <= low <= high, low finite"
        )


def check_common(groups: Sequence[Group]) -> None:
    """Refuse groups that differ where one decision serves the whole step.

    Raises
    ------
    ValueError
        It names the option and shows the values.
    """
    for key in ("max_grad_norm", "on_nonfinite"):
        values = list(dict.fromkeys(group[key] for group in groups))
        if len(values) > 1:
            raise ValueError(
                f"{key} is one decision for all param groups, but they differ: {values}; "
                "give every group the same"
            )


def is_measured(group: Group, excluded: bool) -> bool:
    """Whether a layer's norms are taken: trust is on and nothing exempts the layer."""
    exempt = excluded or (group["trust_skip_without_decay"] and group["weight_decay"] == 0)
    return bool(group["trust"]) and not exempt


def needs_step(rule: Rule, group: Group) -> bool:
    """Whether the group's layers need a step counter: for the rule, or for bounds that move."""
    moving = bool(group["trust"]) and group["trust_bounds"] == "adabound"
    return moving or rule.counts_steps(group)


def row_of(rule: Rule, group: Group, excluded: bool) -> dict[str, float]:
    """The numbers of a layer's options by the names of ``csrc/row.h`` and of its rule's header.

    No step changes them: kernels work out what it adds (a decaying rate, bias corrections, moving
    bounds) from the layer's own counter. ``lr_address`` is an address, 0 for a rate in ``lr``.
    """
    lr = group["lr"]
    on_device = isinstance(lr, DeviceNumber)
    decay = 0.0 if excluded else float(group["weight_decay"])
    place = group["weight_decay_in"]
    scaling = group["momentum_scaling"]
    moving = group["trust_bounds"] == "adabound"
    phi = group["trust_weight_norm_bounds"] or (0.0, math.inf)
    return {
        "lr": 0.0 if on_device else float(lr),
        "lr_address": lr.address if on_device else 0,
        "lr_double": float(on_device and lr.is_double),
        "lr_decay": float(group.get("lr_decay", 0.0)),
        "lr_inside": float(scaling == "inside"),
        "ratio_inside": float(scaling != "outside"),
        "sign": -1.0 if group["maximize"] else 1.0,
        "gradient_decay": decay if place == "gradient" else 0.0,
        "update_decay": decay if place == "update" else 0.0,
        "weights_decay": decay if place == "weights" else 0.0,
        "of_update": float(group["trust_of"] == "update"),
        "measured_decay": decay if group["trust_weight_decay"] == "combined" else 0.0,
        "coefficient": float(group["trust_coefficient"]),
        "lower": float(group["trust_lower"]),
        "upper": float(group["trust_upper"]),
        "trust_eps": float(group["trust_eps"]),
        "zero_norm": float(group["trust_zero_norm"]),
        "added_decay": decay if group["trust_weight_decay"] == "added" else 0.0,
        "weight_norm_lower": phi[0],
        "weight_norm_upper": phi[1],
        "clip_by_lr": float(group["trust_clip_by_lr"]),
        "moving": float(moving),
        "final": float(group["trust_final"]) if moving else 0.0,
        "gamma": float(group["trust_gamma"]) if moving else 0.0,
        **rule.constants(group),
    }


def _check_sgd(group: Group) -> None:
    finite(group, "momentum")
    finite(group, "dampening", low=-math.inf)
    if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
        raise ValueError(
            "Nesterov momentum requires a momentum and zero dampening, "
            f"but momentum={group['momentum']} and dampening={group['dampening']}"
        )


def _sgd_constants(group: Group) -> dict[str, float]:
    return {
        "momentum": float(group["momentum"]),
        "one_minus_dampening": 1.0 - float(group["dampening"]),
        "nesterov": float(group["nesterov"]),
    }


SGD = Rule(
    name="sgd",
    states=("momentum_buffer",),
    options={
        "momentum": 0.0,
        "dampening": 0.0,
        "nesterov": False,
    },
    used=lambda group: ("momentum_buffer",) if group["momentum"] != 0 else (),
    # The first step is undamped, and a buffer that exists does not prove a first step: it may have
    # been skipped.
    counts_steps=lambda group: bool(group["momentum"] != 0 and group["dampening"] != 0),
    check=_check_sgd,
    constants=_sgd_constants,
    variants={
        "plain": {},
        "momentum": {"momentum": 0.9},
        "dampened": {"momentum": 0.9, "dampening": 0.25},
        "nesterov": {"momentum": 0.9, "nesterov": True},
    },
    torch_saves_step=False,
)


def _check_eps(group: Group) -> None:
    finite(group, "eps", what="epsilon value")


def _check_rmsprop(group: Group) -> None:
    finite(group, "momentum")
    number(group, "alpha", below=1.0)
    _check_eps(group)
    finite(group, "initial_square_avg")


def _rmsprop_used(group: Group) -> tuple[str, ...]:
    return (
        "square_avg",
        *(("grad_avg",) if group["centered"] else ()),
        *(("momentum_buffer",) if group["momentum"] != 0 else ()),
    )


def _rmsprop_constants(group: Group) -> dict[str, float]:
    alpha, eps, inside = float(group["alpha"]), float(group["eps"]), group["eps_inside_sqrt"]
    return {
        "alpha": alpha,
        "one_minus_alpha": 1.0 - alpha,
        "eps_inside": eps if inside else 0.0,
        "eps_outside": 0.0 if inside else eps,
        "momentum": float(group["momentum"]),
        "centered": float(group["centered"]),
    }


_RMSPROP_TF1 = {"alpha": 0.9, "eps": 1e-10, "eps_inside_sqrt": True, "initial_square_avg": 1.0}

RMSPROP = Rule(
    name="rmsprop",
    states=("square_avg", "grad_avg", "momentum_buffer"),
    options={
        "alpha": 0.99,
        "eps": 1e-8,
        "momentum": 0.0,
        "centered": False,
        "eps_inside_sqrt": False,
        "initial_square_avg": 0.0,
    },
    used=_rmsprop_used,
    counts_steps=lambda group: True,  # torch keeps one
    check=_check_rmsprop,
    constants=_rmsprop_constants,
    variants={
        "plain": {},
        "centered": {"centered": True, "eps": 1e-3},
        "momentum": {"alpha": 0.9, "momentum": 0.9},
        "centered-momentum": {"centered": True, "eps": 1e-3, "momentum": 0.9},
        "tf1": _RMSPROP_TF1,
        "tf1-centered-momentum": {**_RMSPROP_TF1, "centered": True, "eps": 1e-3, "momentum": 0.9},
    },
    starts={"square_avg": "initial_square_avg"},
    squares=("square_avg",),
)


def _check_adagrad(group: Group) -> None:
    finite(group, "lr_decay")
    finite(group, "initial_accumulator_value")
    _check_eps(group)


ADAGRAD = Rule(
    name="adagrad",
    states=("sum",),
    options={"lr_decay": 0.0, "initial_accumulator_value": 0.0, "eps": 1e-10},
    used=lambda group: ("sum",),
    counts_steps=lambda group: True,
    check=_check_adagrad,
    constants=lambda group: {"eps": float(group["eps"])},
    variants={
        "plain": {},
        "decayed": {"lr_decay": 0.1},
        "tf1": {"initial_accumulator_value": 0.1, "eps": 0.0},
    },
    starts={"sum": "initial_accumulator_value"},
    squares=("sum",),
)


def _check_betas(group: Group) -> None:
    betas = group["betas"]
    if not isinstance(betas, tuple) or len(betas) != 2:
        raise ValueError(f"Invalid betas value: {betas!r}; betas must be a pair of numbers")
    for index, beta in enumerate(betas):
        number({"betas": beta}, "betas", below=1.0, what=f"beta parameter at index {index}")


def _check_adam(group: Group) -> None:
    _check_betas(group)
    _check_eps(group)


def _beta_constants(group: Group) -> dict[str, float]:
    beta1, beta2 = map(float, group["betas"])
    return {
        "beta1": beta1,
        "beta2": beta2,
        "one_minus_beta1": 1.0 - beta1,
        "one_minus_beta2": 1.0 - beta2,
    }


def _adam_constants(group: Group) -> dict[str, float]:
    return {
        **_beta_constants(group),
        "eps": float(group["eps"]),
        "amsgrad": float(group["amsgrad"]),
        "bias_correction": float(group["bias_correction"]),
    }


ADAM = Rule(
    name="adam",
    states=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    options={"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False, "bias_correction": True},
    used=lambda group: (
        "exp_avg",
        "exp_avg_sq",
        *(("max_exp_avg_sq",) if group["amsgrad"] else ()),
    ),
    counts_steps=lambda group: True,
    check=_check_adam,
    constants=_adam_constants,
    variants={
        "plain": {},
        "amsgrad": {"betas": (0.8, 0.95), "amsgrad": True},
        "uncorrected": {"bias_correction": False, "eps": 1e-6},
    },
    squares=("exp_avg_sq", "max_exp_avg_sq"),
)


def _check_adadelta(group: Group) -> None:
    if number(group, "rho") > 1:  # 1 itself is torch's, too
        raise ValueError(f"Invalid rho value: {group['rho']}; rho must be in [0, 1]")
    _check_eps(group)


ADADELTA = Rule(
    name="adadelta",
    states=("square_avg", "acc_delta"),
    options={"rho": 0.9, "eps": 1e-6},
    used=lambda group: ("square_avg", "acc_delta"),
    counts_steps=lambda group: True,
    check=_check_adadelta,
    constants=lambda group: {
        "rho": float(group["rho"]),
        "one_minus_rho": 1.0 - float(group["rho"]),
        "eps": float(group["eps"]),
    },
    variants={"plain": {}, "fast": {"rho": 0.7, "eps": 1e-3}},
    squares=("square_avg", "acc_delta"),
)

LION = Rule(
    name="lion",
    states=("exp_avg",),
    options={"betas": (0.9, 0.99)},
    used=lambda group: ("exp_avg",),
    counts_steps=lambda group: False,
    check=_check_betas,
    constants=_beta_constants,
    variants={"plain": {}, "fast": {"betas": (0.5, 0.6)}},
)

RULES: dict[str, Rule] = {rule.name: rule for rule in (SGD, RMSPROP, ADAGRAD, ADAM, ADADELTA, LION)}
"""Every family by name, in the order of ``csrc/rules/all.h``."""
