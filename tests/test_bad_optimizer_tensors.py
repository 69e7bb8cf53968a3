"""Tensors that an optimizer cannot step: refused by their names, before anything is written."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import optimizer_unchanged, random_tensors, unchanged
from test_bad_options import assert_steps_on, every_class, running
from torch import Tensor
from torch.nn import Parameter

from date_kernels import MASTER
from date_optim import LAMB, LARS, SGD, RMSprop, TrustRatio

OTHER = {torch.float32: torch.float64, torch.float64: torch.float32}


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
            "^the gradient of {} has dtype torch.float64, but it must be torch.float32",
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
@pytest.mark.parametrize("cls", [SGD, LAMB])
def test_an_optimizer_names_the_parameter(
    cls: Any, spoil: Callable[[Parameter], None], error: type[Exception], match: str, named: bool
) -> None:
    params = [Parameter(w) for w in random_tensors([(4, 3), (5,)], 0)]
    names = ["fc.weight", "fc.bias"]
    optimizer = cls(list(zip(names, params, strict=True)) if named else params, lr=0.1)
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


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e5m2])
@every_class
def test_an_optimizer_refuses_a_parameter_of_another_dtype(cls: Any, dtype: torch.dtype) -> None:
    param = Parameter(torch.ones(3))
    other = Parameter(torch.ones(3).to(dtype), requires_grad=False)
    optimizer = cls([param, other], master_weights=True, trust=TrustRatio())
    param.grad, other.grad = torch.ones(3), torch.ones(3).to(dtype)
    kind = f"(has dtype {dtype}, but it must be torch.float32 or|is complex)"
    error = (TypeError, RuntimeError)
    with optimizer_unchanged(optimizer), pytest.raises(error, match=rf"^0\.1 {kind}"):
        optimizer.step()
    assert not optimizer.state
    other.grad = None
    optimizer.step()
    assert param in optimizer.state or cls is SGD
    assert other not in optimizer.state


@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [
        (torch.float32, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float64),
        (torch.float16, torch.bfloat16),
        (torch.float16, torch.float64),
    ],
)
@every_class
def test_an_optimizer_refuses_a_gradient_of_another_dtype(
    cls: Any, dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    param = Parameter(torch.ones(3, dtype=dtype))
    optimizer = cls([("w", param)], lr=0.1, master_weights=True, trust=TrustRatio())
    param.grad = torch.ones(3, dtype=dtype)
    optimizer.step()
    spoil_gradient(param, torch.ones(3, dtype=grad_dtype))
    match = f"^the gradient of w has dtype {grad_dtype}, but it must be {dtype}"
    with optimizer_unchanged(optimizer), pytest.raises(TypeError, match=match):
        optimizer.step()
    param.grad = torch.ones(3, dtype=dtype)
    assert_steps_on(optimizer)


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


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (torch.Tensor.half, TypeError, "has dtype torch.float16, but it must be torch.float"),
        (torch.Tensor.bfloat16, TypeError, "has dtype torch.bfloat16"),
        (torch.Tensor.long, TypeError, "has dtype torch.int64"),
        (lambda t: t.to(OTHER[t.dtype]), TypeError, "has dtype torch.float"),
        (lambda t: torch.stack([t, t]), ValueError, "has shape"),
        (lambda t: t.to_sparse(), RuntimeError, "is sparse"),
        (lambda t: t.numpy(), TypeError, "is a ndarray"),
    ],
    ids=["float16", "bfloat16", "int64", "other float", "shape", "sparse", "ndarray"],
)
@pytest.mark.parametrize("layer", [0, 1, 2])
@every_class
def test_an_optimizer_names_the_state(
    cls: Any, layer: int, make: Callable[[Tensor], Any], error: type[Exception], match: str
) -> None:
    optimizer = running(cls, **({"momentum": 0.9} if cls in (SGD, RMSprop) else {}))
    param, name = [
        (param, f"{number}.{index}")
        for number, group in enumerate(optimizer.param_groups)
        for index, param in enumerate(group["params"])
    ][layer]
    keys = [key for key in optimizer.state[param] if key != "step"]
    assert (MASTER in keys) == (layer == 2)
    for key in keys:
        sound = optimizer.state[param][key]
        optimizer.state[param][key] = make(sound)
        named = f"^state '{key}' of {name} {match}"
        params = [p for group in optimizer.param_groups for p in group["params"]]
        states = [t for p in params for t in optimizer.state[p].values() if isinstance(t, Tensor)]
        with unchanged([*params, *states]), pytest.raises(error, match=named):
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


def test_a_sparse_parameter_is_named() -> None:
    param = torch.nn.Parameter(torch.ones(3).to_sparse())
    optimizer = RMSprop([("embedding", param)])
    param.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match=r"^embedding is sparse"):
        optimizer.step()
    assert not optimizer.state


FLATTENED = """
import torch, torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from date_optim import LARS, SGD

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
model = FullyShardedDataParallel(
    model, use_orig_params={original}, device_id=torch.device("cpu")
)
for cls in (LARS, SGD):
    optimizer = cls(model.named_parameters(), lr=0.1)
    model(torch.ones(2, 3)).sum().backward()
    before = [param.detach().clone() for param in model.parameters()]
    try:
        optimizer.step()
    except RuntimeError as error:
        print(error)
    print(all(map(torch.equal, before, model.parameters())))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("original", [False, True])
def test_flat_parameters_have_no_layers(original: bool) -> None:
    """Nor norms, so that only a step without a ratio is taken."""
    done = subprocess.run(
        [sys.executable, "-c", FLATTENED.format(original=original)],
        capture_output=True,
        text=True,
        check=True,
    )
    said, kept, moved = done.stdout.splitlines()
    name = "0.weight" if original else "_flat_param"
    assert re.search(
        rf"{name} is part of a flat parameter of .*ZeroRedundancyOptimizer .*trust=None", said
    )
    assert (kept, moved) == ("True", "False")


def test_partitioned_parameters_have_no_layers() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    param.ds_id = 0  # type: ignore[attr-defined]
    param.grad = torch.ones(3)
    with (
        unchanged([param]),
        pytest.raises(RuntimeError, match=r"^0\.0 is partitioned by DeepSpeed"),
    ):
        LARS([param], lr=0.1).step()
    SGD([param], lr=0.1).step()
