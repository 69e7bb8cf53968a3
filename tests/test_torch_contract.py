"""What torch and its tools expect of an Optimizer."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import re
from functools import partial
from typing import Any

import pytest
import torch
from helpers import (
    Options,
    assert_same_bits,
    bits,
    judged_optimizer_step,
    optimizer_unchanged,
    random_tensors,
    unchanged,
)
from setups import CLASSES, SETUPS, TRUST, give_gradients, make, setups, take_steps
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, ReduceLROnPlateau
from torch.utils._python_dispatch import TorchDispatchMode
from torch_runs import DTYPES, TWINS

from date_optim import DATE, LAMB, LARS, SGD, Adadelta, Adagrad, Adam, AdamW, Recipe, RMSprop
from date_optim.optimizer import Layerwise

twins = pytest.mark.parametrize(("ours", "torchs"), TWINS.values(), ids=TWINS)

# --- constructor ----------------------------------------------------------------------------------


@twins
def test_arguments_are_torchs(ours: Any, torchs: Any) -> None:
    """Same names, kinds, defaults and, where they are positional, places."""
    own, twin = (inspect.signature(cls).parameters for cls in (ours, torchs))
    for name, expected in twin.items():
        assert own[name].default == expected.default, name
        assert own[name].kind == expected.kind, name
    positional = [name for name, p in twin.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(own)[: len(positional)] == positional
    more = [p for name, p in own.items() if name not in twin]
    assert {p.kind for p in more} == {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}
    assert {"foreach", "fused", "capturable", "differentiable"} <= set(own)


LAYERWISE: Options = {
    "trust": TRUST,
    "exclude": "1d",
    "max_grad_norm": 2.0,
    "momentum_scaling": "ratio_inside",
    "weight_decay_in": "update",
    "master_weights": True,
    "state_dtype": torch.float32,
    "on_nonfinite": "skip",
}


def test_layer_wise_arguments_are_known_to_type_checkers() -> None:
    assert LAYERWISE.keys() == Layerwise.__annotations__.keys() == Layerwise.__optional_keys__


@pytest.mark.parametrize("key", LAYERWISE)
@pytest.mark.parametrize("cls", [*CLASSES, DATE])
def test_every_class_has_the_layer_wise_arguments(cls: Any, key: str) -> None:
    """Each stands in the groups."""
    params, arguments = [Parameter(torch.ones(2))], {key: LAYERWISE[key]}
    if key == "trust" and cls in (LARS, LAMB, DATE):
        with pytest.raises(TypeError, match=f"{cls.__name__} has its own trust ratio"):
            cls(params, **arguments)
    elif key == "momentum_scaling" and cls not in (SGD, RMSprop, LARS, DATE):
        with pytest.raises(ValueError, match="'ratio_inside' needs a momentum buffer, but rule"):
            cls(params, **arguments)
    else:
        if key == "momentum_scaling":
            arguments["momentum"] = 0.9
        (group,) = cls(params, **arguments).param_groups
        assert group[key] == {"trust": True, "exclude": (True,)}.get(key, LAYERWISE[key])


@pytest.mark.parametrize("cls", [*CLASSES, DATE])
def test_unknown_arguments(cls: Any) -> None:
    params = [Parameter(torch.ones(2))]
    name = "RMSprop" if cls is DATE else cls.__name__
    with pytest.raises(TypeError, match=rf"^{name}.* got an unexpected keyword argument 'clamp'"):
        cls(params, clamp=1.0)
    with pytest.raises(TypeError, match="positional"):
        cls(params, *[0.1] * 20)


@twins
def test_groups_have_torchs_options(ours: Any, torchs: Any) -> None:
    """And a saved group all of them; in ours decoupled weight decay is a place of it."""
    param = Parameter(torch.ones(2))
    own, twin = (cls([param]) for cls in (ours, torchs))
    (saved,) = own.state_dict()["param_groups"]
    (expected,) = twin.state_dict()["param_groups"]
    assert {key: saved[key] for key in expected} == expected
    assert expected.keys() - own.param_groups[0].keys() <= {"decoupled_weight_decay"}


@pytest.mark.parametrize("decoupled", [True, False])
def test_decoupled_weight_decay_is_a_place_of_it(decoupled: bool) -> None:
    """Wherever it is said: torchtitan writes every option into the groups."""
    param = Parameter(torch.ones(2))
    expected = "weights" if decoupled else "gradient"
    words: Options = {"decoupled_weight_decay": decoupled}
    made = (
        Adam([param], **words),
        Adam([{"params": [param], **words}]),
        Adam([{"params": [param], **words}], decoupled_weight_decay=not decoupled),
        AdamW([{"params": [param], **words}]),
    )
    for optimizer in made:
        (group,) = optimizer.param_groups
        assert group["weight_decay_in"] == expected
        assert "decoupled_weight_decay" not in group
    (group,) = LAMB([{"params": [param], "decoupled_weight_decay": False}]).param_groups
    assert group["weight_decay_in"] == "update"


@pytest.mark.parametrize("place", ["gradient", "update"])
def test_decoupled_weight_decay_in_another_place(place: str) -> None:
    param = Parameter(torch.ones(2))
    words: Options = {"decoupled_weight_decay": True, "weight_decay_in": place}
    match = f"weight_decay_in='weights', but it is '{place}'"
    with pytest.raises(ValueError, match=match):
        Adam([param], **words)
    with pytest.raises(ValueError, match=match):
        Adam([{"params": [param], **words}])


@pytest.mark.parametrize("cls", [*CLASSES, DATE])
def test_every_form_of_parameters(cls: Any) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    for params in (
        module.parameters(),
        module.named_parameters(),
        [{"params": module[0].parameters()}, {"params": module[1].parameters(), "lr": 0.5}],
        [{"params": list(module.named_parameters()), "lr": 0.5}],
    ):
        optimizer = cls(params)
        assert isinstance(optimizer, Optimizer)
        assert sum(len(group["params"]) for group in optimizer.param_groups) == 4
    names = optimizer.param_groups[0]["param_names"]
    assert names == ["0.weight", "0.bias", "1.weight", "1.bias"]
    with pytest.raises(ValueError, match="empty parameter list"):
        cls([])


@setups
def test_group_values_are_plain(name: str) -> None:
    optimizer, _ = make(name)
    for group in optimizer.param_groups:
        for key, value in group.items():
            values = value if isinstance(value, tuple) else (value,)
            if key != "params":
                assert {type(v) for v in values} <= {type(None), bool, int, float, str}, key


def test_a_predicate_is_not_kept() -> None:
    optimizer = SGD([Parameter(torch.ones(2))], exclude=lambda name, param: True)
    assert not any(callable(value) for value in optimizer.defaults.values())
    assert optimizer.param_groups[0]["exclude"] == (True,)
    pickle.dumps(optimizer)


# --- step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "options", "keys"),
    [
        (SGD, {}, set()),
        (SGD, {"trust": TRUST}, set()),
        (SGD, {"momentum": 0.9}, {"momentum_buffer"}),
        (SGD, {"momentum": 0.9, "dampening": 0.5}, {"momentum_buffer", "step"}),
        (RMSprop, {}, {"step", "square_avg"}),
        (RMSprop, {"centered": True}, {"step", "square_avg", "grad_avg"}),
        (RMSprop, {"momentum": 0.9}, {"step", "square_avg", "momentum_buffer"}),
        (Adagrad, {}, {"step", "sum"}),
        (Adam, {}, {"step", "exp_avg", "exp_avg_sq"}),
        (Adam, {"amsgrad": True}, {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
        (LAMB, {}, {"step", "exp_avg", "exp_avg_sq"}),
        (Adadelta, {}, {"step", "square_avg", "acc_delta"}),
    ],
)
def test_states_have_torchs_keys(cls: Any, options: Options, keys: set[str]) -> None:
    """And a layer without a gradient has none, not even an empty one."""
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(2)), Parameter(torch.ones(2))]
    optimizer = cls(params, **options)
    optimizer.step()
    assert not optimizer.state
    params[0].grad, params[2].grad = torch.ones(3), torch.ones(2)
    optimizer.step()
    assert set(optimizer.state) == ({params[0], params[2]} if keys else set())
    for param, values in optimizer.state.items():
        assert set(values) == keys
        for key, value in values.items():
            assert value.dtype == torch.float32
            assert value.shape == (() if key == "step" else param.shape)
            assert not value.requires_grad
    assert set(optimizer.state_dict()["state"]) == ({0, 2} if keys else set())


@pytest.mark.parametrize("option", ["", "momentum", "centered", "amsgrad"])
@twins
def test_a_twin_keeps_the_same_states(ours: Any, torchs: Any, option: str) -> None:
    options = {option: 0.9 if option == "momentum" else True} if option else {}
    if not options.keys() <= inspect.signature(torchs).parameters.keys():
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
            ours([Parameter(torch.ones(3))], **options)
        return
    params = [Parameter(torch.ones(3))]
    params[0].grad = torch.ones(3)
    saved = []
    for cls in (ours, torchs):
        optimizer = cls(params, **options)
        optimizer.step()
        saved.append(optimizer.state[params[0]])
    assert set(saved[0]) == set(saved[1])


@setups
def test_closure(name: str) -> None:
    """It runs once, with gradients on, before gradients are read; its loss comes back."""
    optimizer, params = make(name)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum((param.square().sum() for param in params), start=torch.zeros(()))
        torch.autograd.backward(loss)
        return loss

    before = [param.detach().clone() for param in params]
    expected = float(sum(param.square().sum() for param in before))
    with torch.no_grad():
        loss: Any = optimizer.step(closure)  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(expected)
    assert calls == [True]
    assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert optimizer.step() is None


@pytest.mark.parametrize("first", ["SGD", "LARS", "AdamW", "LAMB"])
def test_hooks_fire_once(first: str) -> None:
    """Whichever class of the family was made first."""
    make(first)
    for name in SETUPS:
        optimizer, params = make(name)
        pre, post = [0], [0]

        def count(counter: list[int], *args: Any) -> None:
            counter[0] += 1

        optimizer.register_step_pre_hook(partial(count, pre))
        optimizer.register_step_post_hook(partial(count, post))
        take_steps(optimizer, params, 1)
        assert (pre, post) == ([1], [1])


def test_the_profiler_sees_a_step() -> None:
    optimizer, params = make("LARS")
    with torch.profiler.profile() as profile:
        take_steps(optimizer, params, 1)
    names = [event.name for event in profile.events() or []]
    assert names.count("Optimizer.step#LARS.step") == 1


@pytest.mark.parametrize("dtype", DTYPES)
@setups
def test_gradients_of_zero_move_nothing(name: str, dtype: torch.dtype) -> None:
    optimizer, params = make(name, dtype=dtype, weight_decay=0.0)
    for param in params:
        param.grad = torch.zeros_like(param)
    with unchanged(params):
        optimizer.step()
        optimizer.step()


@setups
def test_a_rate_of_zero_moves_nothing(name: str) -> None:
    """From a fresh state, as torch's distributed checkpoints initialise one; states stay finite."""
    optimizer, params = make(name)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    with unchanged(params):
        take_steps(optimizer, params, 1)
    for values in optimizer.state.values():
        assert all(value.isfinite().all() for value in values.values())
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.0)
    with unchanged(params):
        take_steps(optimizer, params, 2)


@pytest.mark.parametrize("form", ["outside", "ratio_inside"])
@setups
def test_a_rate_of_zero_moves_nothing_in_any_state(name: str, form: str) -> None:
    """But where the buffer holds earlier rates."""
    optimizer, params = make(name)
    for group in optimizer.param_groups:
        if group.get("momentum"):
            group["momentum_scaling"] = form
    take_steps(optimizer, params, 1, 2)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    with unchanged(params):
        take_steps(optimizer, params, 3)


def test_a_rate_of_zero_with_the_rate_in_the_buffer_rolls_on() -> None:
    optimizer, params = make("LARS")
    take_steps(optimizer, params, 1)
    before = [bits(param) for param in params]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    take_steps(optimizer, params, 2)
    assert all(bits(param) != then for param, then in zip(params, before, strict=True))


@setups
def test_zero_grad(name: str) -> None:
    optimizer, params = make(name)
    take_steps(optimizer, params, 1)
    optimizer.zero_grad(set_to_none=False)
    assert all(param.grad is not None and not param.grad.any() for param in params)
    optimizer.zero_grad()
    assert all(param.grad is None for param in params)
    with optimizer_unchanged(optimizer):
        optimizer.step()


@pytest.mark.parametrize("cls", CLASSES)
def test_an_optimizer_for_each_parameter_in_the_backward_pass(cls: Any) -> None:
    """A layer-wise step needs no other layer: the same bits as one optimizer for all."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    twin = copy.deepcopy(module)
    trust: Options = {} if cls in (LARS, LAMB) else {"trust": TRUST}
    whole = cls(module.parameters(), lr=0.1, **trust)
    parts = {param: cls([param], lr=0.1, **trust) for param in twin.parameters()}

    def step_and_free(param: Tensor) -> None:
        parts[param].step()  # type: ignore[index]
        param.grad = None

    for param in twin.parameters():
        param.register_post_accumulate_grad_hook(step_and_free)  # type: ignore[no-untyped-call]
    for seed in range(3):
        (x,) = random_tensors([(4, 6)], seed)
        for model in (module, twin):
            torch.autograd.backward(model(x).square().sum())
        whole.step()
        whole.zero_grad()
    assert_same_bits(list(twin.parameters()), list(module.parameters()))


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lists torch's operators, each of which costs a launch or, read as a number, a wait."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@setups
def test_a_step_asks_torch_for_nothing(name: str) -> None:
    """No operator but the profiler's, no number read; telemetry is there all the same."""
    optimizer, params = make(name)
    take_steps(optimizer, params, 1)
    give_gradients(params, 2)
    with Operators() as operators:
        optimizer.step()
        assert len(optimizer.read_telemetry()) == len(params)
    assert [name for name in operators.seen if not name.startswith("profiler.")] == []


# --- schedulers -----------------------------------------------------------------------------------


@setups
@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
def test_a_scheduler_drives_it(name: str, as_tensor: bool) -> None:
    optimizer, params = make(name)
    if as_tensor:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"])
    cosine = CosineAnnealingLR(optimizer, T_max=4)
    for seed in range(1, 5):
        expected = 0.025 * (1 + math.cos(math.pi * (seed - 1) / 4))
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(expected)
        give_gradients(params, seed)
        judged_optimizer_step(optimizer)
        cosine.step()
    with unchanged(params):
        fresh, others = make(name)
        LambdaLR(fresh, lambda i: 0.0)
        with unchanged(others):
            take_steps(fresh, others, 1)


def test_plateau_and_an_averaged_model() -> None:
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 2)
    optimizer = RMSprop(module.parameters(), lr=0.1, trust=TRUST)
    plateau = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    averaged = torch.optim.swa_utils.AveragedModel(module)
    for loss in (1.0, 2.0, 3.0):
        torch.autograd.backward(module(torch.ones(4)).square().sum())
        judged_optimizer_step(optimizer)
        averaged.update_parameters(module)
        plateau.step(loss)
    assert optimizer.param_groups[0]["lr"] == 0.025


@setups
def test_a_recipe_drives_it(name: str) -> None:
    """The first optimizer step uses the recipe's first rate."""
    recipe = Recipe(batch_size=2, lr=0.05, warmup_epochs=1, epochs=4, samples=8).at(batch_size=4)
    optimizer, params = make(name)
    scheduler = recipe.scheduler(optimizer)
    for i in range(1, recipe.iterations + 1):
        assert [group["lr"] for group in optimizer.param_groups] == [recipe.lr(i)] * 2
        give_gradients(params, i)
        judged_optimizer_step(optimizer)
        scheduler.step()


def test_clip_grad_norm_before_the_step_is_max_grad_norm() -> None:
    """Two ways to the same: the factors' roundings aside."""
    (outer, params), (inner, others) = make("momentum"), make("momentum", max_grad_norm=0.5)
    for seed in (1, 2, 3):
        give_gradients(params, seed)
        torch.nn.utils.clip_grad_norm_(params, 0.5)
        outer.step()
        take_steps(inner, others, seed)
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param.detach(), other.detach())


@pytest.mark.parametrize("name", ["momentum", "RMSprop-all", "AdamW", "LAMB"])
def test_a_gradient_scaler_unscales_and_skips(name: str) -> None:
    """torch's scaler knows nothing of us: it unscales gradients itself, and skips the step."""
    (scaled, params), (plain, others) = make(name), make(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for seed in (1, 2):
        give_gradients(params, seed)
        for param in params:
            assert param.grad is not None
            param.grad *= scaler.scale(torch.ones(())).item()
        scaler.step(scaled)
        scaler.update()
        take_steps(plain, others, seed)
        assert_same_bits(params, others)
    give_gradients(params, 3)
    assert params[1].grad is not None
    params[1].grad[2] = math.inf
    with unchanged(params):
        scaler.step(scaled)
    scaler.update()
    assert scaler.get_scale() == 4.0


@pytest.mark.parametrize("cls", CLASSES)
def test_repr_shows_the_options(cls: Any) -> None:
    text = repr(cls([Parameter(torch.ones(2))], lr=0.125))
    assert re.match(rf"{cls.__name__} \(\nParameter Group 0", text)
    assert "lr: 0.125" in text
    assert "trust_upper" in text
