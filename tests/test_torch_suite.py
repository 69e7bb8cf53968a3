"""What torch's own suite demands of an optimizer, of every class here and all of its inputs.

The tests have the names of torch's where there is one; its file is not in the wheel, and
tests/test_torch_upstream.py runs it where there is a checkout. Results that torch's suite compares
to a tolerance are compared bit by bit: flags, layouts and groups change nothing here.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import Options, assert_same_bits, random_tensors, unchanged
from setups import CLASSES, SHAPES, give_gradients, take_steps
from test_checkpoints import members, through_a_file
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, ReduceLROnPlateau
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
)
from torch_infos import DECLARED, INFOS, TORCHS, whole_inputs
from torch_runs import DTYPES, TWINS, assert_parity, both, give

from date_optim import DATE

FLAGS: tuple[Options, ...] = ({}, {"foreach": True}, {"fused": True})
RAN: set[tuple[str, str]] = set()
"""The pairs of a class and a test that ran."""

Test = Callable[..., None]


def _looped(test: Test, cases_of: Callable[[OptimizerInfo], list[OptimizerInput]]) -> Test:
    """One item a class: pytest takes longer for an item than the steps of an input take."""

    @functools.wraps(test)
    def run(info: OptimizerInfo, **others: Any) -> None:
        for case in cases_of(info):  # made anew: a tensor in them is the test's own
            try:
                test(info=info, options=dict(case.kwargs), **others)
            except Exception as error:
                raise AssertionError(f"{info.name} with {case.desc}") from error

    signature = inspect.signature(test)
    others = [key for name, key in signature.parameters.items() if name != "options"]
    run.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
    return run


def groups_of(info: OptimizerInfo) -> list[OptimizerInput]:
    return info.optim_inputs_func(device="cpu")  # type: ignore[no-any-return]


def inputs_of(info: OptimizerInfo) -> list[OptimizerInput]:
    return [*groups_of(info), *whole_inputs(info.name)]


def every_input(test: Test) -> Test:
    """Run the test with all inputs of the class."""
    return _looped(test, inputs_of)


def every_group(test: Test) -> Test:
    """Run the test with the inputs that a param group may have of its own."""
    return _looped(test, groups_of)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test of an info for every class."""
    if "info" in metafunc.fixturenames:
        metafunc.parametrize("info", INFOS, ids=lambda info: info.name)


def pairs_of(items: list[Any]) -> set[tuple[str, str]]:
    """The pairs of a class and a test of this module among pytest's items."""
    return {
        (item.callspec.params["info"].name, item.originalname)
        for item in items
        if item.module.__name__ == __name__ and "info" in item.fixturenames
    }


@pytest.fixture(autouse=True)
def counted(request: pytest.FixtureRequest) -> Iterator[None]:
    """Count the pair as one that ran."""
    yield
    RAN.update(pairs_of([request.node]))


def build(info: OptimizerInfo, params: Any, **options: Any) -> Any:
    make: Any = info.optim_cls  # typed as an optimizer that is made already
    return make(params, **options)


def problem(
    dtype: torch.dtype = torch.float32, contiguous: bool = True
) -> tuple[list[Parameter], Tensor]:
    """A layer's weight and bias, and its input."""
    weight, bias, x = random_tensors([(10, 5, 2), (10, 2), (5,)], 0, dtype)
    views = [weight[..., 0], bias[..., 0]]
    return [Parameter(view.clone() if contiguous else view) for view in views], x


def loss_of(params: list[Parameter], x: Tensor) -> Tensor:
    weight, bias = params
    return (weight.mv(x) + bias).square().sum()


def closure_of(optimizer: Optimizer, params: list[Parameter], x: Tensor) -> Callable[[], Any]:
    """What gives the gradients of the layer's loss, and returns it."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(params, x)
        torch.autograd.backward(loss)
        return loss

    return closure


def some_params(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return [Parameter(weight) for weight in random_tensors(SHAPES, 0, dtype)]


def copies(params: list[Parameter]) -> list[Parameter]:
    return [Parameter(param.detach().clone()) for param in params]


def states_of(optimizer: Optimizer) -> list[Tensor]:
    states = [optimizer.state.get(param, {}) for param in members(optimizer)]
    return [values[key] for values in states for key in sorted(values)]


def assert_same_run(a: Optimizer, b: Optimizer) -> None:
    """Parameters and states are equal in every bit."""
    assert_same_bits(members(a), members(b))
    assert_same_bits(states_of(a), states_of(b))


def assert_right_direction(before: float, after: float, options: Options) -> None:
    if options.get("maximize"):
        assert after > before
    else:
        assert after < before


def named(params: list[Parameter], are_named: bool) -> Any:
    return [(f"layer{i}", param) for i, param in enumerate(params)] if are_named else params


both_ways = pytest.mark.parametrize(
    ("first_named", "second_named"), [(False, False), (False, True), (True, False), (True, True)]
)

# --- inputs and errors ----------------------------------------------------------------------------


@every_input
def test_optim_infos_do_not_specify_global_cliquey_kwargs(
    info: OptimizerInfo, options: Options
) -> None:
    """Tests set the flags that exclude each other."""
    assert not options.keys() & {"foreach", "fused", "differentiable"}


def test_errors(info: OptimizerInfo) -> None:
    assert info.optim_error_inputs_func is not None
    for case in info.optim_error_inputs_func("cpu", torch.float32):
        params, kwargs = case.optimizer_error_input.params, case.optimizer_error_input.kwargs
        if issubclass(case.error_type, Warning):
            with pytest.warns(case.error_type, match=case.error_regex):
                build(info, params, **kwargs)
        elif case.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(case.error_type, match=case.error_regex):
                build(info, params, **kwargs)
        else:
            optimizer = build(info, params, **kwargs)
            with pytest.raises(case.error_type, match=case.error_regex):
                optimizer.step()


def test_errors_of_fused_and_differentiable(info: OptimizerInfo) -> None:
    with pytest.raises(RuntimeError, match="`fused` does not support `differentiable`"):
        build(info, [torch.ones(2)], fused=True, differentiable=True)


@pytest.mark.parametrize(
    ("tensors", "numbers"),
    [
        ({"lr": torch.tensor(0.25), "foreach": True}, {"lr": 0.25}),
        ({"betas": (0.5, torch.tensor(0.75))}, {"betas": (0.5, 0.75)}),
        (
            {"betas": (torch.tensor(0.5), torch.tensor(0.75)), "foreach": True},
            {"betas": (0.5, 0.75)},
        ),
    ],
    ids=["lr", "one beta", "betas"],
)
def test_tensors_that_torchs_foreach_refuses(
    info: OptimizerInfo, tensors: Options, numbers: Options
) -> None:
    """Limits of one implementation of torch's, as its errors say; here a tensor is its number."""
    if "betas" in numbers and "betas" not in build(info, some_params()).defaults:
        with pytest.raises(TypeError, match="unexpected keyword argument 'betas'"):
            build(info, some_params(), **tensors)
        return
    first, second = (build(info, some_params(), **kwargs) for kwargs in (tensors, numbers))
    for optimizer in (first, second):
        take_steps(optimizer, members(optimizer), 1, 2)
    assert_same_run(first, second)


# --- the update -----------------------------------------------------------------------------------


def test_matches_torchs_forloop(info: OptimizerInfo) -> None:
    """With all inputs of torch's own."""
    if info.name not in TWINS:
        assert info.name in ("Lion", "LARS", "LAMB", "DATE")
        return
    for case in TORCHS[info.name].optim_inputs_func(device="cpu"):
        if isinstance(case.kwargs.get("lr"), Tensor):  # else torch's arithmetic on it is float32
            case.kwargs["lr"] = case.kwargs["lr"].double()
        assert_parity(*both(info.name, **case.kwargs), torch.float64, steps=7)


def losses_of(
    optimizer: Optimizer, params: list[Parameter], x: Tensor, makers: Iterable[Callable[..., Any]]
) -> tuple[float, float]:
    """The layer's loss before and after 10 steps with schedulers."""
    schedulers = [make(optimizer) for make in makers]
    closure = closure_of(optimizer, params, x)
    before = closure().item()
    for _ in range(10):
        loss: Any = optimizer.step(closure)
        for scheduler in schedulers:
            scheduler.step(*([loss.detach()] if isinstance(scheduler, ReduceLROnPlateau) else []))
    return before, closure().item()


@every_input
def test_forloop_goes_right_direction(info: OptimizerInfo, options: Options) -> None:
    """Alone and with each list of schedulers."""
    for makers in ((), *info.scheduler_inputs):
        params, x = problem()
        optimizer = build(info, params, **copy.deepcopy(options))  # schedulers write to a rate
        before, after = losses_of(optimizer, params, x, makers)
        assert_right_direction(before, after, options)


@every_input
def test_noncontiguous_parameters_take_the_same_steps(
    info: OptimizerInfo, options: Options
) -> None:
    (dense, x), (sparse, _) = problem(), problem(contiguous=False)
    assert not any(param.is_contiguous() for param in sparse)
    optimizers = [build(info, params, **options) for params in (dense, sparse)]
    for _ in range(5):
        for optimizer in optimizers:
            optimizer.step(closure_of(optimizer, members(optimizer), x))
        assert_same_run(*optimizers)


def test_param_group_with_lrscheduler_goes_right_direction(info: OptimizerInfo) -> None:
    for makers in info.scheduler_inputs:
        params, x = problem()
        weight, bias = params
        optimizer = build(info, [{"params": [weight]}, {"params": [bias], "lr": 0.01}])
        before, after = losses_of(optimizer, params, x, makers)
        assert after < before


SOLVES: dict[str, Options] = {
    "SGD": {"lr": 0.05},
    "RMSprop": {"lr": 0.05},
    "Adagrad": {"lr": 0.5},
    "Adam": {"lr": 0.1},
    "AdamW": {"lr": 0.1},
    "Adadelta": {"lr": 5.0, "eps": 1e-3},
    "Lion": {"lr": 0.1},
    "LARS": {"lr": 0.05, "coefficient": 0.5},
    "LAMB": {"lr": 0.1},
    "DATE": {"lr": 0.05},
}
"""Options with which a class solves a regression in 200 steps."""


def test_a_regression_converges(info: OptimizerInfo) -> None:
    params, x = problem()
    optimizer = build(info, params, **SOLVES[info.name])
    scheduler = LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=200)
    closure = closure_of(optimizer, params, x)
    before = closure().item()
    for _ in range(200):
        optimizer.step(closure)
        scheduler.step()
    assert closure().item() < 1e-2 * before


def rosenbrock(param: Tensor) -> Tensor:
    x, y = param.flatten().unbind()
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def test_rosenbrock_comes_down_into_its_valley(info: OptimizerInfo) -> None:
    """By one coordinate after the other: the gradient of the other is 0."""
    param = Parameter(torch.tensor([[1.5, 1.5]], dtype=torch.float64))
    steep = {"lr": 1e-4} if info.name in ("SGD", "LARS") else {"lr": SOLVES[info.name]["lr"] / 10}
    optimizer = build(info, [param], **{**SOLVES[info.name], **steep})
    before = rosenbrock(param).item()
    for i in range(400):
        optimizer.zero_grad()
        torch.autograd.backward(rosenbrock(param))
        assert param.grad is not None
        param.grad[0, i % 2] = 0.0
        optimizer.step()
    assert rosenbrock(param).item() < 0.1 * before


@every_input
def test_tensor_lr(info: OptimizerInfo, options: Options) -> None:
    """A power of 2 has the same digits in both."""
    optimizers = [
        build(info, some_params(), **{**options, "lr": lr})
        for lr in (2.0**-9, torch.tensor(2.0**-9), torch.tensor([2.0**-9], dtype=torch.float64))
    ]
    for optimizer in optimizers:
        take_steps(optimizer, members(optimizer), 1, 2, 3)
    assert_same_run(optimizers[0], optimizers[1])
    assert_same_run(optimizers[0], optimizers[2])
    optimizers[1].param_groups[0]["lr"].fill_(0.5)
    for group in (*optimizers[0].param_groups, *optimizers[2].param_groups):
        group["lr"] = 0.5
    for optimizer in optimizers:
        take_steps(optimizer, members(optimizer), 4)
    assert_same_run(optimizers[0], optimizers[1])
    assert_same_run(optimizers[0], optimizers[2])


@every_input
def test_maximize_is_the_negated_gradient(info: OptimizerInfo, options: Options) -> None:
    up = build(info, some_params(), **{**options, "maximize": True})
    down = build(info, some_params(), **{**options, "maximize": False})
    for seed in (1, 2, 3):
        take_steps(up, members(up), seed)
        give_gradients(members(down), seed)
        for param in members(down):
            assert param.grad is not None
            param.grad.neg_()
        down.step()
    assert_same_run(up, down)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_input
def test_foreach_and_fused_match_forloop(
    info: OptimizerInfo, options: Options, dtype: torch.dtype
) -> None:
    """With a step without gradients, and a layer that is frozen for two of them."""
    flags: list[Options] = [{}, {"fused": True}, *([{"foreach": True}] * (dtype is DTYPES[0]))]
    runs = []
    for flag in flags:
        params = [*some_params(dtype), Parameter(torch.ones((), dtype=dtype))]
        optimizer = build(info, params, **options, **flag)
        runs.append(optimizer)
        for i in range(7):
            optimizer.zero_grad()
            frozen = i in (3, 4)
            params[1].requires_grad_(not frozen)
            if i != 2:
                give_gradients(params[:3], i)  # the last never has one
            if frozen:
                params[1].grad = None
            with unchanged(params if i == 2 else params[1:2] if frozen else params[3:]):
                optimizer.step()
        for param, steps in zip(params, (6, 4, 6, 0), strict=True):
            assert optimizer.state.get(param, {}).get("step", steps) == steps
    for optimizer in runs[1:]:
        assert_same_run(optimizer, runs[0])


def clip_factor(params: list[Parameter], largest: float | None) -> float:
    """The factor that makes the norm of all gradients at most the largest."""
    if largest is None:
        return 1.0
    norms = [param.grad.double().norm() for param in params if param.grad is not None]
    return min(1.0, largest / float(torch.stack(norms).norm()))


@every_input
def test_mixed_dtypes(info: OptimizerInfo, options: Options) -> None:
    """Of every dtype in one group, beside a tensor of integers without a gradient."""
    parts = [build(info, some_params(dtype), **options) for dtype in DTYPES]
    params = [param for part in parts for param in copies(members(part))]
    integers = Parameter(torch.arange(3), requires_grad=False)
    whole = build(info, [*params, integers], **options, fused=True)
    for seed in (1, 2):
        for part in parts:
            give_gradients(members(part), seed)
        grads = [param.grad for part in parts for param in members(part)]
        give(params, [grad.clone() for grad in grads if grad is not None])
        whole.step()
        factor = clip_factor(params, options.get("max_grad_norm"))
        for part in parts:
            part.param_groups[0]["max_grad_norm"] = None
            for param in members(part):
                assert param.grad is not None
                param.grad *= factor
            part.step()
    expected = [param for part in parts for param in members(part)]
    if factor == 1.0:
        assert_same_bits(params, expected)
    else:  # the factor's product is rounded to the gradient's dtype here, not there
        torch.testing.assert_close(params, expected)
    assert integers.tolist() == [0, 1, 2]
    assert integers not in whole.state


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@every_input
def test_another_default_dtype(info: OptimizerInfo, options: Options, dtype: torch.dtype) -> None:
    """It changes nothing: the count of steps is float32, as torch's fused one, on the CPU."""
    plain = build(info, some_params(), **options)
    take_steps(plain, members(plain), 1, 2)
    params = some_params()
    give_gradients(params, 1)
    with default_dtype(dtype):
        optimizer = build(info, params, **options)
        optimizer.step()
    give_gradients(params, 2)
    with default_dtype(dtype):
        optimizer.step()
    assert_same_run(optimizer, plain)
    for values in optimizer.state.values():
        step = values.get("step", torch.tensor(2.0))
        assert (step.dtype, step.shape, step.device.type) == (torch.float32, (), "cpu")


def meta_model(info: OptimizerInfo, flags: Options) -> tuple[torch.nn.Module, Optimizer]:
    """A model on the meta device with gradients there."""
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    return model, build(info, model.parameters(), **flags)


def test_fused_error_on_params_on_meta(info: OptimizerInfo) -> None:
    _, optimizer = meta_model(info, {"fused": True})
    match = "`fused=True` requires all the params to be floating point Tensors"
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()


@pytest.mark.parametrize("flags", FLAGS, ids=["default", "foreach", "fused"])
def test_params_on_meta_work_once_they_are_real(info: OptimizerInfo, flags: Options) -> None:
    model, optimizer = meta_model(info, flags)
    with pytest.raises(RuntimeError, match="meta"):
        optimizer.step()
    assert not optimizer.state
    optimizer.zero_grad(set_to_none=True)
    model.to_empty(device="cpu")
    optimizer.step()
    optimizer.param_groups[0]["params"] = [*model.parameters()]  # to_empty() has made others
    for param in model.parameters():
        torch.nn.init.ones_(param)
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert all((param < 1).all() for param in model.parameters())


@every_input
def test_fused_does_not_step_if_foundinf(info: OptimizerInfo, options: Options) -> None:
    """Neither a fresh run nor one in the middle; where none is found, it unscales."""
    optimizer, plain = (build(info, some_params(), **{**options, "fused": True}) for _ in range(2))
    params = members(optimizer)
    for seed in (1, 2):
        give_gradients(params, seed)
        for scale in (None, torch.tensor([8.0])):
            optimizer.grad_scale, optimizer.found_inf = scale, torch.tensor(1.0)
            with unchanged([*params, *states_of(optimizer)]):
                optimizer.step()
            steps = [values["step"] for values in optimizer.state.values() if "step" in values]
            assert all(step == seed - 1 for step in steps)
        for param in params:
            assert param.grad is not None
            param.grad *= 8.0
        optimizer.found_inf = torch.tensor(0.0)
        optimizer.step()
        take_steps(plain, members(plain), seed)
        assert_same_run(optimizer, plain)


# --- groups ---------------------------------------------------------------------------------------


@every_group
def test_param_groups_weight_decay(info: OptimizerInfo, options: Options) -> None:
    """A group of its own decay is an optimizer of its own."""
    (params, x), without = problem(), {**options, "weight_decay": 0.0}
    weight, bias = params
    optimizer = build(info, [{"params": [weight], **options}, {"params": [bias], **without}])
    twins = copies(params)
    others = [
        build(info, twins[:1], **options),
        build(info, twins[1:], **without),
    ]
    before = loss_of(params, x).item()
    for _ in range(10):
        optimizer.step(closure_of(optimizer, params, x))
        torch.autograd.backward(loss_of(twins, x))
        for other in others:
            other.step()
            other.zero_grad()
    assert_same_bits(twins, params)
    assert_right_direction(before, loss_of(params, x).item(), options)


@every_group
def test_param_groups_lr(info: OptimizerInfo, options: Options) -> None:
    """One group's rate is no other's."""
    params, x = problem()
    (still,) = (Parameter(tensor) for tensor in random_tensors([(2,)], 1))
    options = {"lr": 1e-3, **options}
    optimizer = build(info, [{"params": params, **options}, {"params": [still]}], lr=1e-28)
    before = loss_of(params, x).item()
    with unchanged([still]):
        for _ in range(10):
            loss = loss_of(params, x)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            still.grad = torch.ones_like(still)
            optimizer.step()
    assert_right_direction(before, loss_of(params, x).item(), options)


@every_input
def test_add_param_group(info: OptimizerInfo, options: Options) -> None:
    """New parameters begin at step 0, and the old go on with theirs."""
    if "max_grad_norm" in options:
        options["max_grad_norm"] = 1e30  # else one norm would be of all parameters
    if callable(options.get("exclude")):
        options["exclude"] = "1d"  # a predicate is not kept
    old, new = some_params(), some_params()
    optimizer = build(info, old, **options)
    twins = [build(info, copies(params), **options) for params in (old, new)]
    take_steps(optimizer, old, 1, 2)
    optimizer.add_param_group({"params": new})
    take_steps(twins[0], members(twins[0]), 1, 2)
    for seed in (3, 4):
        give_gradients(new, seed)
        take_steps(optimizer, old, seed)
        for twin in twins:
            take_steps(twin, members(twin), seed)
    assert_same_bits([*old, *new], [*members(twins[0]), *members(twins[1])])
    assert_same_bits(states_of(optimizer), [*states_of(twins[0]), *states_of(twins[1])])
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        optimizer.add_param_group({"params": new[0]})


# --- steps that do nothing ------------------------------------------------------------------------


@every_input
def test_step_is_noop_when_params_have_no_grad(info: OptimizerInfo, options: Options) -> None:
    params = random_tensors([(2, 3)] * 2, 0)
    optimizer = build(info, params, **options)
    loss = torch.tensor([1.0])
    with unchanged(params):
        assert optimizer.step(lambda: loss) is loss
    assert not optimizer.state


@every_input
def test_step_is_noop_for_zero_grads(info: OptimizerInfo, options: Options) -> None:
    """Where there is no weight decay."""
    params = some_params()
    optimizer = build(info, params, **{**options, "weight_decay": 0.0})
    for param in params:
        param.grad = torch.zeros_like(param)
    with unchanged(params):
        optimizer.step()
        optimizer.step(lambda: torch.tensor([1.0]))


@every_input
def test_parameters_without_elements(info: OptimizerInfo, options: Options) -> None:
    """They have states without elements and change no other layer."""
    empty = [Parameter(torch.empty(shape)) for shape in ((0,), (0, 4), (3, 0, 2))]
    optimizer = build(info, [*empty[:2], *some_params(), empty[2]], **options)
    plain = build(info, some_params(), **options)
    others = members(optimizer)[2:-1]
    for seed in (1, 2):
        for param in empty:
            param.grad = torch.empty_like(param)
        take_steps(optimizer, others, seed)
        take_steps(plain, members(plain), seed)
    assert_same_bits(others, members(plain))
    for param in empty:
        for key, value in optimizer.state.get(param, {}).items():
            assert value.shape == (() if key == "step" else param.shape)


@every_input
def test_non_empty_state(info: OptimizerInfo, options: Options) -> None:
    """Whoever has a state has something in it, and so has the next to step."""
    params = some_params()
    optimizer = build(info, params, **options)
    take_steps(optimizer, params, 1)
    assert all(len(values) > 0 for values in optimizer.state.values())
    assert set(optimizer.state) in (set(), set(params))


@every_input
def test_looking_for_a_state_changes_nothing(info: OptimizerInfo, options: Options) -> None:
    """A look at an absent one leaves an empty one there, as torch's dict does."""
    watched, plain = (build(info, some_params(), **options) for _ in range(2))
    for seed in (1, 2):
        for param in members(watched):
            assert isinstance(watched.state[param], dict)
        take_steps(watched, members(watched), seed)
        take_steps(plain, members(plain), seed)
    assert_same_run(watched, plain)


@pytest.mark.parametrize("loss", [torch.tensor([10.0]), torch.tensor(2.0), 3.5, 1, None], ids=repr)
def test_step_returns_what_the_closure_does(info: OptimizerInfo, loss: Any) -> None:
    params = some_params()
    optimizer = build(info, params)
    give_gradients(params, 1)
    assert optimizer.step(lambda: loss) is loss
    assert optimizer.step() is None


@every_input
def test_optimizer_can_be_printed(info: OptimizerInfo, options: Options) -> None:
    text = repr(build(info, some_params(), **options))
    for key in options.keys() & {"lr", "weight_decay", "maximize", "momentum"}:
        assert re.search(rf"\b{key}: {re.escape(format(options[key]))}$", text, re.MULTILINE)


# --- state dicts ----------------------------------------------------------------------------------


def without_names(state: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in group.items() if key != "param_names"}
        for group in state["param_groups"]
    ]


@pytest.mark.parametrize("is_named", [False, True])
@every_input
def test_state_dict_deterministic(info: OptimizerInfo, options: Options, is_named: bool) -> None:
    """A loaded state goes on in every bit, and loading does not change what was loaded."""
    params = some_params()
    optimizer = build(info, named(params, is_named), **options)
    take_steps(optimizer, params, 1, 2)
    twins = copies(params)
    twin = build(info, named(twins, not is_named), **options)
    saved = copy.deepcopy(optimizer.state_dict())
    tensors = [x for values in saved["state"].values() for x in values.values()]
    with unchanged(tensors):
        twin.load_state_dict(copy.deepcopy(saved))
    for seed in (3, 4):
        take_steps(optimizer, params, seed)
        take_steps(twin, twins, seed)
        assert_same_run(optimizer, twin)
    assert without_names(optimizer.state_dict()) == without_names(twin.state_dict())
    twin.param_groups.extend(twin.param_groups)  # a group that stands there twice
    assert without_names(twin.state_dict())[-1] == without_names(optimizer.state_dict())[-1]


@pytest.mark.parametrize("is_named", [False, True])
@every_input
def test_save_load_equality_with_weights_only(
    info: OptimizerInfo, options: Options, is_named: bool
) -> None:
    params = some_params()
    optimizer = build(info, named(params, is_named), **options)
    take_steps(optimizer, params, 1, 2)
    saved, loaded = optimizer.state_dict(), through_a_file(optimizer)
    assert loaded["param_groups"] == saved["param_groups"]
    assert loaded["state"].keys() == saved["state"].keys()
    for index, values in saved["state"].items():
        assert loaded["state"][index].keys() == values.keys()
        assert_same_bits([*loaded["state"][index].values()], [*values.values()])


@both_ways
@every_input
def test_can_load_from_to_named_state_dict(
    info: OptimizerInfo, options: Options, first_named: bool, second_named: bool
) -> None:
    """Names are kept where either has them."""
    first = build(info, named(some_params(), first_named), **options)
    second = build(info, named(some_params(), second_named), **options)
    take_steps(first, members(first), 1, 2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    take_steps(second, members(second), 3)
    (group,) = second.state_dict()["param_groups"]
    expected = ["layer0", "layer1", "layer2"] if first_named or second_named else None
    assert group.get("param_names") == expected


@every_input
def test_can_load_older_state_dict(info: OptimizerInfo, options: Options) -> None:
    """One that lacks what came later: those options stay as they are."""
    params = some_params()
    optimizer = build(info, params, **options)
    take_steps(optimizer, params, 1, 2)
    twin = copy.deepcopy(optimizer)
    older = copy.deepcopy(optimizer.state_dict())
    for group in older["param_groups"]:
        for flag in info.not_og_supported_flags:
            group.pop(flag, None)
    optimizer.load_state_dict(older)
    for run in (optimizer, twin):
        take_steps(run, members(run), 3)
    assert_same_run(optimizer, twin)
    assert without_names(optimizer.state_dict()) == without_names(twin.state_dict())


@every_input
def test_load_nontensor_step(info: OptimizerInfo, options: Options) -> None:
    params = some_params()
    optimizer = build(info, params, **options)
    take_steps(optimizer, params, 1, 2)
    twin = copy.deepcopy(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    for values in saved["state"].values():
        if "step" in values:
            values["step"] = values["step"].item()
    optimizer.load_state_dict(saved)
    for run in (optimizer, twin):
        take_steps(run, members(run), 3)
    assert_same_run(optimizer, twin)


@every_input
def test_deepcopy_copies_all_public_attrs(info: OptimizerInfo, options: Options) -> None:
    params = some_params()
    optimizer = build(info, params, **options)
    take_steps(optimizer, params, 1, 2)
    twin = copy.deepcopy(optimizer)
    public = [{key for key in vars(run) if not key.startswith("_")} for run in (optimizer, twin)]
    assert public[0] == public[1] == {"defaults", "state", "param_groups"}
    take_steps(optimizer, params, 3)
    take_steps(twin, members(twin), 3)
    assert_same_run(optimizer, twin)


# --- hooks ----------------------------------------------------------------------------------------


def mark(optimizer: Optimizer) -> None:
    optimizer.state["mark"] = 1  # type: ignore[index]


def unmark(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    return {**state_dict, "marked": state_dict["state"].pop("mark", None) is not None}


@every_input
def test_state_dict_pre_hook(info: OptimizerInfo, options: Options) -> None:
    optimizer = build(info, some_params(), **options)
    optimizer.register_state_dict_pre_hook(mark)
    assert optimizer.state_dict()["state"]["mark"] == 1


@every_input
def test_state_dict_post_hook(info: OptimizerInfo, options: Options) -> None:
    optimizer = build(info, some_params(), **options)
    optimizer.register_state_dict_post_hook(unmark)
    assert optimizer.state_dict()["marked"] is False


@every_input
def test_state_dict_pre_post_hook(info: OptimizerInfo, options: Options) -> None:
    optimizer = build(info, some_params(), **options)
    optimizer.register_state_dict_pre_hook(mark)
    optimizer.register_state_dict_post_hook(unmark)
    saved = optimizer.state_dict()
    assert saved["marked"] is True
    assert "mark" not in saved["state"]


def set_rate(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"][0]["lr"] = 0.25


def replace_rate(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    replaced = copy.deepcopy(state_dict)
    replaced["param_groups"][0]["lr"] = 0.5
    return replaced


@every_input
def test_load_state_dict_pre_hook_and_prepend(info: OptimizerInfo, options: Options) -> None:
    """The last hook decides, and a prepended one comes first."""
    optimizer = build(info, some_params(), **options)
    saved = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(set_rate)
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert optimizer.param_groups[0]["lr"] == 0.25
    optimizer.register_load_state_dict_pre_hook(replace_rate, prepend=True)
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert optimizer.param_groups[0]["lr"] == 0.25
    optimizer.register_load_state_dict_pre_hook(replace_rate)
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert optimizer.param_groups[0]["lr"] == 0.5


@every_input
def test_load_state_dict_post_hook(info: OptimizerInfo, options: Options) -> None:
    """It sees what was loaded, after the hooks before, and its word is the last."""
    optimizer = build(info, some_params(), **options)
    take_steps(optimizer, members(optimizer), 1)
    seen = []

    def look(optimizer: Optimizer) -> None:
        seen.append(optimizer.param_groups[0]["lr"])
        mark(optimizer)

    optimizer.register_load_state_dict_post_hook(look)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [optimizer.param_groups[0]["lr"]]
    assert optimizer.state.pop("mark") == 1
    optimizer.register_load_state_dict_pre_hook(replace_rate)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen[1:] == [0.5]
    assert "mark" in optimizer.state


@every_input
def test_step_all_hooks(info: OptimizerInfo, options: Options) -> None:
    """Global ones outside those of the optimizer, of ours and of torch's; none once removed."""
    params = some_params()
    optimizers = [build(info, params, **options), torch.optim.SGD(params)]
    calls: list[str] = []

    def call(name: str) -> Callable[..., None]:
        return lambda optimizer, args, kwargs: calls.append(name)

    handles = [
        register_optimizer_step_pre_hook(call("all before")),
        register_optimizer_step_post_hook(call("all after")),
    ]
    for optimizer in optimizers:
        handles.append(optimizer.register_step_pre_hook(call("before")))
        handles.append(optimizer.register_step_post_hook(call("after")))
    try:
        for times, optimizer in enumerate([*optimizers, optimizers[0]], start=1):
            optimizer.step()
            assert calls == ["all before", "before", "after", "all after"] * times
    finally:
        for handle in handles:
            handle.remove()
    calls.clear()
    for optimizer in optimizers:
        optimizer.step()
    assert not calls


@every_input
def test_step_pre_hook(info: OptimizerInfo, options: Options) -> None:
    """It comes before the gradients are read, and may change a closure."""
    hooked, plain = (build(info, some_params(), **options) for _ in range(2))

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        give_gradients(members(optimizer), 2)
        return (optimizer, lambda: 7.0), kwargs

    handle = hooked.register_step_pre_hook(before)
    give_gradients(members(hooked), 1)
    assert hooked.step() == 7.0
    take_steps(plain, members(plain), 2)
    assert_same_run(hooked, plain)
    handle.remove()
    assert hooked.step() is None


@every_input
def test_step_post_hook(info: OptimizerInfo, options: Options) -> None:
    """It sees the step's result."""
    params = some_params()
    optimizer = build(info, params, **options)
    counts: list[set[float]] = []

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        counts.append({float(values.get("step", 0)) for values in optimizer.state.values()})

    handle = optimizer.register_step_post_hook(after)
    take_steps(optimizer, params, 1, 2)
    assert len(counts) == 2
    uncounted: list[set[float]] = [{0.0}, {0.0}] if optimizer.state else [set(), set()]
    assert counts in ([{1.0}, {2.0}], uncounted)
    handle.remove()
    take_steps(optimizer, params, 3)
    assert len(counts) == 2


# --- the count ------------------------------------------------------------------------------------


def test_what_is_skipped_everywhere_is_true(info: OptimizerInfo) -> None:
    """The reasons that are not about a machine hold for the class."""
    assert not info.supports_complex
    assert not info.supports_sparse
    module = __import__(info.optim_cls.__module__, fromlist=["_"])
    assert not any(name.startswith("_multi_tensor") for name in vars(module))


def test_every_class_is_among_the_infos() -> None:
    ours: set[Any] = {info.optim_cls for info in INFOS}
    assert ours == {*CLASSES, DATE}


def test_the_count(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    """The last test: all that was selected has run, and how much that was is printed."""
    assert pairs_of(request.session.items) == RAN
    inputs = sum(len(inputs_of(info)) for info in INFOS)
    with capsys.disabled():
        print(
            f"\ntorch's optimizer suite: {len(RAN)} pairs of class and test ran, {inputs} inputs, "
            f"{len(INFOS) * len(DECLARED)} pairs are skipped by declaration"
        )
