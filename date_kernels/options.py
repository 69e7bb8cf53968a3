"""The options of a param group that every rule has, and what a number in a group may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Group = Mapping[str, Any]


def is_on_device(value: Any) -> bool:
    """Whether an option is a tensor that cannot be read without waiting for its device."""
    return getattr(getattr(value, "device", None), "type", "cpu") != "cpu"


@dataclass(frozen=True)
class DeviceNumber:
    """An option that a kernel reads where it lies: equal if it lies at the same place."""

    tensor: Any = field(compare=False)
    address: int = field(init=False)
    is_double: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "address", self.tensor.data_ptr())
        object.__setattr__(self, "is_double", self.tensor.element_size() == 8)


COMMON_OPTIONS: dict[str, Any] = {
    "weight_decay": 0.0,
    "weight_decay_in": "gradient",
    "maximize": False,
    "max_grad_norm": None,
    "on_nonfinite": "propagate",
    "master_weights": False,
    "state_dtype": None,
    "momentum_scaling": "outside",
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
    "weight_decay_in": ("gradient", "update", "weights"),
    "on_nonfinite": ("propagate", "skip"),
    "trust_of": ("gradient", "update"),
    "trust_weight_decay": ("ignored", "added", "combined"),
    "trust_bounds": ("constant", "adabound"),
    "momentum_scaling": ("outside", "inside", "ratio_inside"),
}
"""The words an option may be."""


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
