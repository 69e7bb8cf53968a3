"""States of 16-bit parameters kept in 16 bits: `state_dtype`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    TARGETS,
    Call,
    assert_same_bits,
    judged_optimizer_step,
    judged_step,
    make_call,
    optimizer_unchanged,
    random_tensors,
    unchanged,
)
from test_backend import RATIOS, names_of
from test_checkpoints import through_a_file
from torch import Tensor
from torch.nn import Parameter
from variants import FULL, VARIANTS

from date_kernels import MASTER, RULES, make_stepper, step
from date_kernels.items import LEAF
from date_kernels.plan import Plan
from date_optim import LAMB, SGD, AdamW, TrustRatio

B16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SIZES = (1, 33, 1024, LEAF, LEAF + 1, 3 * LEAF + 700)


def mid_run(name: str, ratio: str, dtype: torch.dtype, **options: Any) -> Call:
    rule, chosen = VARIANTS[name]
    params, grads = (random_tensors(SIZES, seed, dtype) for seed in (0, 1))
    group = {**chosen, **RATIOS[ratio], "weight_decay": 0.03, "state_dtype": dtype, **options}
    return make_call(rule, params, grads, group, taken=3)


def dtypes_of(name: str) -> list[torch.dtype]:
    return [B16] if RULES[VARIANTS[name][0]].squares else [B16, F16]


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize(
    ("ratio", "name", "dtype"),
    [
        (ratio, name, dtype)
        for ratio, of in RATIOS.items()
        for name in names_of(of)
        for dtype in dtypes_of(name)
    ],
)
def test_every_variant(name: str, ratio: str, dtype: torch.dtype, master: bool) -> None:
    """States within half an ulp of 16 bits more; with a master the weights as of float32 states,
    since an update is of what was computed, not of what is stored."""
    call = mid_run(name, ratio, dtype, master_weights=master)
    judged_step(call, Plan(call.rule, chunk=LEAF).step)
    rule = RULES[call.rule]
    for key in rule.used(rule.complete(call.groups[0])):
        assert {x.dtype for x in call.states[key] if x is not None} == {dtype}
    assert (call.states[MASTER][0] is not None) == master


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", FULL.values())
def test_the_reference_rounds_them_alike(name: str, ratio: str) -> None:
    call = mid_run(name, ratio, B16) if ratio == "gradient" else mid_run(name, "plain", B16)
    judged_step(call, make_stepper(call.rule, "reference").step)


@pytest.mark.parametrize("name", FULL.values())
@pytest.mark.parametrize("ratio", ["plain", "update"])
def test_the_same_bits_by_every_instruction_set_and_chunk(name: str, ratio: str) -> None:
    rule, _ = VARIANTS[name]
    plans = [Plan(rule, target=target) for target in TARGETS] + [Plan(rule, chunk=LEAF)]
    results = []
    for plan in plans:
        call = mid_run(name, ratio, B16, momentum_scaling="outside")
        call.take(plan.step)
        results.append(call.written())
    for other in results[1:]:
        assert_same_bits(other, results[0])


def test_a_skipped_step_leaves_them() -> None:
    call = mid_run(FULL["adam"], "update", B16, on_nonfinite="skip")
    call.grads[0][0] = torch.inf
    with unchanged(call.written()):
        assert call.take(Plan("adam").step).skipped.all()


def parameters(dtype: torch.dtype) -> list[Parameter]:
    params = [Parameter(x) for x in random_tensors([(5, 4), (7,)], 0, dtype)]
    for param, grad in zip(params, random_tensors([(5, 4), (7,)], 1, dtype), strict=True):
        param.grad = grad
    return params


def test_an_optimizer_keeps_them() -> None:
    optimizer = LAMB(parameters(B16), lr=0.01, master_weights=True, state_dtype=B16)
    for _ in range(3):
        judged_optimizer_step(optimizer)
    for values in optimizer.state.values():
        assert values["exp_avg"].dtype == values["exp_avg_sq"].dtype == B16
        assert values[MASTER].dtype == values["step"].dtype == F32


@pytest.mark.parametrize("name", [name for name in VARIANTS if F16 not in dtypes_of(name)])
def test_squares_do_not_fit_float16(name: str) -> None:
    """A step would divide by one that has become 0."""
    call = mid_run(name, "plain", F16, state_dtype=None)
    call.groups[0]["state_dtype"] = F16
    message = r"Invalid state_dtype value: torch.float16; params\[0\] has '\w+', and squares leave"
    with unchanged(call.written()), pytest.raises(ValueError, match=message):
        call.take(Plan(call.rule).step)


@pytest.mark.parametrize(("saved", "params"), [(B16, F32), (F16, B16), ("torch.bfloat16", B16)])
def test_a_checkpoint_of_what_this_model_cannot_keep_changes_nothing(
    saved: Any, params: torch.dtype
) -> None:
    dtype = saved if isinstance(saved, torch.dtype) else B16
    first = SGD(parameters(dtype), lr=0.7, momentum=0.9, state_dtype=dtype)
    first.step()
    state = first.state_dict()
    state["param_groups"][0]["state_dtype"] = saved
    other = SGD(parameters(params), lr=0.1, momentum=0.9)
    other.step()
    with optimizer_unchanged(other), pytest.raises(ValueError, match="Invalid state_dtype value"):
        other.load_state_dict(state)
    assert other.param_groups[0]["lr"] == 0.1
    other.step()


def test_an_older_pickle_has_none() -> None:
    optimizer = SGD(parameters(B16), lr=0.1, momentum=0.9)
    state = optimizer.__getstate__()
    for options in (state["defaults"], *state["param_groups"]):
        del options["state_dtype"]
    older = SGD.__new__(SGD)
    older.__setstate__(state)
    assert older.param_groups[0]["state_dtype"] is None
    older.add_param_group({"params": parameters(B16)})
    older.step()


@pytest.mark.parametrize(("saved", "loaded"), [(None, B16), (B16, None), (B16, F32)])
def test_a_checkpoint_says_what_they_are_kept_in(
    saved: torch.dtype | None, loaded: torch.dtype | None
) -> None:
    first = AdamW(parameters(B16), state_dtype=saved)
    first.step()
    other = AdamW(parameters(B16), state_dtype=loaded)
    other.load_state_dict(through_a_file(first))
    assert other.param_groups[0]["state_dtype"] == saved
    for mine, its in zip(other.state.values(), first.state.values(), strict=True):
        assert mine["exp_avg"].dtype == its["exp_avg"].dtype == (saved or F32)
        assert torch.equal(mine["exp_avg"], its["exp_avg"])
    judged_optimizer_step(other)


def test_torchs_checkpoints_come_as_they_are_and_are_kept_in_16_bits() -> None:
    params = parameters(B16)
    torchs = torch.optim.AdamW(params)
    torchs.step()
    ours = AdamW(parameters(B16), state_dtype=B16)
    ours.load_state_dict(torchs.state_dict())
    for mine, its in zip(ours.state.values(), torchs.state.values(), strict=True):
        assert mine["exp_avg_sq"].dtype == B16
        assert_same_bits([mine["exp_avg_sq"]], [its["exp_avg_sq"]])
    judged_optimizer_step(ours)


@pytest.mark.parametrize(
    ("dtype", "asked"),
    [(F32, B16), (F32, F64), (F64, F32), (B16, F16), (F16, B16), (B16, F64), (B16, "bfloat16")],
)
def test_what_no_kernel_keeps_is_refused(dtype: torch.dtype, asked: Any) -> None:
    message = r"Invalid state_dtype value: .*; {} is torch.{}, whose states are kept in torch.float"
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=message.format("0.0", name)):
        SGD(parameters(dtype), lr=0.1, momentum=0.9, state_dtype=asked)
    optimizer = SGD(parameters(dtype), lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=message.format("1.0", name)):
        optimizer.add_param_group({"params": parameters(dtype), "state_dtype": asked})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0]["state_dtype"] = asked
    with (
        optimizer_unchanged(optimizer),
        pytest.raises(ValueError, match=message.format("0.0", name)),
    ):
        optimizer.step()
    weights: list[Tensor] = random_tensors([3], 0, dtype)
    group = {"params": [0], "lr": 0.1, "state_dtype": asked}
    with unchanged(weights), pytest.raises(ValueError, match=message.format(r"params\[0\]", name)):
        step("sgd", weights, random_tensors([3], 1, dtype), {}, [None], [group])


def test_an_option_that_changes_under_its_states_is_refused() -> None:
    optimizer = SGD(parameters(B16), lr=0.1, momentum=0.9)
    optimizer.step()
    optimizer.param_groups[0]["state_dtype"] = B16
    with optimizer_unchanged(optimizer), pytest.raises(TypeError, match="state 'momentum_buffer'"):
        optimizer.step()
    optimizer.param_groups[0]["state_dtype"] = None
    optimizer.step()


def test_float32_parameters_take_their_own() -> None:
    """So that one option can be given to all param groups of float32."""
    params = parameters(F32)
    SGD(params, lr=0.1, momentum=0.9, trust=TrustRatio(), state_dtype=F32).step()
