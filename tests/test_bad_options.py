"""Options out of their range or at odds.

They are refused by name, before anything is written: by the constructor, a new group, the state to
load, the next step and `date_kernels.step`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from helpers import (
    TRUST,
    Options,
    bits,
    judged_step,
    make_call,
    optimizer_unchanged,
    random_tensors,
    unchanged,
)
from torch import Tensor
from torch.nn import Parameter

import date_kernels
from date_kernels import make_stepper
from date_optim import (
    DATE,
    LAMB,
    LARS,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    AdamW,
    Lion,
    RMSprop,
    TrustRatio,
)
from date_optim.optimizer import LayerwiseOptimizer

NAN, INF = math.nan, math.inf
SHAPES = [(4, 3), (5,), ()]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]

CLASSES: list[type[LayerwiseOptimizer]] = [SGD, RMSprop, Adagrad, Adam, AdamW, Adadelta, Lion]
every_class = pytest.mark.parametrize("cls", CLASSES)

# --- options --------------------------------------------------------------------------------------

ADABOUND: Options = {"bounds": "adabound"}
BAD_TRUST: list[tuple[Options, str]] = [
    ({"lower": 2.0, "upper": 1.0}, "trust_lower=2.0 is above trust_upper=1.0"),
    ({"lower": -0.1}, "Invalid trust_lower value: -0.1; trust_lower must be at least 0"),
    ({"lower": NAN}, "Invalid trust_lower value: nan"),
    ({"lower": INF}, "Invalid trust_lower value: inf; trust_lower must be finite"),
    ({"lower": None}, "Invalid trust_lower value: None"),
    ({"upper": -1.0}, "Invalid trust_upper value: -1.0"),
    ({"upper": NAN}, "Invalid trust_upper value: nan"),
    ({"upper": "1"}, "Invalid trust_upper value: 1"),
    ({"coefficient": -1.0}, "Invalid trust_coefficient value: -1.0"),
    ({"coefficient": NAN}, "Invalid trust_coefficient value: nan"),
    ({"coefficient": INF}, "Invalid trust_coefficient value: inf"),
    ({"eps": -1e-8}, "Invalid trust_eps value: -1e-08"),
    ({"eps": NAN}, "Invalid trust_eps value: nan"),
    ({"zero_norm": NAN}, "Invalid trust_zero_norm value: nan"),
    ({"zero_norm": -1.0}, "Invalid trust_zero_norm value: -1.0"),
    ({"weight_norm_bounds": (2.0, 1.0)}, r"Invalid trust_weight_norm_bounds value: \(2.0, 1.0\)"),
    ({"weight_norm_bounds": (-1.0, 1.0)}, "Invalid trust_weight_norm_bounds value"),
    ({"weight_norm_bounds": (0.0, NAN)}, "Invalid trust_weight_norm_bounds value"),
    ({"weight_norm_bounds": (NAN, 1.0)}, "Invalid trust_weight_norm_bounds value"),
    ({"weight_norm_bounds": (INF, INF)}, "Invalid trust_weight_norm_bounds value"),
    ({"weight_norm_bounds": ("0", "1")}, "Invalid trust_weight_norm_bounds value"),
    ({"weight_norm_bounds": (0.0, 1.0, 2.0)}, "Invalid trust_weight_norm_bounds value"),
    ({"weight_norm_bounds": 3.0}, r"Invalid trust_weight_norm_bounds value: 3.0; .*\(low, high\)"),
    ({"weight_decay": "summed"}, "Invalid trust_weight_decay value: 'summed'; take one of ignored"),
    ({"of": "weights"}, "Invalid trust_of value: 'weights'; take one of gradient, update"),
    ({"of": None}, "Invalid trust_of value: None; take one of gradient, update"),
    ({"bounds": "constants"}, "Invalid trust_bounds value: 'constants'; take one of constant"),
    ({"clip_by_lr": 1}, "Invalid trust_clip_by_lr value: 1; .* True or False"),
    (
        {"skip_without_decay": "no"},
        "Invalid trust_skip_without_decay value: 'no'; .* True or False",
    ),
    (ADABOUND, "trust_bounds='adabound' needs trust_final above 0, but it is None"),
    ({**ADABOUND, "gamma": 0.1}, "trust_bounds='adabound' needs trust_final above 0, .* None"),
    ({**ADABOUND, "final": 0.1}, "trust_bounds='adabound' needs trust_gamma above 0, .* None"),
    (
        {**ADABOUND, "final": 0.1, "gamma": 0.0},
        "trust_bounds='adabound' needs trust_gamma above 0, .* is 0.0",
    ),
    ({**ADABOUND, "final": 0.1, "gamma": -1.0}, "Invalid trust_gamma value: -1.0"),
    ({**ADABOUND, "final": NAN, "gamma": 0.1}, "Invalid trust_final value: nan"),
    ({**ADABOUND, "final": INF, "gamma": 0.1}, "Invalid trust_final value: inf"),
    *(
        (
            {"of": "update", "weight_decay": word},
            f"trust_weight_decay='{word}' is for trust_of='gradient': an update's norm holds",
        )
        for word in ("added", "combined")
    ),
]
BAD: list[tuple[Options, str]] = [
    ({"lr": -0.1}, "Invalid learning rate: -0.1; lr must be at least 0"),
    ({"lr": NAN}, "Invalid learning rate: nan"),
    ({"lr": INF}, "Invalid learning rate: inf"),
    ({"lr": "0.1"}, "Invalid learning rate: 0.1"),
    ({"lr": "fast"}, "Invalid learning rate: fast"),
    ({"lr": None}, "Invalid learning rate: None"),
    ({"weight_decay": -1}, "Invalid weight_decay value: -1"),
    ({"weight_decay": NAN}, "Invalid weight_decay value: nan"),
    (
        {"weight_decay_in": "weight"},
        "Invalid weight_decay_in value: 'weight'; take one of gradient",
    ),
    (
        {"weight_decay_in": None},
        "Invalid weight_decay_in value: None; .* gradient, update, weights",
    ),
    ({"master_weights": "yes"}, "Invalid master_weights value: 'yes'; .* True or False"),
    ({"master_weights": 2}, "Invalid master_weights value: 2; .* True or False"),
    ({"maximize": "false"}, "Invalid maximize value: 'false'; .* True or False"),
    (
        {"momentum_scaling": "within"},
        "Invalid momentum_scaling value: 'within'; take one of outsid",
    ),
    ({"max_grad_norm": 0.0}, "Invalid max_grad_norm value: 0; it must be above 0, or None"),
    ({"max_grad_norm": -1.0}, "Invalid max_grad_norm value: -1.0"),
    ({"max_grad_norm": NAN}, "Invalid max_grad_norm value: nan"),
    ({"max_grad_norm": INF}, "Invalid max_grad_norm value: inf; .* finite"),
    ({"on_nonfinite": "raise"}, "Invalid on_nonfinite value: 'raise'; take one of propagate, skip"),
]
EPS: list[tuple[Options, str]] = [
    ({"eps": -1e-8}, "Invalid epsilon value: -1e-08; eps must be at least 0"),
    ({"eps": NAN}, "Invalid epsilon value: nan"),
    ({"eps": INF}, "Invalid epsilon value: inf"),
    ({"eps": "1e-8"}, "Invalid epsilon value: 1e-8"),
]


def flags(*keys: str) -> Iterator[tuple[Options, str]]:
    for key in keys:
        for value in ("no", 2, None):
            yield {key: value}, f"Invalid {key} value: {value!r}; {key} must be True or False"


def betas(index: int, value: Any) -> tuple[Options, str]:
    pair = (value, 0.9) if index == 0 else (0.9, value)
    return {"betas": pair}, f"Invalid beta parameter at index {index}: {value}; betas must be in"


SCALINGS = ("inside", "ratio_inside")
MOMENTUM: list[tuple[Options, str]] = [
    ({"momentum": -0.5}, "Invalid momentum value: -0.5; momentum must be at least 0"),
    ({"momentum": INF}, "Invalid momentum value: inf"),
    ({"momentum": NAN}, "Invalid momentum value: nan"),
    *(
        (
            {"momentum": 0.0, "momentum_scaling": form},
            f"'{form}' needs a .*, but momentum is 0; use",
        )
        for form in SCALINGS
    ),
    *(
        (
            {"momentum": 0.9, "momentum_scaling": form, "trust": TrustRatio(of="update")},
            f"momentum_scaling='{form}' with trust_of='update' is circular",
        )
        for form in SCALINGS
    ),
]
BETAS: list[tuple[Options, str]] = [
    *(betas(index, value) for index in (0, 1) for value in (1.0, -0.1, 1.5, NAN, "0.9", None)),
    *(
        ({"betas": value}, "Invalid betas value: .*; betas must be a pair of numbers")
        for value in (0.9, (0.9,), (0.9, 0.99, 0.999), "ab", None, {0.9, 0.99})
    ),
]
OWN: dict[str, list[tuple[Options, str]]] = {
    "sgd": [
        *MOMENTUM,
        *flags("nesterov"),
        (
            {"nesterov": True, "momentum": 0.0},
            "Nesterov momentum requires a momentum and zero dampening, .*momentum=0",
        ),
        (
            {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
            "Nesterov momentum requires .*but momentum=0.9 and dampening=0.1",
        ),
        ({"dampening": NAN}, "Invalid dampening value: nan"),
        ({"dampening": INF}, "Invalid dampening value: inf"),
    ],
    "rmsprop": [
        *MOMENTUM,
        *EPS,
        *flags("centered", "eps_inside_sqrt"),
        ({"alpha": 1.0}, r"Invalid alpha value: 1.0; alpha must be in \[0.0, 1.0\)"),
        ({"alpha": -0.1}, "Invalid alpha value: -0.1"),
        ({"alpha": NAN}, "Invalid alpha value: nan"),
        ({"initial_square_avg": -1.0}, "Invalid initial_square_avg value: -1.0"),
        ({"initial_square_avg": INF}, "Invalid initial_square_avg value: inf"),
    ],
    "adagrad": [
        *EPS,
        ({"lr_decay": -0.1}, "Invalid lr_decay value: -0.1; lr_decay must be at least 0"),
        ({"lr_decay": NAN}, "Invalid lr_decay value: nan"),
        ({"initial_accumulator_value": -0.1}, "Invalid initial_accumulator_value value: -0.1"),
        ({"initial_accumulator_value": NAN}, "Invalid initial_accumulator_value value: nan"),
    ],
    "adam": [*EPS, *BETAS, *flags("amsgrad", "bias_correction")],
    "lion": BETAS,
    "adadelta": [
        *EPS,
        ({"rho": 1.1}, r"Invalid rho value: 1.1; rho must be in \[0, 1\]"),
        ({"rho": -0.1}, "Invalid rho value: -0.1"),
        ({"rho": NAN}, "Invalid rho value: nan"),
        ({"rho": "0.9"}, "Invalid rho value: 0.9"),
    ],
}
WITHOUT_BUFFER: list[tuple[Options, str]] = [
    (
        {"momentum_scaling": form},
        f"momentum_scaling='{form}' needs a momentum buffer, but rule '.*' has none; use .*'outsid",
    )
    for form in SCALINGS
]


def of_class(cls: type[LayerwiseOptimizer]) -> Iterator[tuple[Options, str]]:
    """Every bad option of a class, as constructors take it, and what is said of it."""
    yield from BAD
    yield from (({"trust": TrustRatio(**trust)}, match) for trust, match in BAD_TRUST)
    yield from OWN[cls.rule]
    if cls not in (SGD, RMSprop):
        yield from WITHOUT_BUFFER


OPTIONS = [(cls, options, match) for cls in CLASSES for options, match in of_class(cls)]


def running(cls: Any, **options: Any) -> LayerwiseOptimizer:
    """Return an optimizer of two groups after two steps, gradients for the next one at hand."""
    shapes = zip(SHAPES, DTYPES, strict=True)
    params = [Parameter(random_tensors([s], i, t)[0]) for i, (s, t) in enumerate(shapes)]
    groups: Any = [{"params": params[:2]}, {"params": params[2:], "lr": 0.2}]
    trust = {} if cls in (LARS, LAMB) else {"trust": TrustRatio(upper=1.0)}
    optimizer: LayerwiseOptimizer = cls(
        groups, lr=0.1, **{**trust, "master_weights": True, **options}
    )
    for seed in (1, 2, 3):
        for param, grad in zip(params, random_tensors(SHAPES, seed), strict=True):
            param.grad = grad.to(param.dtype)
        if seed < 3:
            optimizer.step()
    return optimizer


def plain(options: Options) -> Options:
    """Return the scalars that a group keeps of constructor's options."""
    trust = options.get("trust")
    if trust is None:
        return options
    scalars = {f"trust_{key}": value for key, value in vars(trust).items()}
    return {**options, **scalars, "trust": True}


def assert_steps_on(optimizer: LayerwiseOptimizer) -> None:
    """Assert that a step changes each layer: a small one may show in its state alone."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = [[bits(tensor) for tensor in (p, *optimizer.state[p].values())] for p in params]
    optimizer.step()
    for param, then in zip(params, before, strict=True):
        assert [bits(tensor) for tensor in (param, *optimizer.state[param].values())] != then


options_of_classes = pytest.mark.parametrize(
    ("cls", "options", "match"), OPTIONS, ids=[f"{c.__name__}-{m[:40]}" for c, _, m in OPTIONS]
)


@options_of_classes
def test_optimizers_refuse_options(cls: Any, options: Options, match: str) -> None:
    """In the constructor, in a new group, in the state to load and where a group is changed."""
    with pytest.raises(ValueError, match=match):
        cls(None, **options)  # before torch looks at the parameters
    optimizer = running(cls)
    with optimizer_unchanged(optimizer), pytest.raises(ValueError, match=match):
        optimizer.add_param_group({"params": [Parameter(torch.ones(3))], **options})
    assert len(optimizer.param_groups) == 2
    saved = optimizer.state_dict()
    saved["param_groups"][1].update(plain(options))
    with optimizer_unchanged(optimizer), pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(saved)
    before = dict(optimizer.param_groups[1])
    optimizer.param_groups[1].update(plain(options))
    match = f"^param group 1: .*{match}"
    with optimizer_unchanged(optimizer), pytest.raises(ValueError, match=match):
        optimizer.step()
    optimizer.param_groups[1].update(before)
    assert_steps_on(optimizer)


@options_of_classes
@pytest.mark.parametrize("backend", ["cpu", "cpu-planned", "reference"])
def test_backends_refuse_options(cls: Any, options: Options, match: str, backend: str) -> None:
    params = [random_tensors([s], 0, t)[0] for s, t in zip(SHAPES, DTYPES, strict=True)]
    grads = [random_tensors([s], 1, t)[0] for s, t in zip(SHAPES, DTYPES, strict=True)]
    call = make_call(cls.rule, params, grads, {**TRUST, "master_weights": True}, taken=3)
    stepper = make_stepper(cls.rule, backend.split("-", maxsplit=1)[0])
    if backend == "cpu-planned":
        call.take(stepper.step)
    sound = call.copy()
    call.groups[0].update(plain(options))
    bad, unused = call.groups[0], {**call.groups[0], "trust": False}
    for group in (bad, bad, unused, unused):  # once more each: a refusal is not forgotten
        call.groups[0] = group
        with (
            unchanged([*call.written(), *call.grads]),
            pytest.raises(ValueError, match=f"^param group 0: .*{match}"),
        ):
            call.take(stepper.step)
    judged_step(sound, stepper.step)


@pytest.mark.parametrize(
    ("torchs", "cls", "options"),
    [
        (torch.optim.Adam, Adam, {"betas": (1.0, 0.9)}),
        (torch.optim.Adam, Adam, {"betas": (0.9, -1.0)}),
        (torch.optim.Adam, Adam, {"eps": -1.0}),
        (torch.optim.Adam, Adam, {"lr": -1.0}),
        (torch.optim.Adam, Adam, {"weight_decay": -1.0}),
        (torch.optim.Adadelta, Adadelta, {"rho": 1.5}),
        (torch.optim.Adadelta, Adadelta, {"eps": -1.0}),
        (torch.optim.Adagrad, Adagrad, {"lr_decay": -1.0}),
        (torch.optim.Adagrad, Adagrad, {"initial_accumulator_value": -1.0}),
        (torch.optim.Adagrad, Adagrad, {"eps": -1.0}),
        (torch.optim.RMSprop, RMSprop, {"eps": -1.0}),
        (torch.optim.RMSprop, RMSprop, {"alpha": -1.0}),
        (torch.optim.RMSprop, RMSprop, {"momentum": -1.0}),
        (torch.optim.SGD, SGD, {"lr": -1.0}),
        (torch.optim.SGD, SGD, {"nesterov": True}),
    ],
)
def test_the_words_are_torchs(torchs: Any, cls: Any, options: Options) -> None:
    """What we say begins with what torch says."""
    params = [Parameter(torch.ones(3))]
    with pytest.raises(ValueError, match=r".") as theirs:
        torchs(params, **options)
    with pytest.raises(ValueError, match=r".") as ours:
        cls(params, **options)
    assert str(ours.value).startswith(str(theirs.value))


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (Adam, {"betas": (0.0, 0.0), "eps": 0.0}),
        (Adam, {"betas": [0.9, 0.99]}),
        (Adam, {"betas": (torch.tensor(0.9), torch.tensor(0.99))}),
        (Adadelta, {"rho": 0.0}),
        (Adadelta, {"rho": 1.0}),
        (Adagrad, {"lr_decay": 10.0, "initial_accumulator_value": 1.0, "eps": 0.0}),
        (RMSprop, {"alpha": 0.0}),
        (SGD, {"momentum": 0.9, "dampening": -1.0}),
        (SGD, {"trust": TrustRatio(lower=1.0, upper=1.0, weight_norm_bounds=(0.0, INF))}),
        (Adam, {"trust": TrustRatio(of="update"), "weight_decay_in": "weights"}),
        (SGD, {"momentum": 0.9, "momentum_scaling": "outside", "trust": TrustRatio(of="update")}),
    ],
)
def test_ends_of_ranges_are_inside(cls: Any, options: Options) -> None:
    assert_steps_on(running(cls, **options))


@pytest.mark.parametrize("key", ["lr", "weight_decay", "trust_upper", "betas"])
def test_a_tensor_of_many_elements_is_no_option(key: str) -> None:
    optimizer = running(Adam)
    optimizer.param_groups[1][key] = torch.tensor([0.1, 0.2])
    with (
        optimizer_unchanged(optimizer),
        pytest.raises(ValueError, match=f"^Invalid {key} value: tensor"),
    ):
        optimizer.step()


@pytest.mark.parametrize("key", ["max_grad_norm", "on_nonfinite"])
@every_class
def test_what_all_groups_must_agree_on(cls: Any, key: str) -> None:
    value: Any = {"max_grad_norm": 1.0, "on_nonfinite": "skip"}[key]
    optimizer = running(cls)
    optimizer.param_groups[1][key] = value
    match = (
        f"{key} is one decision for all param groups, but they differ: .*give every group the same"
    )
    with optimizer_unchanged(optimizer), pytest.raises(ValueError, match=match):
        optimizer.step()
    optimizer.param_groups[0][key] = value
    assert_steps_on(optimizer)
    groups: list[Options] = [{"params": [0, 1]}, {"params": [2], key: value}]
    call = make_call(cls.rule, random_tensors(SHAPES, 0), random_tensors(SHAPES, 1), *groups)
    for backend in ("cpu", "reference"):
        with unchanged(call.written()), pytest.raises(ValueError, match=match):
            call.take(partial(date_kernels.step, cls.rule, backend=backend))


ALL: list[Any] = [*CLASSES, LARS, LAMB, DATE]


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("flag", ["capturable", "differentiable"])
def test_flags_that_are_refused(cls: Any, flag: str) -> None:
    params = [Parameter(torch.ones(3))]
    with pytest.raises(RuntimeError, match=f"does not support `{flag}`.* leave it at False"):
        cls(params, **{flag: True})
    optimizer = cls(params)
    with pytest.raises(RuntimeError, match=f"does not support `{flag}`"):
        optimizer.add_param_group({"params": [Parameter(torch.ones(2))], flag: True})
    assert len(optimizer.param_groups) == 1
    params[0].grad = torch.ones(3)
    state = optimizer.state_dict()
    state["param_groups"][0][flag] = True
    with optimizer_unchanged(optimizer), pytest.raises(RuntimeError, match=f"`{flag}`"):
        optimizer.load_state_dict(state)
    optimizer.param_groups[0][flag] = True
    with optimizer_unchanged(optimizer), pytest.raises(RuntimeError, match=f"`{flag}`"):
        optimizer.step()


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
@pytest.mark.parametrize("cls", ALL)
def test_foreach_and_fused_exclude_each_other(cls: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="`fused` and `foreach` cannot be `True` together"):
        cls(None, foreach=True, fused=True)
    for flags in ({"foreach": True}, {"fused": True}, {"foreach": False, "fused": True}):
        cls([Parameter(torch.ones(2))], **flags)


@every_class
def test_arguments_of_the_layer_wise_part(cls: Any) -> None:
    params = [Parameter(torch.ones(3))]
    for trust in (0.5, True, "update"):
        with pytest.raises(TypeError, match=f"trust must be a TrustRatio or None, not .?{trust}"):
            cls(params, trust=trust)
    with pytest.raises(TypeError, match="unexpected keyword argument 'trust_upper'"):
        cls(params, trust_upper=1.0)
    for exclude in ("2d", 3, [True], "predicate"):
        with pytest.raises(ValueError, match=r"Invalid exclude value: .*; take None, '1d'"):
            cls(params, exclude=exclude)
    with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
        cls(None, lr=torch.tensor([1e-3, 1e-3]))

    def fails(name: str | None, param: Tensor) -> bool:
        raise LookupError("the user's own")

    optimizer = cls(params)
    with pytest.raises(LookupError, match="the user's own"):
        optimizer.add_param_group({"params": [Parameter(torch.ones(2))], "exclude": fails})
    assert len(optimizer.param_groups) == 1
    params[0].grad = torch.ones(3)
    optimizer.param_groups[0]["trust"] = TrustRatio()
    with unchanged(params), pytest.raises(ValueError, match="Invalid trust value: TrustRatio"):
        optimizer.step()


@pytest.mark.parametrize(
    ("make", "options", "error", "match"),
    [
        (LARS, {"trust": None}, TypeError, "LARS has its own trust ratio: pass coefficient="),
        (LAMB, {"trust": None}, TypeError, "LAMB has its own trust ratio: pass coefficient="),
        (DATE, {"trust": None}, TypeError, "DATE has its own trust ratio: pass lower="),
        (DATE, {"rule": "adamw"}, ValueError, "rule 'adamw' is unknown; there are sgd, momentum"),
        (DATE, {"lower": 2.0}, ValueError, "trust_lower=2.0 is above trust_upper=1.0"),
        (LARS, {"upper": -1.0}, ValueError, "Invalid trust_upper value: -1.0"),
        (LAMB, {"coefficient": NAN}, ValueError, "Invalid trust_coefficient value: nan"),
        (LAMB, {"momentum_scaling": "inside"}, ValueError, "rule 'adam' has none"),
        (LARS, {"momentum": 0.0}, ValueError, "'inside' needs .*, but momentum is 0"),
        (LAMB, {"betas": (0.9, 1.0)}, ValueError, "Invalid beta parameter at index 1: 1.0"),
        (LAMB, {"weight_decay_in": "the update"}, ValueError, "Invalid weight_decay_in value"),
        (
            Adam,
            {"decoupled_weight_decay": True, "weight_decay_in": "update"},
            ValueError,
            "decoupled_weight_decay=True says weight_decay_in='weights', but it is 'update'",
        ),
    ],
)
def test_presets_refuse(make: Any, options: Options, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        make([Parameter(torch.ones(3))], **options)
