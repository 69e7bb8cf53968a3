"""What a step refuses of its tensors, it names; whatever it could write stays as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import (
    DTYPES,
    TRUST,
    Call,
    Options,
    judged_step,
    make_call,
    random_tensors,
    unchanged,
)
from torch import Tensor
from variants import VARIANTS

import date_kernels
from date_kernels import MASTER, RULES, make_stepper

NAN, INF = math.nan, math.inf
F32, F64, B16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

LAYERS = [
    ((4, 3), F32, F32),
    ((5,), F32, F32),
    ((), B16, F32),
    ((2, 3), F16, F16),
    ((3,), F64, F64),
    ((4,), B16, F32),
]
"""Shape, dtype and gradient's dtype of the layers of a call; those of 16 bits have masters."""

FULL = "rmsprop-centered-momentum"


def mid_run(variant: str = FULL, **options: Any) -> Call:
    """Return a step's arguments in the middle of a run, trust on."""
    rule, chosen = VARIANTS[variant]
    params = [random_tensors([shape], i, dtype)[0] for i, (shape, dtype, _) in enumerate(LAYERS)]
    grads = [random_tensors([shape], 9 - i, dtype)[0] for i, (shape, _, dtype) in enumerate(LAYERS)]
    group = {**chosen, **TRUST, "master_weights": True, **options}
    return make_call(rule, params, grads, group, taken=3)


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
    variant: str = FULL,
    **kwargs: Any,
) -> None:
    """Assert that a spoiled call raises and changes nothing, and that a sound one then works."""
    call = mid_run(variant)
    stepper = make_stepper(call.rule, backend.split("-", maxsplit=1)[0])
    if backend == "cpu-planned":
        call.take(stepper.step)
    sound, spoiled = call.copy(), call
    spoil(spoiled)
    tensors = [x for x in (*spoiled.written(), *spoiled.grads) if isinstance(x, Tensor)]
    with unchanged(tensors), pytest.raises(error, match=match):
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


# --- dtypes ---------------------------------------------------------------------------------------

OTHERS = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e5m2)
EVERY = (F32, F64, B16, F16, *OTHERS)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def refuses_dtype(backend: str, sequence: str, layer: int, name: str, dtype: torch.dtype) -> None:
    """Assert that the tensor of another dtype is refused by its name."""
    error: type[Exception]
    if dtype.is_complex:
        error, match = RuntimeError, f"^{name} is complex \\({dtype}\\), .*view_as_real"
    else:
        error, match = TypeError, f"^{name} has dtype {dtype}, but it must be torch."
    refuse(backend, put(sequence, layer, lambda t: t.to(dtype)), error, match)


def layer_of(dtype: torch.dtype) -> int:
    return next(i for i, layer in enumerate(LAYERS) if layer[1] == dtype)


@pytest.mark.parametrize("dtype", OTHERS, ids=short)
@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_dtypes_of_parameters(layer: int, dtype: torch.dtype, backend: str) -> None:
    refuses_dtype(backend, "params", layer, rf"params\[{layer}\]", dtype)


@pytest.mark.parametrize("grad", EVERY, ids=short)
@pytest.mark.parametrize("param", [F32, F64, B16, F16], ids=short)
def test_dtypes_of_gradients(param: torch.dtype, grad: torch.dtype, backend: str) -> None:
    """A gradient is of its parameter's dtype, or float32 beside a parameter of 16 bits."""
    layer = layer_of(param)
    if (param, grad) not in DTYPES:
        name = rf"the gradient of params\[{layer}\]"
        refuses_dtype(backend, "grads", layer, name, grad)
        return
    call = mid_run()
    put("grads", layer, lambda t: t.to(grad))(call)
    judged_step(call, make_stepper(call.rule, backend.split("-", maxsplit=1)[0]).step)


@pytest.mark.parametrize("state", EVERY, ids=short)
@pytest.mark.parametrize("param", [F32, F64, B16, F16], ids=short)
@pytest.mark.parametrize("key", [*RULES["rmsprop"].states, MASTER])
def test_dtypes_of_states(key: str, param: torch.dtype, state: torch.dtype, backend: str) -> None:
    """States are float64 beside float64 parameters, else float32."""
    layer = layer_of(param)
    if key == MASTER and param not in (B16, F16):
        return
    if state != (F64 if param == F64 else F32):
        refuses_dtype(backend, key, layer, rf"state '{key}' of params\[{layer}\]", state)


@pytest.mark.parametrize("dtype", [F64, B16, torch.int64], ids=short)
def test_dtypes_of_counters(dtype: torch.dtype, backend: str) -> None:
    refuses_dtype(backend, "steps", 1, r"the step counter of params\[1\]", dtype)


@pytest.mark.parametrize(
    ("layer", "dtype", "allowed"),
    [
        (0, F64, "torch.float32"),
        (2, F16, "torch.bfloat16 or torch.float32"),
        (3, B16, "torch.float16 or torch.float32"),
        (4, F32, "torch.float64"),
    ],
)
def test_an_error_says_which_dtypes_would_do(
    layer: int, dtype: torch.dtype, allowed: str, backend: str
) -> None:
    match = rf"^the gradient of params\[{layer}\] has dtype {dtype}, but it must be {allowed}$"
    refuse(backend, put("grads", layer, lambda t: t.to(dtype)), TypeError, match)


# --- tensors --------------------------------------------------------------------------------------


def conjugated(tensor: Tensor) -> Tensor:
    """Return a lazily negated view: its memory holds the negatives of its values."""
    return torch.complex(torch.zeros(tensor.shape, dtype=tensor.dtype), tensor).conj().imag


TENSORS: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
    ("complex", lambda t: t + 0j, "is complex .*view_as_real"),
    ("meta", lambda t: t.to("meta"), "is on meta, but .* takes place on cpu"),
    ("sparse", torch.Tensor.to_sparse, "is sparse .*make it dense"),
    ("negated", conjugated, "is a lazily negated view .*resolve_neg"),
]
WHERE = [
    ("params", 1, r"params\[1\]"),
    ("grads", 1, r"the gradient of params\[1\]"),
    ("params", 4, r"params\[4\]"),
    ("grads", 5, r"the gradient of params\[5\]"),
    ("square_avg", 1, r"state 'square_avg' of params\[1\]"),
    ("momentum_buffer", 4, r"state 'momentum_buffer' of params\[4\]"),
    ("master", 5, r"state 'master' of params\[5\]"),
]
where = pytest.mark.parametrize(
    ("sequence", "index", "name"), WHERE, ids=[f"{w[0]}-{w[1]}" for w in WHERE]
)


@where
@pytest.mark.parametrize(("make", "match"), [t[1:] for t in TENSORS], ids=[t[0] for t in TENSORS])
def test_tensors_that_no_kernel_serves(
    sequence: str,
    index: int,
    name: str,
    make: Callable[[Tensor], Tensor],
    match: str,
    backend: str,
) -> None:
    refuse(backend, put(sequence, index, make), RuntimeError, f"^{name} {match}")


class Subclass(Tensor):
    """A tensor whose memory may be anything."""


@where
@pytest.mark.parametrize(
    "make", [lambda t: t.as_subclass(Subclass), lambda t: t.numpy()], ids=["subclass", "ndarray"]
)
def test_what_is_not_a_plain_tensor(
    sequence: str, index: int, name: str, make: Callable[[Tensor], Any], backend: str
) -> None:
    match = f"^{name} is a (Subclass|ndarray); only a plain torch.Tensor"
    refuse(backend, put(sequence, index, make), TypeError, match)


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
            put(MASTER, 3, lambda t: t.t().contiguous()),
            r"^state 'master' of params\[3\] has shape \(3, 2\), but its parameter has \(2, 3\)",
        ),
        (put(MASTER, 2, lambda t: t[None]), r"^state 'master' of params\[2\] has shape \(1,\)"),
        *(
            (put(key, 3, lambda t: None), rf"^state '{key}' of params\[3\] is missing; create it")
            for key in (*RULES["rmsprop"].states, MASTER)
        ),
        *(
            (
                lambda call, key=key: call.states.pop(key),
                rf"^state '{key}' of params\[{layer}\] is missing",
            )
            for key, layer in (("square_avg", 0), (MASTER, 2))
        ),
        (
            put("steps", 1, lambda t: None),
            r"^params\[1\] needs a step counter, but steps\[1\]",
        ),
        (
            put("steps", 1, lambda t: t.repeat(2)),
            r"^the step counter of params\[1\] has shape \(2",
        ),
        (lambda call: call.grads.pop(), "^grads has 5 entries for 6 params"),
        (lambda call: call.steps.append(None), "^steps has 7 entries for 6 params"),
        (lambda call: call.states["grad_avg"].pop(), "^grad_avg has 5 entries for 6 params"),
        (lambda call: call.states[MASTER].pop(), "^master has 5 entries for 6 params"),
        (lambda call: call.params.append(torch.ones(3)), "^grads has 6 entries for 7 params"),
    ],
)
def test_shapes_and_numbers_of_tensors(
    spoil: Callable[[Call], Any], match: str, backend: str
) -> None:
    refuse(backend, spoil, ValueError, match)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_state_of_every_variant_is_asked_for(variant: str, backend: str) -> None:
    call = mid_run(variant)
    keys = [key for key, column in call.states.items() if column[3] is not None]
    assert keys[-1] == MASTER
    for key in keys:
        match = rf"^state '{key}' of params\[3\] is missing; create it before the step"
        refuse(backend, put(key, 3, lambda t: None), ValueError, match, variant=variant)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"params": [0, 1, 2, 3, 4]}, r"^params\[5\] is in no group"),
        ({"params": [0, 1, 2, 3, 4, 5, 6]}, r"^param group 0: params\[6\] is out of range or in a"),
        ({"params": [0, 1, 2, 3, 4, -1]}, r"^param group 0: params\[-1\] is out of range"),
        ({"params": [0, 1, 2, 3, 4, 1]}, r"^param group 0: params\[1\] is out of range or in a gr"),
        ({"exclude": (True, False)}, "^param group 0: exclude has 2 entries for 6 params"),
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
    match = f"^rule 'sgdm' is unknown; there are {', '.join(RULES)}$"
    for backend in ("cpu", "reference"):
        with pytest.raises(ValueError, match=match):
            date_kernels.step("sgdm", [], [], {}, [], [], backend=backend)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"^backend 'metal' is unknown; there are cpu, cuda, tri"):
        make_stepper("sgd", "metal")


def test_a_backend_that_is_not_there_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says why, and so does one that the environment names."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"^backend 'cuda' is not available: (torch|it)"):
        make_stepper("sgd", "cuda")
    monkeypatch.setenv("DATE_KERNELS_GPU_BACKEND", "metal")
    stepper = make_stepper("sgd")
    on_gpu = SimpleNamespace(is_cuda=True)
    arguments: Any = ([on_gpu], [None], {}, [None], [{"params": [0], "lr": 0.1}])
    with pytest.raises(ValueError, match="DATE_KERNELS_GPU_BACKEND is 'metal'; it must be triton"):
        stepper.step(*arguments)
    monkeypatch.setenv("DATE_KERNELS_GPU_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match=r"^backend 'cuda' is not available"):
        make_stepper("sgd").step(*arguments)


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


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_gradient_in_its_masters_memory(backend: str) -> None:
    """A float32 gradient beside a 16-bit parameter may be anywhere else."""
    match = r"(the gradient|state 'master') of params\[2\] and .* of params\[2\] overlap in memory"
    refuse(
        backend,
        lambda call: put("grads", 2, lambda t: call.states[MASTER][2])(call),
        ValueError,
        match,
    )


@pytest.mark.parametrize("first", [4, 5])
def test_memory_is_counted_in_bytes(first: int, backend: str) -> None:
    """Five float32 elements, then six of float16 that begin in the last of them or behind it."""

    def spoil(call: Call) -> None:
        memory = torch.ones(8)
        call.states["square_avg"][1] = memory[:5]
        call.params[3] = memory[first : first + 3].view(F16).view(2, 3)

    if first == 4:
        match = r"state 'square_avg' of params\[1\] and params\[3\] overlap in memory"
        refuse(backend, spoil, ValueError, match)
    else:
        call = mid_run()
        spoil(call)
        call.take(make_stepper(call.rule, backend.split("-", maxsplit=1)[0]).step)


def test_a_sparse_gradient_of_a_plan_in_use() -> None:
    """Of no dimensions: it looks like the dense one before it."""
    stepper = make_stepper("sgd", "cpu")
    call = make_call("sgd", [torch.ones(())], [torch.ones(())], {})
    call.take(stepper.step)
    call.grads[0] = torch.ones(()).to_sparse()
    with unchanged(call.written()), pytest.raises(RuntimeError, match=r"params\[0\] is sparse"):
        stepper.step(call.params, call.grads, call.states, call.steps, call.groups)
