"""Fused layer-wise optimizer steps: the kernels, the plan that drives them, the float64 truth.

`date_optim` holds the torch optimizers on top.
"""

from .collect import make_collect
from .dispatch import Info, info, make_stepper, step
from .layers import (
    MASTER,
    MOST_STEPS,
    check_saved_state,
    check_state_dtype,
    has_master,
    new_state,
    state_dtype,
)
from .reference import Telemetry
from .rules import RULES
from .stepper import Stepper

__all__ = [
    "MASTER",
    "MOST_STEPS",
    "RULES",
    "Info",
    "Stepper",
    "Telemetry",
    "check_saved_state",
    "check_state_dtype",
    "has_master",
    "info",
    "make_collect",
    "make_stepper",
    "new_state",
    "state_dtype",
    "step",
]
