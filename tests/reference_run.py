"""Runs of the float64 reference on plain groups: what the tests of the reference share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from date_kernels import reference
from date_kernels.reference import Layer, Telemetry

Array = NDArray[np.float64]
Options = dict[str, Any]

INF, NAN = np.inf, np.nan

COMMON: Options = {
    "lr": 0.1,
    "weight_decay": 0.0,
    "weight_decay_in": "gradient",
    "maximize": False,
    "max_grad_norm": None,
    "on_nonfinite": "propagate",
    "master_weights": False,
    "momentum_scaling": "outside",
    "trust": True,
    "trust_of": "gradient",
    "trust_weight_decay": "ignored",
    "trust_coefficient": 1.0,
    "trust_lower": 0.0,
    "trust_upper": INF,
    "trust_bounds": "constant",
    "trust_final": None,
    "trust_gamma": None,
    "trust_eps": 0.0,
    "trust_zero_norm": 1.0,
    "trust_weight_norm_bounds": None,
    "trust_clip_by_lr": False,
    "trust_skip_without_decay": False,
}
SGD: Options = {**COMMON, "momentum": 0.0, "dampening": 0.0, "nesterov": False}
RMSPROP: Options = {
    **COMMON,
    "momentum": 0.0,
    "alpha": 0.99,
    "eps": 1e-8,
    "centered": False,
    "eps_inside_sqrt": False,
    "initial_square_avg": 0.0,
}
ADAGRAD: Options = {**COMMON, "lr_decay": 0.0, "initial_accumulator_value": 0.0, "eps": 1e-10}
ADAM: Options = {
    **COMMON,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "amsgrad": False,
    "bias_correction": True,
}
ADADELTA: Options = {**COMMON, "rho": 0.9, "eps": 1e-6}
DEFAULTS = {
    "sgd": SGD,
    "rmsprop": RMSPROP,
    "adagrad": ADAGRAD,
    "adam": ADAM,
    "adadelta": ADADELTA,
}

SCALINGS = ("outside", "inside", "ratio_inside")
INSIDE, RATIO_INSIDE = {"momentum_scaling": "inside"}, {"momentum_scaling": "ratio_inside"}
PLACES = ("gradient", "update", "weights")
RMSPROP_TF1: Options = {
    "alpha": 0.9,
    "eps": 1e-10,
    "eps_inside_sqrt": True,
    "initial_square_avg": 1.0,
}
ADAGRAD_TF1: Options = {"initial_accumulator_value": 0.1, "eps": 0.0}
LAMB: Options = {"trust_of": "update", "weight_decay_in": "update", "eps": 1e-6}

W, G = [3.0, 4.0], [0.0, 2.0]  # norms 5 and 2
W4 = [0.5, -0.4, 0.3, 1.2]

FORMS: list[tuple[str, Options]] = [
    ("sgd", {}),
    *(("sgd", {"momentum": 0.9, "momentum_scaling": s}) for s in SCALINGS),
    *(("sgd", {"momentum": 0.9, "momentum_scaling": s, "nesterov": True}) for s in SCALINGS),
    *(("sgd", {"momentum": 0.9, "momentum_scaling": s, "dampening": 0.9}) for s in SCALINGS),
    ("rmsprop", {}),
    ("rmsprop", {**RMSPROP_TF1, "centered": True}),
    *(("rmsprop", {"momentum": 0.9, "momentum_scaling": s}) for s in SCALINGS),
    ("rmsprop", {"momentum": 0.9, "momentum_scaling": "inside", "centered": True}),
    ("adagrad", {}),
    ("adagrad", {**ADAGRAD_TF1, "lr_decay": 0.1}),
    ("adam", {}),
    ("adam", {"amsgrad": True}),
    ("adam", {"bias_correction": False, "eps": 1e-6}),
    ("adadelta", {}),
]
each_form = pytest.mark.parametrize(("rule", "options"), FORMS, ids=str)


def fresh_states(rule: str, group: Options) -> dict[str, float | None]:
    """Return what each of the rule's states starts from, None where the options use none."""
    momentum = 0.0 if group.get("momentum", 0.0) != 0 else None
    of_rules: dict[str, dict[str, float | None]] = {
        "sgd": {"momentum_buffer": momentum},
        "rmsprop": {
            "square_avg": group.get("initial_square_avg"),
            "grad_avg": 0.0 if group.get("centered") else None,
            "momentum_buffer": momentum,
        },
        "adagrad": {"sum": group.get("initial_accumulator_value")},
        "adam": {
            "exp_avg": 0.0,
            "exp_avg_sq": 0.0,
            "max_exp_avg_sq": 0.0 if group.get("amsgrad") else None,
        },
        "adadelta": {"square_avg": 0.0, "acc_delta": 0.0},
    }
    return of_rules[rule]


class Run:
    """Layers with fresh states, and the steps they take."""

    def __init__(self, rule: str, weights: list[Any], *groups: Options) -> None:
        self.rule = rule
        self.params = [np.array(w, dtype=np.float64) for w in weights]
        self.groups: list[Options] = [{**DEFAULTS[rule], **group} for group in groups]
        if len(groups) == 1:
            self.groups[0].setdefault("params", list(range(len(weights))))
        self.steps = [np.zeros(()) for _ in weights]
        of = {i: fresh_states(rule, group) for group in self.groups for i in group["params"]}
        self.states: dict[str, list[Array | None]] = {
            key: [
                None if (value := of[i][key]) is None else np.full_like(param, value)
                for i, param in enumerate(self.params)
            ]
            for key in fresh_states(rule, self.groups[0])
        }

    def step(self, grads: list[Any], **kwargs: Any) -> Telemetry:
        """Take one step."""
        gradients = [np.array(g, dtype=np.float64) for g in grads]
        before = [g.copy() for g in gradients]
        telemetry = reference.step(
            self.rule, self.params, gradients, self.states, self.steps, self.groups, **kwargs
        )
        for now, then in zip(gradients, before, strict=True):
            np.testing.assert_array_equal(now, then)
        return telemetry

    def layers(self, grads: list[Any]) -> list[Layer]:
        """Return the layers as they stand before a step."""
        gradients, _, _ = reference.prepare(
            [np.array(g, dtype=np.float64) for g in grads], self.groups
        )
        return reference.layers(
            self.rule, self.params, gradients, self.states, self.steps, self.groups
        )

    def snapshot(self, i: int) -> list[Array]:
        """Return copies of all that belongs to layer `i`."""
        states = [of[i] for of in self.states.values()]
        return [x.copy() for x in (self.params[i], self.steps[i], *states) if x is not None]


def one_step(rule: str, weight: Any, grad: Any, **options: Any) -> tuple[Array, Telemetry]:
    """Return the weights after one step from fresh states, and its telemetry."""
    run = Run(rule, [weight], options)
    telemetry = run.step([grad])
    return run.params[0], telemetry


def gradients(n: int = 3, size: int = 4, seed: int = 0) -> Iterator[Array]:
    """Yield standard normal gradients."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(size) for _ in range(n))
