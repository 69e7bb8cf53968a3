"""Sizes, alignments and strides: a layout is how a layer lies in memory, never what its step is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate

import pytest
import torch
from helpers import (
    TRUST,
    VARIANTS,
    Call,
    Options,
    assert_same_bits,
    bits,
    judged_step,
    make_call,
    random_tensors,
    unchanged,
)
from torch import Tensor
from torch.nn import Parameter

import date_kernels
from date_kernels import make_stepper
from date_kernels.plan import LEAF, Plan
from date_optim import SGD, RMSprop, TrustRatio

FORMS = ["nesterov", "rmsprop-centered-momentum"]
Shape = tuple[int, ...]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> tuple[str, Options]:
    """A rule and options that use all of its states."""
    rule, options = VARIANTS[request.param]
    return rule, {**options, **TRUST}


def take_two(call: Call) -> Call:
    """Take two steps of one plan; gradients stay as they are."""
    stepper = make_stepper(call.rule)
    for _ in range(2):
        call.take(stepper.step)
    return call


def assert_same_steps(call: Call, expected: Call) -> None:
    """Assert that two steps of both give the same values at the same indices."""
    take_two(call)
    take_two(expected)
    for i in range(len(call.params)):
        assert_same_bits(call.layer(i), expected.layer(i))


def layer(form: tuple[str, Options], param: Tensor, grad: Tensor) -> Call:
    """Return a call of one layer, whose states lie as torch's ``zeros_like`` lays them."""
    return make_call(form[0], [param], [grad], form[1])


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def in_memory_order(call: Call, param: Tensor) -> Call:
    """Return the call whose flat tensors hold the elements in the order of `param`'s memory."""
    strides = param.stride()
    outermost_first = sorted(range(param.ndim), key=lambda d: strides[d], reverse=True)

    def flat(tensor: Tensor) -> Tensor:
        return contiguous(tensor.permute(outermost_first)).reshape(-1)

    return Call(
        call.rule,
        [flat(p) for p in call.params],
        [flat(g) for g in call.grads],
        {k: [None if t is None else flat(t) for t in column] for k, column in call.states.items()},
        [None if t is None else t.clone() for t in call.steps],
        call.groups,
    )


# --- sizes and alignments -------------------------------------------------------------------------

SIZES: list[int | Shape] = [(), (0,), (3, 0, 2), 1, 2, 31, LEAF, 2**16 - 1, 2**16, 2**16 + 1]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_alone(form: tuple[str, Options], size: int | Shape) -> None:
    call = layer(form, *random_tensors([size, size], 0))
    stepper = make_stepper(call.rule)
    for _ in range(2):
        judged_step(call, stepper.step)


def test_sizes_together(form: tuple[str, Options]) -> None:
    call = make_call(form[0], random_tensors(SIZES, 0), random_tensors(SIZES, 1), form[1])
    judged_step(call, make_stepper(call.rule).step)


def test_three_thousand_tiny_tensors(form: tuple[str, Options]) -> None:
    sizes = [1 + i % 7 for i in range(3000)]
    call = make_call(form[0], random_tensors(sizes, 0), random_tensors(sizes, 1), form[1])
    plan = Plan(call.rule)
    judged_step(call, plan.step)
    judged_step(call, plan.step)
    assert plan.builds == 1


@pytest.mark.parametrize("offset", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [17, LEAF + 3])
def test_views_that_are_not_aligned(form: tuple[str, Options], size: int, offset: int) -> None:
    """As flat buffers give them: 4 bytes off any vector's alignment."""

    def shifted(tensor: Tensor) -> Tensor:
        view = torch.empty(size + offset)[offset:]
        return view.copy_(tensor)

    call = layer(form, *random_tensors([size, size], 0))
    views = call.copy()
    views.params, views.grads = [shifted(call.params[0])], [shifted(call.grads[0])]
    views.states = {
        key: [None if t is None else shifted(t) for t in column]
        for key, column in call.states.items()
    }
    assert views.params[0].data_ptr() % 16 == (views.grads[0].data_ptr()) % 16 == 4 * offset % 16
    assert_same_steps(views, call)


def test_layers_of_one_flat_buffer(form: tuple[str, Options]) -> None:
    sizes = [1, 7, LEAF + 1, 30]
    call = make_call(form[0], random_tensors(sizes, 0), random_tensors(sizes, 1), form[1])
    flat = call.copy()
    ends = list(accumulate(sizes))[:-1]
    flat.params = list(torch.cat(call.params).tensor_split(ends))
    flat.grads = list(torch.cat(call.grads).tensor_split(ends))
    assert_same_steps(flat, call)


# --- strides --------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "contiguous": lambda t: t.contiguous(),
}
GAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "column": lambda t: torch.stack([t, t + 1], dim=-1)[..., 0],
    "rows": lambda t: torch.cat([t, t + 1], dim=1)[:, : t.shape[1]],
    "every other": lambda t: t.repeat_interleave(2, dim=2)[:, :, ::2],
}
IMAGE = (6, 5, 4, 3)


@pytest.mark.parametrize("grad_layout", [*LAYOUTS, *GAPS])
@pytest.mark.parametrize("param_layout", LAYOUTS)
def test_dense_layouts(form: tuple[str, Options], param_layout: str, grad_layout: str) -> None:
    """The sums run in the order of the parameter's memory, wherever the gradient lies."""
    w, g = random_tensors([IMAGE, IMAGE], 0)
    param = LAYOUTS[param_layout](w)
    call = layer(form, param, {**LAYOUTS, **GAPS}[grad_layout](g))
    assert call.params[0].stride() == param.stride()
    flat = in_memory_order(call, param)
    judged_step(layer(form, param.clone(), call.grads[0]), make_stepper(call.rule).step)
    take_two(call)
    take_two(flat)
    again = in_memory_order(call, param)
    assert_same_bits(again.layer(0), flat.layer(0))
    assert call.params[0].stride() == param.stride()


@pytest.mark.parametrize("grad_layout", [*LAYOUTS, *GAPS])
@pytest.mark.parametrize("param_layout", GAPS)
def test_layouts_with_gaps(form: tuple[str, Options], param_layout: str, grad_layout: str) -> None:
    """A copy in contiguous order takes the step; what lies in the gaps stays as it is."""
    w, g = random_tensors([IMAGE, IMAGE], 0)
    param = GAPS[param_layout](w)
    call = layer(form, param, {**LAYOUTS, **GAPS}[grad_layout](g))
    assert not call.params[0].is_contiguous()
    base = param._base
    assert base is not None
    inside = torch.zeros_like(base, dtype=torch.bool)
    torch.as_strided(inside, param.size(), param.stride()).fill_(True)
    gaps = base[~inside].clone()
    assert gaps.numel() > 0
    assert_same_steps(call, layer(form, contiguous(param), contiguous(g)))
    assert torch.equal(base[~inside], gaps)


@pytest.mark.parametrize(
    "expanded",
    [
        lambda: torch.tensor(0.5).expand(IMAGE),
        lambda: torch.randn(5, 1, 3).expand(IMAGE),
        lambda: torch.randn(IMAGE[:3])[..., None].expand(IMAGE),
    ],
    ids=["scalar", "middle", "last"],
)
@pytest.mark.parametrize("param_layout", [*LAYOUTS, *GAPS])
def test_expanded_gradients(
    form: tuple[str, Options], param_layout: str, expanded: Callable[[], Tensor]
) -> None:
    """As ``loss = w.sum()`` gives them: stride 0."""
    torch.manual_seed(0)
    grad = expanded()
    assert 0 in grad.stride()
    param = {**LAYOUTS, **GAPS}[param_layout](random_tensors([IMAGE], 0)[0])
    call, other = layer(form, param, grad), layer(form, param.clone(), contiguous(grad))
    with unchanged([grad]):
        assert_same_steps(call, other)


def test_a_plan_follows_a_gradient_that_changes_its_layout(form: tuple[str, Options]) -> None:
    w, g = random_tensors([IMAGE, IMAGE], 0)
    call, other = layer(form, w, g), layer(form, w.clone(), g)
    plan = Plan(call.rule)
    # The parameter's own layout comes first, for which a plan makes no copy.
    for arrange in (LAYOUTS["contiguous"], *LAYOUTS.values(), *GAPS.values()):
        call.grads = [arrange(g)]
        call.take(plan.step)
        other.take(partial(date_kernels.step, call.rule))
        assert_same_bits(call.layer(0), other.layer(0))


def test_states_in_another_layout(form: tuple[str, Options]) -> None:
    """As a checkpoint of a contiguous model gives them to a channels_last one."""
    w, g = random_tensors([IMAGE, IMAGE], 0)
    call = layer(form, LAYOUTS["channels_last"](w), LAYOUTS["channels_last"](g))
    other = call.copy()
    other.states = {
        key: [None if t is None else t.contiguous() for t in column]
        for key, column in call.states.items()
    }
    assert_same_steps(other, call)


def test_dimensions_of_size_one_have_any_stride(form: tuple[str, Options]) -> None:
    w, g = random_tensors([(1, 40, 1), (1, 40, 1)], 0)
    strange = torch.as_strided(w.clone(), (1, 40, 1), (7, 1, 99))
    call, other = layer(form, strange, g), layer(form, w, g)
    plan = Plan(call.rule)
    for _ in range(2):
        call.take(plan.step)
    take_two(other)
    assert_same_bits(call.layer(0), other.layer(0))


# --- through the optimizers -----------------------------------------------------------------------


@pytest.mark.parametrize("layout", [*LAYOUTS, *GAPS])
@pytest.mark.parametrize("make", [SGD, RMSprop])
def test_parameters_of_an_optimizer(make: type[SGD] | type[RMSprop], layout: str) -> None:
    w, g = random_tensors([IMAGE, IMAGE], 0)
    arrange = {**LAYOUTS, **GAPS}[layout]
    param, plain = Parameter(arrange(w)), Parameter(contiguous(w))
    assert param.stride() == arrange(w).stride()
    pinned = TrustRatio(lower=0.5, upper=0.5)  # else the order of the sums shows in the last bit
    for p in (param, plain):
        optimizer = make([p], lr=0.1, momentum=0.9, trust=pinned)
        for _ in range(3):
            p.grad = g.clone()
            optimizer.step()
    assert torch.equal(param, plain)


def test_module_in_channels_last() -> None:
    torch.manual_seed(0)
    module = torch.nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = SGD(module.parameters(), lr=0.1, momentum=0.9, trust=TrustRatio(upper=0.5))
    module(torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)).square().sum().backward()
    before = module.weight.detach().clone()
    optimizer.step()
    state = optimizer.state[module.weight]["momentum_buffer"]
    assert state.stride() == module.weight.stride()
    ratio = optimizer.read_telemetry()["0.0"].ratio
    grad = module.weight.grad
    assert grad is not None
    torch.testing.assert_close(module.weight.detach(), before - 0.1 * ratio * grad)


# --- what torch must know -------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("layout", ["contiguous", "column"])
def test_versions_tell_of_the_write(backend: str, layout: str, form: tuple[str, Options]) -> None:
    w, g = random_tensors([IMAGE, IMAGE], 0)
    call = layer(form, {**LAYOUTS, **GAPS}[layout](w), g)
    written = call.written()
    before = [tensor._version for tensor in written]
    grad = call.grads[0]._version
    call.take(partial(date_kernels.step, call.rule, backend=backend))
    after = [tensor._version for tensor in written]
    assert all(b > a for a, b in zip(before, after, strict=True))
    assert call.grads[0]._version == grad


@pytest.mark.parametrize("make", [SGD, RMSprop])
def test_a_later_backward_through_a_stepped_parameter_raises(
    make: type[SGD] | type[RMSprop],
) -> None:
    param = Parameter(torch.ones(5))
    optimizer = make([param])
    loss = (param * param).sum()
    param.grad = torch.ones(5)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss)


@pytest.mark.parametrize("layout", [*LAYOUTS, *GAPS])
def test_gradients_are_read_only(layout: str, form: tuple[str, Options]) -> None:
    """Bits, address and version; with every option that scales a gradient."""
    w, g = random_tensors([IMAGE, IMAGE], 0)
    grad = {**LAYOUTS, **GAPS}[layout](g)
    call = layer((form[0], {**form[1], "maximize": True, "max_grad_norm": 0.5}), w, grad)
    whole = grad._base if grad._base is not None else grad
    before = (bits(whole), grad.data_ptr(), grad._version)
    for backend in ("cpu", "reference"):
        call.take(partial(date_kernels.step, call.rule, backend=backend), grad_scale=2.0)
        assert (bits(whole), grad.data_ptr(), grad._version) == before
