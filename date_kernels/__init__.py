"""Fused layer-wise optimizer steps: the kernels, the plan that drives them, the float64 truth.

`date_optim` holds the torch optimizers on top.
"""

from .dispatch import Info, Stepper, info, make_stepper, step
from .layers import new_state
from .reference import Telemetry
from .rules import RULES

__all__ = ["RULES", "Info", "Stepper", "Telemetry", "info", "make_stepper", "new_state", "step"]
