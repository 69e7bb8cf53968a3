"""torch.compile(opt.step): the bits of the eager step, in one graph."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from helpers import assert_same_bits, unchanged
from setups import give_gradients, make, setups
from torch import Tensor
from torch.nn import Parameter

from date_kernels import RULES
from date_optim import LAMB, LARS, SGD, AdamW, RMSprop, TelemetryLogger, TrustRatio
from date_optim import optimizer as optimizer_module
from date_optim.compiled import handle_of, kind_of, take_step

# torch's own modules, as they are imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

Graphs = Any
"""A compiler for Dynamo that counts the graphs it gets."""


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs() -> Graphs:
    return torch._dynamo.testing.CompileCounterWithBackend("aot_eager")


def states_of(optimizer: Any) -> list[Tensor]:
    return [value for of in optimizer.state.values() for value in of.values()]


def assert_as_eager(name: str, compiled: Callable[[Any], Callable[[], Any]]) -> None:
    """Some steps, the second without a gradient of one layer: states, bits and telemetry."""
    (one, params), (other, others) = make(name), make(name)
    step = compiled(one)
    for seed in (1, 2, 3):
        for of in (params, others):
            give_gradients(of, seed)
            if seed == 2:
                of[1].grad = None
        step()
        other.step()
        assert_same_bits(params, others)
        assert all(param.is_leaf and param.requires_grad for param in params)
        assert_same_bits(states_of(one), states_of(other))
        assert str(one.read_telemetry()) == str(other.read_telemetry())


@setups
@pytest.mark.parametrize(
    ("backend", "fullgraph"), [("eager", False), ("eager", True), ("aot_eager", True)]
)
def test_a_compiled_step_is_the_eager_one(name: str, backend: str, fullgraph: bool) -> None:
    assert_as_eager(name, lambda opt: torch.compile(opt.step, backend=backend, fullgraph=fullgraph))


def test_layers_without_a_gradient_do_not_shift_what_is_excluded() -> None:
    shapes = [(2, 3), (3,), (3, 2)]
    runs = [[Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2)]
    one, other = (SGD(of, lr=0.1, trust=TrustRatio(upper=0.5), exclude="1d") for of in runs)
    for of in runs:
        for param in of[1:]:
            param.grad = torch.full_like(param, 0.25)
    torch.compile(one.step, backend="eager", fullgraph=True)()
    other.step()
    assert_same_bits(*runs)


CHANGES: dict[str, tuple[Any, dict[str, Any], str, list[Any]]] = {
    "momentum-goes": (RMSprop, {"momentum": 0.9}, "momentum", [0.9, 0.8, 0.7, 0.0, 0.0]),
    "momentum-comes-back": (SGD, {"momentum": 0.9}, "momentum", [0.9, 0.0, 0.5, 0.25]),
    "dampening": (SGD, {"momentum": 0.9}, "dampening", [0.0, 0.25, 0.5, 0.0]),
    "decay": (AdamW, {}, "weight_decay", [0.0, 0.1, 0.2, 0.3]),
    "betas": (LAMB, {}, "betas", [(0.9, 0.99), (0.8, 0.9), (0.5, 0.6)]),
    "bounds": (LARS, {"upper": 1.0}, "trust_upper", [1.0, 0.5, 0.25, 0.125]),
    "trust": (SGD, {"momentum": 0.9}, "trust", [False, True, False]),
    "moving": (SGD, {"trust": TrustRatio()}, "trust_bounds", ["constant", "constant"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_options_that_change_between_steps_are_followed(change: str) -> None:
    """Also those that decide which states there are."""
    cls, options, key, values = CHANGES[change]
    runs = [[Parameter(torch.ones(n)) for n in (3, 4, 5)] for _ in range(2)]
    one, other = (cls(of, lr=0.1, **options) for of in runs)
    step = torch.compile(one.step, backend="eager", fullgraph=True)
    for seed, value in enumerate(values):
        for optimizer, of in zip((one, other), runs, strict=True):
            optimizer.param_groups[0][key] = value
            for n, param in enumerate(of):
                param.grad = torch.full_like(param, 0.5 + seed + n)
        step()  # type: ignore[no-untyped-call]
        other.step()
        assert_same_bits(*runs)


def test_a_compiled_step_without_gradients_leaves_no_telemetry() -> None:
    optimizer, params = make("LARS")
    step = torch.compile(optimizer.step, backend="eager")
    give_gradients(params, 1)
    step()
    assert optimizer.read_telemetry()
    optimizer.zero_grad()
    step()
    assert not optimizer.read_telemetry()


def test_a_logger_is_called_after_a_compiled_step() -> None:
    rows: list[int] = []
    logger = TelemetryLogger(lambda layers, step: rows.append(step), every=2)
    optimizer, params = make("LARS")
    step = torch.compile(optimizer.step, backend="eager")
    for seed in range(3):
        give_gradients(params, seed)
        step()
        logger(optimizer)
    assert rows == [1, 3]
    optimizer.register_step_post_hook(logger)
    with pytest.raises(Exception, match="call a TelemetryLogger"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()


@pytest.mark.parametrize("name", ["momentum", "LAMB"])
def test_inductor_takes_it(name: str) -> None:
    assert_as_eager(name, lambda opt: torch.compile(opt.step, fullgraph=True))


def test_a_trace_gathers_the_layers_of_all_groups_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = []
    original = optimizer_module._Gathered

    def counted(optimizer: SGD) -> Any:
        gathered.append(1)
        return original(optimizer)

    monkeypatch.setattr(optimizer_module, "_Gathered", counted)
    params = [Parameter(torch.ones(n)) for n in (3, 5, 2)]
    optimizer = SGD([{"params": [param]} for param in params], lr=0.5, momentum=0.9)
    for param in params:
        param.grad = torch.ones_like(param)
    torch.compile(optimizer.step, backend="eager", fullgraph=True)()
    assert len(gathered) == 1
    assert all(bool((param == 0.5).all()) for param in params)


def test_the_operator_keeps_what_operators_promise() -> None:
    """Its schema says what it changes; it can be traced; without a value it has no gradient."""
    params = [Parameter(torch.linspace(0, 1, n)) for n in (3, 5)]
    optimizer = LAMB(params, lr=0.1, master_weights=True)
    for param in params:
        param.grad = torch.ones_like(param)
    found: tuple[list[Any], ...] = ([], [], [], [], [], [])
    optimizer._init_group(optimizer.param_groups[0], *found)
    own, grads, states, steps, members, handle = found
    plain = [param.detach() for param in own]
    kind = kind_of(RULES["adam"], optimizer.param_groups)
    counts = [len(members)]
    handed: Any = optimizer
    for scale in (None, torch.tensor(8.0)):
        handed.grad_scale = scale
        torch.library.opcheck(
            take_step, (handle[0], plain, grads, states, steps, [], members, counts, kind)
        )


def test_eager_steps_do_not_go_through_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, params = make("momentum")
    monkeypatch.setattr("date_optim.optimizer.take_step", None)
    give_gradients(params, 1)
    optimizer.step()


def test_a_rate_in_a_tensor_compiles_once(graphs: Graphs) -> None:
    """Also where the graph itself changes the rate before the step reads it."""
    rates = [torch.tensor(0.1), torch.tensor(0.1)]
    params = [Parameter(torch.ones(5)) for _ in rates]
    one, other = (LARS([p], lr=rate) for p, rate in zip(params, rates, strict=True))

    def decayed() -> None:
        rates[0].mul_(0.5)
        one.step()

    step = torch.compile(decayed, backend=graphs, fullgraph=True)
    for seed in range(4):
        for param in params:
            param.grad = torch.full_like(param, 1.0 + seed)
        step()
        rates[1].mul_(0.5)
        other.step()
        assert_same_bits(params[:1], params[1:])
    # The first step sees states that are new, and the others those that were there.
    assert graphs.frame_count <= 2


def test_a_rate_that_is_a_number_is_followed() -> None:
    (one, params), (other, others) = make("AdamW"), make("AdamW")
    step = torch.compile(one.step, backend="eager")
    for seed in (1, 2, 3):
        for optimizer, of in ((one, params), (other, others)):
            optimizer.param_groups[0]["lr"] = 0.1 / seed
            give_gradients(of, seed)
        step()
        other.step()
        assert_same_bits(params, others)


def test_eager_and_compiled_steps_in_turn() -> None:
    (one, params), (other, others) = make("Adam-all"), make("Adam-all")
    step = torch.compile(one.step, backend="aot_eager")
    for seed in range(6):
        for of in (params, others):
            give_gradients(of, seed)
        (step if seed % 2 else one.step)()
        other.step()
        assert_same_bits(params, others)


# Dynamo looks at the loss's own gradient where it breaks the graph for the backward pass.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_closure_runs_in_a_compiled_step() -> None:
    param = Parameter(torch.ones(3))
    optimizer = SGD([param], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (param * param).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    step: Any = torch.compile(optimizer.step, backend="eager")
    loss = step(closure)
    assert loss.item() == 3.0
    assert_same_bits([param], [torch.ones(3) - 0.1 * 2])


@pytest.mark.parametrize("inf", [False, True])
def test_a_gradient_scaler_with_a_compiled_step(inf: bool) -> None:
    (one, params), (other, others) = make("momentum"), make("momentum")
    for group in one.param_groups:
        group["fused"] = True
    step = torch.compile(one.step, backend="aot_eager")
    step()  # without a gradient nothing happens
    handed: Any = one
    for seed in (1, 2):
        give_gradients(params, seed)
        give_gradients(others, seed)
        for param in params:
            assert param.grad is not None
            param.grad.mul_(8.0)
        handed.grad_scale, handed.found_inf = torch.tensor(8.0), torch.tensor(float(inf))
        if inf:
            with unchanged(params):
                step()
            continue
        step()
        other.step()
        assert_same_bits(params, others)
        assert_same_bits(*([p.grad for p in of if p.grad is not None] for of in (params, others)))


def test_what_an_eager_step_refuses_a_compiled_one_refuses() -> None:
    optimizer, params = make("momentum")
    step = torch.compile(optimizer.step, backend="eager")
    give_gradients(params, 1)
    optimizer.param_groups[0]["lr"] = -1.0
    with unchanged(params), pytest.raises(ValueError, match="Invalid learning rate"):
        step()
    optimizer.param_groups[0]["lr"] = math.inf
    with unchanged(params), pytest.raises(ValueError, match="Invalid learning rate"):
        step()
    assert torch.is_grad_enabled()


def test_an_optimizer_can_be_forgotten() -> None:
    """The operator finds it by a number, and does not keep it."""
    optimizer, params = make("momentum")
    step = torch.compile(optimizer.step, backend="eager")
    give_gradients(params, 1)
    step()
    handle = handle_of(optimizer)
    del optimizer, step
    torch._dynamo.reset()
    gc.collect()
    with pytest.raises(KeyError):
        take_step(handle, [], [], [], [], [], [], [], "")
