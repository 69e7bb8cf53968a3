"""The families of rules: their states, their options and the rows of numbers that kernels read.

This is the only Python list of rules; ``csrc/rules/all.h`` is the C++ one. A *group* is a dict of
plain scalars with torch's names; a *row* holds what a kernel needs of it at one step, derived in
float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any

Group = Mapping[str, Any]

COMMON_OPTIONS: dict[str, Any] = {
    "weight_decay": 0.0,
    "maximize": False,
    "max_grad_norm": None,
    "on_nonfinite": "propagate",
    "trust": False,
    "trust_of": "gradient",
    "trust_weight_decay": "ignored",
    "trust_coefficient": 1.0,
    "trust_lower": 0.0,
    "trust_upper": math.inf,
    "trust_bounds": "constant",
    "trust_final": None,
    "trust_gamma": None,
    "trust_eps": 0.0,
    "trust_zero_norm": 1.0,
    "trust_weight_norm_bounds": None,
    "trust_clip_by_lr": False,
    "trust_skip_without_decay": False,
}
"""Options that every rule has, with their defaults. A group must state ``lr`` itself."""

CHOICES: dict[str, tuple[str, ...]] = {
    "on_nonfinite": ("propagate", "skip"),
    "trust_of": ("gradient", "update"),
    "trust_weight_decay": ("ignored", "added", "combined"),
    "trust_bounds": ("constant", "adabound"),
    "momentum_scaling": ("outside", "inside", "ratio_inside"),
}
"""The words an option may be."""


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
    row : callable
        ``row(group, k)``: the rule's own fields of a row at the layer's step ``k``, 1-based.
    """

    name: str
    states: tuple[str, ...]
    options: dict[str, Any]
    used: Callable[[Group], tuple[str, ...]]
    counts_steps: Callable[[Group], bool]
    check: Callable[[Group], None]
    row: Callable[[Group, int], dict[str, float]]

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Every option of a group."""
        return ("lr", *COMMON_OPTIONS, *self.options)

    @cached_property
    def values(self) -> Callable[[Group], tuple[Any, ...]]:
        """Every option of a complete group in one order: equal values make equal rows."""
        return itemgetter(*self.keys)

    def complete(self, group: Group) -> dict[str, Any]:
        """The group with the options that it leaves out at their defaults, as plain values.

        One-element tensors, which schedulers fill in place, become numbers, and lists tuples: what
        was compared with the last step must not change under it.

        Raises
        ------
        ValueError
            Where ``lr`` is missing.
        """
        if "lr" not in group:
            raise ValueError("a group must state its learning rate: 'lr' is missing")
        complete = {**COMMON_OPTIONS, **self.options, **group}
        for key in (*self.keys, "params", "exclude"):
            value: Any = complete.get(key)
            if isinstance(value, list):
                complete[key] = tuple(value)
            elif hasattr(value, "item"):
                complete[key] = value.item()
        return complete


def number(
    group: Group, key: str, *, below: float = math.inf, what: str = "", low: float = 0.0
) -> float:
    """The option as a float in ``[low, below)``, or in ``[low, inf]`` without `below`.

    Raises
    ------
    ValueError
        In torch's words: ``Invalid <what>: <value>``.
    """
    value = group[key]
    try:
        x = float(value)
    except (TypeError, ValueError):
        x = math.nan
    inside = low <= x < below if below != math.inf else low <= x
    if not inside or isinstance(value, str):
        bound = f"in [{low}, {below})" if below != math.inf else f"at least {low}"
        raise ValueError(f"Invalid {what or key + ' value'}: {value}; {key} must be {bound}")
    return x


def finite(group: Group, key: str, *, what: str = "", low: float = 0.0) -> float:
    """As `number`, and not infinite."""
    x = number(group, key, what=what, low=low)
    if math.isinf(x):
        raise ValueError(f"Invalid {what or key + ' value'}: {x}; {key} must be finite")
    return x


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
    finite(group, "lr", what="learning rate")
    finite(group, "weight_decay")
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
    _check_trust(rule, group)


def _check_trust(rule: Rule, group: Group) -> None:
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
    if group["trust_of"] == "update":
        if group["trust_weight_decay"] != "ignored":
            raise ValueError(
                f"trust_weight_decay={group['trust_weight_decay']!r} is for "
                "trust_of='gradient': "
                "an update's norm holds its decay already"
            )
        if group.get("momentum_scaling", "outside") != "outside":
            raise ValueError(
                f"momentum_scaling={group['momentum_scaling']!r} with "
                "trust_of='update' is circular: "
                "the buffer would depend on the ratio that its own norm decides; use 'outside'"
            )
        if group["trust"]:
            raise ValueError(
                f"trust_of='update' is not there for rule {rule.name!r} yet; use 'gradient'"
            )


def _check_weight_norm_bounds(bounds: Any) -> None:
    pair = bounds if isinstance(bounds, tuple) else ()
    numbers = len(pair) == 2 and all(isinstance(bound, (int, float)) for bound in pair)
    if not numbers or not 0 <= pair[0] <= pair[1]:
        raise ValueError(
            f"Invalid trust_weight_norm_bounds value: {bounds!r}; take None or (low, high) "
            "with 0 <= low <= high"
        )


def is_measured(group: Group, excluded: bool) -> bool:
    """Whether a layer's norms are taken: trust is on and nothing exempts the layer."""
    exempt = excluded or (group["trust_skip_without_decay"] and group["weight_decay"] == 0)
    return bool(group["trust"]) and not exempt


def needs_step(rule: Rule, group: Group) -> bool:
    """Whether the group's layers need a step counter: for the rule, or for bounds that move."""
    moving = bool(group["trust"]) and group["trust_bounds"] == "adabound"
    return moving or rule.counts_steps(group)


def hyper_row(
    rule: Rule, group: Group, excluded: bool, k: int, grad_scale: float
) -> dict[str, float]:
    """The row of hyper-parameters of a layer at its step `k`, 1-based (``csrc/rules``)."""
    decay = 0.0 if excluded else float(group["weight_decay"])
    scaling = group.get("momentum_scaling", "outside")
    return {
        "lr": float(group["lr"]),
        "lr_inside": float(scaling == "inside"),
        "ratio_inside": float(scaling != "outside"),
        "gradient_scale": (-1.0 if group["maximize"] else 1.0) / grad_scale,
        "decay": decay,
        "measured_decay": decay if group["trust_weight_decay"] == "combined" else 0.0,
        **rule.row(group, k),
    }


def trust_row(group: Group, excluded: bool, k: int) -> dict[str, float]:
    """The row of the bounded trust ratio of a layer at its step `k`, 1-based.

    The moving bounds are AdaBound's (Luo et al. 2019), which DATE names as the model of its own.
    """
    lower, upper = group["trust_lower"], group["trust_upper"]
    if group["trust_bounds"] == "adabound":
        final, gamma = group["trust_final"], group["trust_gamma"]
        lower, upper = final * (1 - 1 / (gamma * k + 1)), final * (1 + 1 / (gamma * k))
    phi = group["trust_weight_norm_bounds"] or (0.0, math.inf)
    added = group["trust_weight_decay"] == "added" and not excluded
    return {
        "coefficient": group["trust_coefficient"],
        "lower": lower,
        "upper": upper,
        "eps": group["trust_eps"],
        "zero_norm": group["trust_zero_norm"],
        "added_decay": group["weight_decay"] if added else 0.0,
        "weight_norm_lower": phi[0],
        "weight_norm_upper": phi[1],
        "clip_by_lr": float(group["trust_clip_by_lr"]),
        "lr": float(group["lr"]),
    }


def _check_momentum(group: Group) -> None:
    momentum = finite(group, "momentum")
    if group["momentum_scaling"] != "outside" and momentum == 0:
        raise ValueError(
            f"momentum_scaling={group['momentum_scaling']!r} needs a momentum "
            "buffer, but momentum is 0; "
            "use momentum_scaling='outside', which is the same without one"
        )


def _check_sgd(group: Group) -> None:
    _check_momentum(group)
    finite(group, "dampening", low=-math.inf)
    if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
        raise ValueError(
            "Nesterov momentum requires a momentum and zero dampening, "
            f"but momentum={group['momentum']} and dampening={group['dampening']}"
        )


def _sgd_row(group: Group, k: int) -> dict[str, float]:
    return {
        "momentum": float(group["momentum"]),
        "one_minus_dampening": 1.0 if k == 1 else 1.0 - float(group["dampening"]),
        "nesterov": float(group["nesterov"]),
    }


SGD = Rule(
    name="sgd",
    states=("momentum_buffer",),
    options={
        "momentum": 0.0,
        "dampening": 0.0,
        "nesterov": False,
        "momentum_scaling": "outside",
    },
    used=lambda group: ("momentum_buffer",) if group["momentum"] != 0 else (),
    # The first step is undamped, and a buffer that exists does not prove a first step: it may have
    # been skipped.
    counts_steps=lambda group: bool(group["momentum"] != 0 and group["dampening"] != 0),
    check=_check_sgd,
    row=_sgd_row,
)


def _check_rmsprop(group: Group) -> None:
    _check_momentum(group)
    number(group, "alpha", below=1.0)
    finite(group, "eps")
    finite(group, "initial_square_avg")


def _rmsprop_used(group: Group) -> tuple[str, ...]:
    return (
        "square_avg",
        *(("grad_avg",) if group["centered"] else ()),
        *(("momentum_buffer",) if group["momentum"] != 0 else ()),
    )


def _rmsprop_row(group: Group, k: int) -> dict[str, float]:
    alpha, eps, inside = float(group["alpha"]), float(group["eps"]), group["eps_inside_sqrt"]
    return {
        "alpha": alpha,
        "one_minus_alpha": 1.0 - alpha,
        "eps_inside": eps if inside else 0.0,
        "eps_outside": 0.0 if inside else eps,
        "momentum": float(group["momentum"]),
        "centered": float(group["centered"]),
    }


RMSPROP = Rule(
    name="rmsprop",
    states=("square_avg", "grad_avg", "momentum_buffer"),
    options={
        "alpha": 0.99,
        "eps": 1e-8,
        "momentum": 0.0,
        "centered": False,
        "momentum_scaling": "outside",
        "eps_inside_sqrt": False,
        "initial_square_avg": 0.0,
    },
    used=_rmsprop_used,
    counts_steps=lambda group: True,  # torch keeps one
    check=_check_rmsprop,
    row=_rmsprop_row,
)

RULES: dict[str, Rule] = {rule.name: rule for rule in (SGD, RMSPROP)}
"""Every family by name, in the order of ``csrc/rules/all.h``."""
