"""Sizes, alignments and strides: a layout is how a layer lies in memory, never what its step is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import pytest
import torch
from helpers import (
    DTYPES,
    TRUST,
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
from variants import FULL, VARIANTS

import date_kernels
from date_kernels import MASTER, make_stepper
from date_kernels.items import LEAF
from date_kernels.layers import HALF
from date_kernels.plan import Plan
from date_optim import LAMB, LARS, SGD, Adadelta, Adagrad, Adam, RMSprop, TrustRatio

Shape = tuple[int, ...]

UPDATE: Options = {**TRUST, "trust_of": "update", "weight_decay": 0.03, "weight_decay_in": "update"}
RATIOS = {variant: (TRUST, UPDATE)[at % 2] for at, variant in enumerate(FULL.values())}
"""A variant of each family that uses all of its states, and its trust ratio."""

IMAGE = (6, 5, 4, 3)


class Form(NamedTuple):
    """A rule with options, the dtypes of a layer and its gradient, and whether it has a master."""

    rule: str
    options: Options
    dtype: torch.dtype
    grad_dtype: torch.dtype

    @property
    def has_master(self) -> bool:
        return bool(self.options["master_weights"]) and self.dtype in HALF


def _forms() -> Iterator[tuple[str, Form]]:
    for variant, trust in RATIOS.items():
        rule, options = VARIANTS[variant]
        # Of one rule every pair of dtypes, of the others one each.
        pairs = DTYPES if rule == "adam" else DTYPES[:1]
        for dtype, grad_dtype in pairs:
            for master in (False, True) if dtype in HALF else (False,):
                words = [variant, str(dtype)[6:], str(grad_dtype)[6:], *["master"] * master]
                group = {**options, **trust, "master_weights": master}
                yield "-".join(words), Form(rule, group, dtype, grad_dtype)


FORMS = dict(_forms())


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Form:
    """A rule and options that use all of its states, and dtypes."""
    return FORMS[request.param]


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


def drawn(form: Form, size: int | Shape = IMAGE) -> tuple[Tensor, Tensor]:
    """Return the weights and the gradient of a layer, contiguous."""
    w, g = random_tensors([size, size], 0)
    return w.to(form.dtype), g.to(form.grad_dtype)


def layer(form: Form, param: Tensor, grad: Tensor, **options: Any) -> Call:
    """Return a call of one layer, whose states lie as torch's ``zeros_like`` lays them."""
    call = make_call(form.rule, [param], [grad], {**form.options, **options})
    assert (call.states[MASTER][0] is not None) == form.has_master
    return call


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
def test_sizes_alone(form: Form, size: int | Shape) -> None:
    call = layer(form, *drawn(form, size))
    stepper = make_stepper(call.rule)
    for _ in range(2):
        judged_step(call, stepper.step)


def test_sizes_together(form: Form) -> None:
    params = random_tensors(SIZES, 0, form.dtype)
    grads = random_tensors(SIZES, 1, form.grad_dtype)
    judged_step(make_call(form.rule, params, grads, form.options), make_stepper(form.rule).step)


@pytest.mark.parametrize("variant", RATIOS)
def test_dtypes_together(variant: str) -> None:
    """Layers of every dtype and size in one call, each as if it were alone."""
    rule, options = VARIANTS[variant]
    pairs = [(size, *pair) for size in SIZES[:7] for pair in DTYPES]
    params = [random_tensors([size], i, dtype)[0] for i, (size, dtype, _) in enumerate(pairs)]
    grads = [random_tensors([size], 99 + i, dtype)[0] for i, (size, _, dtype) in enumerate(pairs)]
    group = {**options, **RATIOS[variant], "master_weights": True}
    call = make_call(rule, params, grads, group)
    alone = [make_call(rule, [p], [g], group).copy() for p, g in zip(params, grads, strict=True)]
    take_two(call)
    for i, one in enumerate(alone):
        take_two(one)
        assert_same_bits(call.layer(i), one.layer(0))


@pytest.mark.parametrize("variant", ["sgd-momentum", "adam-amsgrad"])
def test_three_thousand_tiny_tensors(variant: str) -> None:
    rule, options = VARIANTS[variant]
    params, grads = [], []
    for i in range(3000):
        size, (dtype, grad_dtype) = 1 + i % 7, DTYPES[i % len(DTYPES)]
        params += random_tensors([size], i, dtype)
        grads += random_tensors([size], i + 3000, grad_dtype)
    call = make_call(rule, params, grads, {**options, **RATIOS[variant], "master_weights": True})
    plan = Plan(rule)
    judged_step(call, plan.step)
    call.take(plan.step)
    assert plan.builds == 1


@pytest.mark.parametrize("offset", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [17, LEAF + 3])
def test_views_that_are_not_aligned(form: Form, size: int, offset: int) -> None:
    """As flat buffers give them: one element off any vector's alignment."""

    def shifted(tensor: Tensor) -> Tensor:
        view = torch.empty(size + offset, dtype=tensor.dtype)[offset:]
        assert view.data_ptr() % 64 == offset * view.element_size()
        return view.copy_(tensor)

    call = layer(form, *drawn(form, size))
    views = call.copy()
    views.params, views.grads = [shifted(call.params[0])], [shifted(call.grads[0])]
    views.states = {
        key: [None if t is None else shifted(t) for t in column]
        for key, column in call.states.items()
    }
    assert_same_steps(views, call)


def test_layers_of_one_flat_buffer(form: Form) -> None:
    sizes = [1, 7, LEAF + 1, 30]
    params = random_tensors(sizes, 0, form.dtype)
    grads = random_tensors(sizes, 1, form.grad_dtype)
    call = make_call(form.rule, params, grads, form.options)
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


@pytest.mark.parametrize("grad_layout", [*LAYOUTS, *GAPS])
@pytest.mark.parametrize("param_layout", LAYOUTS)
def test_dense_layouts(form: Form, param_layout: str, grad_layout: str) -> None:
    """The sums run in the order of the parameter's memory, wherever the gradient lies."""
    w, g = drawn(form)
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
def test_layouts_with_gaps(form: Form, param_layout: str, grad_layout: str) -> None:
    """A copy in contiguous order takes the step; what lies in the gaps stays as it is."""
    w, g = drawn(form)
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
    "shape", [(), (5, 1, 3), (*IMAGE[:3], 1)], ids=["scalar", "middle", "last"]
)
@pytest.mark.parametrize("param_layout", [*LAYOUTS, *GAPS])
def test_expanded_gradients(form: Form, param_layout: str, shape: Shape) -> None:
    """As ``loss = w.sum()`` gives them: stride 0."""
    w, _ = drawn(form)
    grad = random_tensors([shape], 1, form.grad_dtype)[0].expand(IMAGE)
    assert 0 in grad.stride()
    param = {**LAYOUTS, **GAPS}[param_layout](w)
    call, other = layer(form, param, grad), layer(form, param.clone(), contiguous(grad))
    with unchanged([grad]):
        assert_same_steps(call, other)


def test_a_plan_follows_a_gradient_that_changes_its_layout(form: Form) -> None:
    w, g = drawn(form)
    call, other = layer(form, w, g), layer(form, w.clone(), g)
    plan = Plan(call.rule)
    # The parameter's own layout comes first, for which a plan makes no copy.
    for arrange in (LAYOUTS["contiguous"], *LAYOUTS.values(), *GAPS.values()):
        call.grads = [arrange(g)]
        call.take(plan.step)
        other.take(partial(date_kernels.step, call.rule))
        assert_same_bits(call.layer(0), other.layer(0))


def test_states_in_another_layout(form: Form) -> None:
    """As a checkpoint of a contiguous model gives them to a channels_last one."""
    w, g = drawn(form)
    call = layer(form, LAYOUTS["channels_last"](w), LAYOUTS["channels_last"](g))
    other = call.copy()
    other.states = {
        key: [None if t is None else t.contiguous() for t in column]
        for key, column in call.states.items()
    }
    assert_same_steps(other, call)


def test_dimensions_of_size_one_have_any_stride(form: Form) -> None:
    w, g = drawn(form, (1, 40, 1))
    strange = torch.as_strided(w.clone(), (1, 40, 1), (7, 1, 99))
    call, other = layer(form, strange, g), layer(form, w, g)
    plan = Plan(call.rule)
    for _ in range(2):
        call.take(plan.step)
    take_two(other)
    assert_same_bits(call.layer(0), other.layer(0))
    assert plan.builds == 1


# --- through the optimizers -----------------------------------------------------------------------


PINNED = TrustRatio(lower=0.5, upper=0.5)  # else the order of the sums shows in the last bit
MAKERS: dict[str, Any] = {
    "SGD": partial(SGD, momentum=0.9, trust=PINNED),
    "RMSprop": partial(RMSprop, momentum=0.9, trust=PINNED),
    "Adagrad": partial(Adagrad, trust=PINNED),
    "Adam": partial(Adam, amsgrad=True, trust=PINNED),
    "Adadelta": partial(Adadelta, trust=TrustRatio(of="update", lower=2.0, upper=2.0)),
    "LARS": partial(LARS, lower=0.5, upper=0.5),
    "LAMB": partial(LAMB, weight_decay=0.1, lower=0.5, upper=0.5),
}


@pytest.mark.parametrize("layout", [*LAYOUTS, *GAPS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("name", MAKERS)
def test_parameters_of_an_optimizer(name: str, dtype: torch.dtype, layout: str) -> None:
    w, g = random_tensors([IMAGE, IMAGE], 0, dtype)
    arrange = {**LAYOUTS, **GAPS}[layout]
    param, plain = Parameter(arrange(w)), Parameter(contiguous(w))
    assert param.stride() == arrange(w).stride()
    states = []
    for p in (param, plain):
        optimizer = MAKERS[name]([p], lr=0.1, master_weights=True)
        for _ in range(3):
            p.grad = g.clone()
            optimizer.step()
        states.append(optimizer.state[p])
    assert_same_bits([param], [plain])
    assert (MASTER in states[0]) == (dtype in HALF)
    assert_same_bits(list(states[0].values()), list(states[1].values()))


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
def test_versions_tell_of_the_write(backend: str, layout: str, form: Form) -> None:
    w, g = drawn(form)
    call = layer(form, {**LAYOUTS, **GAPS}[layout](w), g)
    written = call.written()
    before = [tensor._version for tensor in written]
    grad = call.grads[0]._version
    call.take(partial(date_kernels.step, call.rule, backend=backend))
    after = [tensor._version for tensor in written]
    assert all(b > a for a, b in zip(before, after, strict=True))
    assert call.grads[0]._version == grad


@pytest.mark.parametrize("name", MAKERS)
def test_a_later_backward_through_a_stepped_parameter_raises(name: str) -> None:
    param = Parameter(torch.ones(5))
    optimizer = MAKERS[name]([param])
    loss = (param * param).sum()
    param.grad = torch.ones(5)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss)


@pytest.mark.parametrize("layout", [*LAYOUTS, *GAPS])
def test_gradients_are_read_only(layout: str, form: Form) -> None:
    """Bits, address and version; with every option that scales a gradient."""
    w, g = drawn(form)
    grad = {**LAYOUTS, **GAPS}[layout](g)
    call = layer(form, w, grad, maximize=True, max_grad_norm=0.5)
    whole = grad._base if grad._base is not None else grad
    before = (bits(whole), grad.data_ptr(), grad._version)
    for backend in ("cpu", "reference"):
        call.take(partial(date_kernels.step, call.rule, backend=backend), grad_scale=2.0)
        assert (bits(whole), grad.data_ptr(), grad._version) == before
