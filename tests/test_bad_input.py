"""What a step refuses, it names; parameters, states and step counts stay as they were."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import (
    TRUST,
    VARIANTS,
    Call,
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
from date_optim import DATE, LARS, SGD, RMSprop, TrustRatio
from date_optim.optimizer import LayerwiseOptimizer

NAN, INF = math.nan, math.inf
SHAPES = [(4, 3), (5,), ()]


def mid_run(rule: str = "rmsprop-centered-momentum", *groups: Options) -> Call:
    """Return a step's arguments in the middle of a run, trust on."""
    family, options = VARIANTS[rule]
    every = [{**options, **TRUST, **group} for group in groups or ({},)]
    return make_call(family, random_tensors(SHAPES, 0), random_tensors(SHAPES, 1), *every, taken=3)


@pytest.fixture(params=["cpu", "cpu-planned", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """A first step, a step with a plan that fitted the last one, and the reference."""
    return str(request.param)


def refuse(
    backend: str,
    spoil: Callable[[Call], Any],
    error: type[Exception],
    match: str,
    *,
    rule: str = "rmsprop-centered-momentum",
    **kwargs: Any,
) -> None:
    """Assert that a spoiled call raises and changes nothing, and that a sound one then works."""
    call = mid_run(rule)
    stepper = make_stepper(call.rule, backend.split("-", maxsplit=1)[0])
    if backend == "cpu-planned":
        judged_step(call, stepper.step)
    sound, spoiled = call.copy(), call
    spoil(spoiled)
    with unchanged([*spoiled.written(), *spoiled.grads]), pytest.raises(error, match=match):
        stepper.step(
            spoiled.params, spoiled.grads, spoiled.states, spoiled.steps, spoiled.groups, **kwargs
        )
    judged_step(sound, stepper.step)


def put(
    sequence: str, index: int, make: Callable[[Tensor], Tensor | None]
) -> Callable[[Call], None]:
    """Return a spoiler that replaces one tensor by what `make` makes of it."""

    def spoil(call: Call) -> None:
        column: Any = getattr(call, sequence, None) or call.states[sequence]
        column[index] = make(column[index])

    return spoil


def conjugated(tensor: Tensor) -> Tensor:
    """Return a lazily negated view: its memory holds the negatives of its values."""
    return torch.complex(torch.zeros(tensor.shape), tensor).conj().imag


TENSORS: list[tuple[str, Callable[[Tensor], Tensor], type[Exception], str]] = [
    ("float64", torch.Tensor.double, TypeError, "has dtype torch.float64, but only torch.float32"),
    ("float16", torch.Tensor.half, TypeError, "has dtype torch.float16"),
    ("bfloat16", torch.Tensor.bfloat16, TypeError, "has dtype torch.bfloat16"),
    ("int64", torch.Tensor.long, TypeError, "has dtype torch.int64"),
    ("bool", torch.Tensor.bool, TypeError, "has dtype torch.bool"),
    ("complex", lambda t: t + 0j, RuntimeError, "is complex .*view_as_real"),
    ("meta", lambda t: t.to("meta"), RuntimeError, "is on meta, but .* CPU alone"),
    ("sparse", torch.Tensor.to_sparse, RuntimeError, "is sparse .*make it dense"),
    ("negated", conjugated, RuntimeError, "is a lazily negated view .*resolve_neg"),
]
WHERE = [
    ("params", 1, r"params\[1\]"),
    ("grads", 1, r"the gradient of params\[1\]"),
    ("square_avg", 1, r"state 'square_avg' of params\[1\]"),
    ("momentum_buffer", 0, r"state 'momentum_buffer' of params\[0\]"),
]


@pytest.mark.parametrize(("sequence", "index", "name"), WHERE, ids=[w[0] for w in WHERE])
@pytest.mark.parametrize(
    ("make", "error", "match"), [t[1:] for t in TENSORS], ids=[t[0] for t in TENSORS]
)
def test_tensors_that_no_kernel_serves(
    sequence: str,
    index: int,
    name: str,
    make: Callable[[Tensor], Tensor],
    error: type[Exception],
    match: str,
    backend: str,
) -> None:
    refuse(backend, put(sequence, index, make), error, f"^{name} {match}")


class Subclass(Tensor):
    """A tensor whose memory may be anything."""


@pytest.mark.parametrize(("sequence", "index", "name"), WHERE, ids=[w[0] for w in WHERE])
@pytest.mark.parametrize(
    "make", [lambda t: t.as_subclass(Subclass), lambda t: t.numpy()], ids=["subclass", "ndarray"]
)
def test_what_is_not_a_plain_tensor(
    sequence: str, index: int, name: str, make: Callable[[Tensor], Any], backend: str
) -> None:
    call = mid_run()
    put(sequence, index, make)(call)
    stepper = make_stepper(call.rule, backend.split("-", maxsplit=1)[0])
    with pytest.raises(
        TypeError, match=f"^{name} is a (Subclass|ndarray); only a plain torch.Tensor"
    ):
        stepper.step(call.params, call.grads, call.states, call.steps, call.groups)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (
            put("grads", 0, lambda t: t.t()),
            r"^the gradient of params\[0\] has shape \(3, 4\), but its parameter has \(4, 3\)",
        ),
        (put("grads", 1, lambda t: t[:3]), r"has shape \(3,\), but its parameter has \(5,\)"),
        (put("grads", 2, lambda t: t[None]), r"has shape \(1,\), but its parameter has \(\)"),
        (
            put("square_avg", 1, lambda t: t[:4]),
            r"^state 'square_avg' of params\[1\] has shape \(4",
        ),
        (
            put("grad_avg", 1, lambda t: t[None]),
            r"^state 'grad_avg' of params\[1\] has shape \(1",
        ),
        (
            put("momentum_buffer", 2, lambda t: None),
            "^state 'momentum_buffer' .*missing; create it",
        ),
        (
            lambda call: call.states.pop("square_avg"),
            r"^state 'square_avg' of params\[0\] is missing",
        ),
        (
            put("steps", 1, lambda t: None),
            r"^params\[1\] needs a step counter, but steps\[1\]",
        ),
        (
            put("steps", 1, lambda t: t.repeat(2)),
            r"^the step counter of params\[1\] has shape \(2",
        ),
        (lambda call: call.grads.pop(), "^grads has 2 entries for 3 params"),
        (lambda call: call.steps.append(None), "^steps has 4 entries for 3 params"),
        (lambda call: call.states["grad_avg"].pop(), "^grad_avg has 2 entries for 3 params"),
        (lambda call: call.params.append(torch.ones(3)), "^grads has 3 entries for 4 params"),
    ],
)
def test_shapes_and_numbers_of_tensors(
    spoil: Callable[[Call], Any], match: str, backend: str
) -> None:
    refuse(backend, spoil, ValueError, match)


def test_a_counter_of_another_dtype(backend: str) -> None:
    spoil = put("steps", 1, torch.Tensor.double)
    refuse(backend, spoil, TypeError, r"^the step counter of params\[1\] has dtype torch.float64")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"params": [0, 1]}, r"^params\[2\] is in no group"),
        ({"params": [0, 1, 2, 3]}, r"^param group 0: params\[3\] is out of range or in a group"),
        ({"params": [0, 1, -1]}, r"^param group 0: params\[-1\] is out of range"),
        ({"params": [0, 1, 2, 1]}, r"^param group 0: params\[1\] is out of range or in a group"),
        ({"exclude": (True, False)}, "^param group 0: exclude has 2 entries for 3 params"),
    ],
)
def test_members_of_groups(change: Options, match: str, backend: str) -> None:
    refuse(backend, lambda call: call.groups[0].update(change), ValueError, match)


def test_a_layer_in_two_groups(backend: str) -> None:
    def spoil(call: Call) -> None:
        call.groups.append({**call.groups[0], "params": [1]})

    refuse(backend, spoil, ValueError, r"^param group 1: params\[1\] is out of range or in a group")


@pytest.mark.parametrize("scale", [0.0, -1.0, NAN, INF, torch.tensor(0.0)])
def test_a_gradient_scale_that_is_no_divisor(scale: Any, backend: str) -> None:
    match = "^grad_scale must be a finite number above 0, not "
    refuse(backend, lambda call: None, ValueError, match, grad_scale=scale)


def test_unknown_rule() -> None:
    match = r"^rule 'sgdm' is unknown; there are sgd, rmsprop"
    for backend in ("cpu", "reference"):
        with pytest.raises(ValueError, match=match):
            date_kernels.step("sgdm", [], [], {}, [], [], backend=backend)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"^backend 'cuda' is unknown; there are cpu, ref"):
        make_stepper("sgd", "cuda")


def test_a_group_without_a_rate(backend: str) -> None:
    refuse(backend, lambda call: call.groups[0].pop("lr"), ValueError, "'lr' is missing")


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda base: [base[:4], base[:4]], r"params\[0\] and params\[1\] overlap in memory"),
        (lambda base: [base[:5], base[8:9], base[4:8]], r"params\[0\] and params\[2\] overlap"),
        (lambda base: [base[2:9], base[4:5]], r"params\[0\] and params\[1\] overlap"),
        (
            lambda base: [base[:6].view(3, 2)[:, 0], base[2:3]],
            r"params\[0\] and params\[1\] overlap in memory: what is written to the one changes",
        ),
        (
            lambda base: [base[:1].expand(5)],
            r"^params\[0\] overlaps itself: shape \(5,\), stride \(0,\); .*clone",
        ),
        (
            lambda base: [base.as_strided((3, 3), (2, 1))],
            r"^params\[0\] overlaps itself: shape \(3, 3\), stride \(2, 1\)",
        ),
    ],
    ids=["twice", "partly", "inside", "column", "expanded", "rows"],
)
def test_parameters_that_share_memory(
    make: Callable[[Tensor], list[Tensor]], match: str, backend: str
) -> None:
    base = torch.arange(1.0, 10.0)
    params = make(base)
    call = make_call("sgd", params, [torch.ones_like(p) for p in params], {})
    with unchanged([base, *call.written()]), pytest.raises(ValueError, match=match):
        call.take(partial(date_kernels.step, "sgd", backend=backend.split("-", maxsplit=1)[0]))


@pytest.mark.parametrize(
    ("sequence", "match"),
    [
        ("square_avg", r"params\[0\] and state 'square_avg' of params\[0\] overlap"),
        ("momentum_buffer", r"params\[0\] and state 'momentum_buffer' of params\[0\] overlap"),
        ("steps", r"the step counter of params\[0\] and params\[0\] overlap"),
    ],
)
def test_states_in_their_parameters_memory(sequence: str, match: str, backend: str) -> None:
    def spoil(call: Call) -> None:
        param = call.params[0].view(-1)
        put(sequence, 0, lambda t: param[:1] if sequence == "steps" else param.view(t.shape))(call)

    refuse(backend, spoil, ValueError, match)


def test_one_step_counter_for_two_layers(backend: str) -> None:
    match = r"the step counter of params\[0\] and the step counter of params\[1\] overlap"
    refuse(backend, lambda call: put("steps", 1, lambda t: call.steps[0])(call), ValueError, match)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_interleaved_columns_share_no_memory(backend: str) -> None:
    base = random_tensors([(40, 3)], 0)[0]
    columns = [base[:, i] for i in range(3)]
    call = make_call("sgd", columns, random_tensors([40] * 3, 1), {"momentum": 0.9, **TRUST})
    judged_step(call, partial(date_kernels.step, "sgd", backend=backend))
    assert call.params[1].data_ptr() == base[:, 1].data_ptr()


# --- options --------------------------------------------------------------------------------------

ADABOUND: Options = {"bounds": "adabound"}
BAD_TRUST: list[tuple[Options, str]] = [
    ({"lower": 2.0, "upper": 1.0}, "trust_lower=2.0 is above trust_upper=1.0"),
    ({"lower": -0.1}, "Invalid trust_lower value: -0.1; trust_lower must be at least 0"),
    ({"lower": NAN}, "Invalid trust_lower value: nan"),
    ({"lower": INF}, "Invalid trust_lower value: inf; trust_lower must be finite"),
    ({"upper": -1.0}, "Invalid trust_upper value: -1.0"),
    ({"upper": NAN}, "Invalid trust_upper value: nan"),
    ({"upper": "1"}, "Invalid trust_upper value: 1"),
    ({"coefficient": -1.0}, "Invalid trust_coefficient value: -1.0"),
    ({"coefficient": NAN}, "Invalid trust_coefficient value: nan"),
    ({"eps": -1e-8}, "Invalid trust_eps value: -1e-08"),
    ({"zero_norm": NAN}, "Invalid trust_zero_norm value: nan"),
    ({"weight_norm_bounds": (2.0, 1.0)}, r"Invalid trust_weight_norm_bounds value: \(2.0, 1.0\)"),
    ({"weight_norm_bounds": (0.0, NAN)}, "Invalid trust_weight_norm_bounds value"),
    ({"weight_norm_bounds": 3.0}, r"Invalid trust_weight_norm_bounds value: 3.0; .*\(low, high\)"),
    ({"weight_decay": "summed"}, "Invalid trust_weight_decay value: 'summed'; take one of ignored"),
    ({"of": "weights"}, "Invalid trust_of value: 'weights'; take one of gradient, update"),
    ({"bounds": "constants"}, "Invalid trust_bounds value: 'constants'; take one of constant"),
    (ADABOUND, "trust_bounds='adabound' needs trust_final above 0, but it is None"),
    ({**ADABOUND, "final": 0.1}, "trust_bounds='adabound' needs trust_gamma above 0, .* None"),
    (
        {**ADABOUND, "final": 0.1, "gamma": 0.0},
        "trust_bounds='adabound' needs trust_gamma above 0, .* is 0.0",
    ),
    ({**ADABOUND, "final": NAN, "gamma": 0.1}, "Invalid trust_final value: nan"),
    ({"of": "update", "weight_decay": "added"}, "trust_weight_decay='added' is for trust_of="),
    ({"of": "update"}, "trust_of='update' is not there for rule .* yet"),
]
BAD: list[tuple[Options, str]] = [
    ({"lr": -0.1}, "Invalid learning rate: -0.1; lr must be at least 0"),
    ({"lr": NAN}, "Invalid learning rate: nan"),
    ({"lr": INF}, "Invalid learning rate: inf"),
    ({"lr": "0.1"}, "Invalid learning rate: 0.1"),
    ({"weight_decay": -1}, "Invalid weight_decay value: -1"),
    ({"momentum": -0.5}, "Invalid momentum value: -0.5; momentum must be at least 0"),
    ({"momentum": math.inf}, "Invalid momentum value: inf"),
    ({"max_grad_norm": math.inf}, "Invalid max_grad_norm value: inf; .* finite"),
    ({"lr": "fast"}, "Invalid learning rate: fast"),
    ({"momentum_scaling": "inside"}, "momentum_scaling='inside' needs a momentum buffer, but"),
    ({"momentum_scaling": "ratio_inside"}, "momentum_scaling='ratio_inside' needs a momentum buf"),
    ({"momentum_scaling": "within", "momentum": 0.9}, "Invalid momentum_scaling value: 'within'"),
    ({"max_grad_norm": 0.0}, "Invalid max_grad_norm value: 0; it must be above 0, or None"),
    ({"max_grad_norm": -1.0}, "Invalid max_grad_norm value: -1.0"),
    ({"max_grad_norm": NAN}, "Invalid max_grad_norm value: nan"),
    ({"on_nonfinite": "raise"}, "Invalid on_nonfinite value: 'raise'; take one of propagate, skip"),
]
BAD_SGD: list[tuple[Options, str]] = [
    ({"nesterov": True}, "Nesterov momentum requires a momentum and zero dampening, .*momentum=0"),
    (
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        "Nesterov momentum requires .*but momentum=0.9 and dampening=0.1",
    ),
    ({"dampening": NAN}, "Invalid dampening value: nan"),
]
BAD_RMSPROP: list[tuple[Options, str]] = [
    ({"alpha": 1.0}, r"Invalid alpha value: 1.0; alpha must be in \[0.0, 1.0\)"),
    ({"alpha": -0.1}, "Invalid alpha value: -0.1"),
    ({"alpha": NAN}, "Invalid alpha value: nan"),
    ({"eps": -1e-8}, "Invalid eps value: -1e-08"),
    ({"initial_square_avg": -1.0}, "Invalid initial_square_avg value: -1.0"),
]
CLASSES: list[type[LayerwiseOptimizer]] = [SGD, RMSprop]
OPTIONS: list[tuple[type[LayerwiseOptimizer], Options, str]] = [
    *((c, options, match) for c in CLASSES for options, match in BAD),
    *((SGD, options, match) for options, match in BAD_SGD),
    *((RMSprop, options, match) for options, match in BAD_RMSPROP),
    *((c, {"trust": TrustRatio(**trust)}, match) for c in CLASSES for trust, match in BAD_TRUST),
    *(
        (c, {"trust": TrustRatio(of="update"), "momentum": 0.9, "momentum_scaling": form}, match)
        for c in CLASSES
        for form in ("inside", "ratio_inside")
        for match in [f"momentum_scaling='{form}' with trust_of='update' is circular"]
    ),
]


def running(cls: type[LayerwiseOptimizer], **options: Any) -> LayerwiseOptimizer:
    """Return an optimizer of two groups after two steps, gradients for the next one at hand."""
    params = [Parameter(w) for w in random_tensors(SHAPES, 0)]
    groups: Any = [{"params": params[:2]}, {"params": params[2:], "lr": 0.2}]
    optimizer = cls(groups, lr=0.1, trust=TrustRatio(upper=1.0), **options)  # type: ignore[call-arg]
    for seed in (1, 2, 3):
        for param, grad in zip(params, random_tensors(SHAPES, seed), strict=True):
            param.grad = grad
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
    before = [bits(p) for group in optimizer.param_groups for p in group["params"]]
    optimizer.step()
    after = [bits(p) for group in optimizer.param_groups for p in group["params"]]
    assert all(a != b for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize(
    ("cls", "options", "match"), OPTIONS, ids=[f"{c.__name__}-{m[:40]}" for c, _, m in OPTIONS]
)
def test_options_out_of_range_or_at_odds(
    cls: Any, options: Options, match: str, backend: str
) -> None:
    """Refused by the constructor, by a new group, by the next step and by `date_kernels.step`."""
    params = [Parameter(torch.ones(3))]
    if backend == "cpu":
        with pytest.raises(ValueError, match=match):
            cls(None, **options)  # before torch looks at the parameters
        optimizer = running(cls)
        with optimizer_unchanged(optimizer), pytest.raises(ValueError, match=match):
            optimizer.add_param_group({"params": params, **options})
        assert len(optimizer.param_groups) == 2
        saved = dict(optimizer.param_groups[1])
        optimizer.param_groups[1].update(plain(options))
        with (
            optimizer_unchanged(optimizer),
            pytest.raises(ValueError, match="^param group 1: " + match),
        ):
            optimizer.step()
        optimizer.param_groups[1].update(saved)
        assert_steps_on(optimizer)
    rule = {SGD: "sgd", RMSprop: "rmsprop"}[cls]
    spoil = partial(lambda call: call.groups[0].update({"trust": False, **plain(options)}))
    refuse(backend, spoil, ValueError, "^param group 0: " + match, rule=rule)


@pytest.mark.parametrize("key", ["max_grad_norm", "on_nonfinite"])
def test_what_all_groups_must_agree_on(key: str) -> None:
    value: Any = {"max_grad_norm": 1.0, "on_nonfinite": "skip"}[key]
    optimizer = running(SGD)
    optimizer.param_groups[1][key] = value
    match = (
        f"{key} is one decision for all param groups, but they differ: .*give every group the same"
    )
    with optimizer_unchanged(optimizer), pytest.raises(ValueError, match=match):
        optimizer.step()
    optimizer.param_groups[0][key] = value
    assert_steps_on(optimizer)
    call = mid_run("sgd", {"params": [0, 1]}, {"params": [2], key: value})
    for backend in ("cpu", "reference"):
        with unchanged(call.written()), pytest.raises(ValueError, match=match):
            call.take(partial(date_kernels.step, "sgd", backend=backend))


@pytest.mark.parametrize("cls", [SGD, RMSprop, LARS, DATE])
@pytest.mark.parametrize("flag", ["capturable", "differentiable"])
def test_flags_that_are_refused(cls: Any, flag: str) -> None:
    params = [Parameter(torch.ones(3))]
    with pytest.raises(RuntimeError, match=f"does not support `{flag}` yet; leave it at False"):
        cls(params, **{flag: True})
    optimizer = cls(params)
    with pytest.raises(RuntimeError, match=f"does not support `{flag}`"):
        optimizer.add_param_group({"params": [Parameter(torch.ones(2))], flag: True})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
@pytest.mark.parametrize("cls", [SGD, RMSprop, LARS])
def test_foreach_and_fused_exclude_each_other(cls: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="`fused` and `foreach` cannot be `True` together"):
        cls(None, foreach=True, fused=True)
    for flags in ({"foreach": True}, {"fused": True}, {"foreach": False, "fused": True}):
        cls([Parameter(torch.ones(2))], **flags)


@pytest.mark.parametrize("cls", [SGD, RMSprop])
def test_arguments_of_the_layer_wise_part(cls: Any) -> None:
    params = [Parameter(torch.ones(3))]
    with pytest.raises(TypeError, match=r"trust must be a TrustRatio or None, not 0\.5"):
        cls(params, trust=0.5)
    for exclude in ("2d", 3, [True]):
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


# --- an optimizer's tensors -----------------------------------------------------------------------


def spoil_gradient(param: Parameter, grad: Tensor) -> None:
    param.grad_dtype = None
    param.grad = grad


def swap_data(param: Parameter, data: Tensor) -> None:
    param.data = data


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    ("spoil", "error", "match"),
    [
        (
            lambda p: spoil_gradient(p, torch.ones(5, dtype=torch.float64)),
            TypeError,
            "^the gradient of {} has dtype torch.float64, but only torch.float32",
        ),
        (
            lambda p: spoil_gradient(p, torch.ones(5, dtype=torch.bfloat16)),
            TypeError,
            "^the gradient of {} has dtype torch.bfloat16",
        ),
        (
            lambda p: swap_data(p, torch.ones(2)),
            ValueError,
            r"^the gradient of {} has shape \(5,\), but its parameter has \(2,\)",
        ),
        (
            lambda p: setattr(p, "grad", torch.ones(5).to_sparse()),
            RuntimeError,
            r"^the gradient of {} is sparse \(torch.sparse_coo\), which layer-wise optimizers",
        ),
        (
            lambda p: swap_data(p, torch.ones(5).as_strided((5,), (0,))),
            ValueError,
            "^{} overlaps itself",
        ),
    ],
    ids=["float64", "bfloat16", "shape", "sparse", "expanded"],
)
@pytest.mark.parametrize("cls", [SGD, RMSprop])
def test_an_optimizer_names_the_parameter(
    cls: Any, spoil: Callable[[Parameter], None], error: type[Exception], match: str, named: bool
) -> None:
    params = [Parameter(w) for w in random_tensors([(4, 3), (5,)], 0)]
    names = ["fc.weight", "fc.bias"]
    optimizer = cls(
        list(zip(names, params, strict=True)) if named else params, lr=0.1, momentum=0.9
    )
    for param, grad in zip(params, random_tensors([(4, 3), (5,)], 1), strict=True):
        param.grad = grad
    optimizer.step()
    spoil(params[1])
    name = "fc.bias" if named else r"0\.1"
    with optimizer_unchanged(optimizer), pytest.raises(error, match=match.format(name)):
        optimizer.step()
    params[1].grad = None
    swap_data(params[1], torch.ones(5))
    params[1].grad = torch.ones(5)
    assert_steps_on(optimizer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.complex64])
def test_an_optimizer_refuses_a_parameter_of_another_dtype(dtype: torch.dtype) -> None:
    param, other = Parameter(torch.ones(3)), Parameter(torch.ones(3, dtype=dtype))
    optimizer = RMSprop([param, other])
    param.grad, other.grad = torch.ones(3), torch.ones(3, dtype=dtype)
    with optimizer_unchanged(optimizer), pytest.raises((TypeError, RuntimeError), match=r"^0\.1 "):
        optimizer.step()
    assert not optimizer.state
    other.grad = None
    optimizer.step()
    assert list(optimizer.state) == [param]


def test_meta_parameters_work_once_they_are_real() -> None:
    module = torch.nn.Linear(3, 2, device="meta")
    optimizer = SGD(module.named_parameters(), lr=0.1, momentum=0.9)
    for param in module.parameters():
        param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match=r"^weight is on meta, but"):
        optimizer.step()
    assert not optimizer.state
    real = torch.nn.Linear(3, 2)
    optimizer = SGD(real.named_parameters(), lr=0.1, momentum=0.9)
    for param in real.parameters():
        param.grad = torch.ones_like(param)
    assert_steps_on(optimizer)


@pytest.mark.parametrize("key", ["momentum_buffer", "square_avg"])
@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (torch.Tensor.double, TypeError, "has dtype torch.float64"),
        (lambda t: t[:2], ValueError, r"has shape \(2"),
        (lambda t: t.to_sparse(), RuntimeError, "is sparse"),
    ],
    ids=["float64", "shape", "sparse"],
)
def test_an_optimizer_names_the_state(
    key: str, make: Callable[[Tensor], Tensor], error: type[Exception], match: str
) -> None:
    optimizer = running(RMSprop, momentum=0.9)
    param = optimizer.param_groups[0]["params"][1]
    sound = optimizer.state[param][key]
    optimizer.state[param][key] = make(sound)
    match = f"^state '{key}' of 0.1 {match}"
    with optimizer_unchanged(optimizer), pytest.raises(error, match=match):
        optimizer.step()
    optimizer.state[param][key] = sound
    assert_steps_on(optimizer)


def test_parameters_that_overlap_between_groups() -> None:
    base = torch.zeros(6)
    first, second = Parameter(base[:4]), Parameter(base[3:])
    optimizer = SGD([{"params": [first]}, {"params": [second]}], lr=0.1)
    first.grad, second.grad = torch.ones(4), torch.ones(3)
    with unchanged([base]), pytest.raises(ValueError, match=r"^0\.0 and 1\.0 overlap in memory"):
        optimizer.step()


@pytest.mark.parametrize("flag", ["capturable", "differentiable"])
def test_flags_are_refused_wherever_they_come_from(flag: str) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = SGD([param], lr=0.1)
    param.grad = torch.ones(3)
    state = optimizer.state_dict()
    state["param_groups"][0][flag] = True
    with optimizer_unchanged(optimizer), pytest.raises(RuntimeError, match=f"`{flag}`"):
        optimizer.load_state_dict(state)
    optimizer.param_groups[0][flag] = True
    with unchanged([param]), pytest.raises(RuntimeError, match=f"`{flag}`"):
        optimizer.step()


@pytest.mark.parametrize("exclude", ["1d", None, (True,), (True, False, True)])
def test_exclude_changed_in_place(exclude: Any) -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = SGD(params, lr=0.1)
    for param in params:
        param.grad = torch.ones(3)
    optimizer.param_groups[0]["exclude"] = exclude
    match = "param group 0: exclude must hold a bool for each of its 2 params"
    with unchanged(params), pytest.raises(ValueError, match=match):
        optimizer.step()


def test_trust_is_a_trust_ratio_or_none() -> None:
    params = [torch.nn.Parameter(torch.ones(3))]
    with pytest.raises(TypeError, match="trust must be a TrustRatio or None, not True"):
        SGD(params, trust=True)  # type: ignore[arg-type]
    optimizer = SGD(params)
    params[0].grad = torch.ones(3)
    optimizer.param_groups[0]["trust"] = TrustRatio()
    with unchanged(params), pytest.raises(ValueError, match="Invalid trust value: TrustRatio"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"nesterov": "no", "momentum": 0.9}, "Invalid nesterov value: 'no'; .* True or False"),
        ({"maximize": "false"}, "Invalid maximize value"),
        ({"trust": TrustRatio(weight_norm_bounds=("a", "b"))}, "trust_weight_norm_bounds"),  # type: ignore[arg-type]
        ({"exclude": "predicate"}, "Invalid exclude value: 'predicate'"),
    ],
)
def test_words_where_a_flag_or_a_number_belongs(options: Options, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SGD([torch.nn.Parameter(torch.ones(3))], **options)


def test_a_sparse_parameter_is_named() -> None:
    param = torch.nn.Parameter(torch.ones(3).to_sparse())
    optimizer = RMSprop([("embedding", param)])
    param.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match=r"^embedding is sparse"):
        optimizer.step()
    assert not optimizer.state
