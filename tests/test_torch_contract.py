"""What torch and its tools expect of an Optimizer."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
import re
from collections.abc import Callable
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
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, ReduceLROnPlateau

from date_optim import DATE, LARS, SGD, Recipe, RMSprop, TrustRatio
from date_optim.optimizer import LayerwiseOptimizer

TWINS: list[tuple[Any, Any]] = [(SGD, torch.optim.SGD), (RMSprop, torch.optim.RMSprop)]
twins = pytest.mark.parametrize(("ours", "torchs"), TWINS, ids=["SGD", "RMSprop"])

TRUST = TrustRatio(lower=0.1, upper=2.0)
SETUPS: dict[str, tuple[Any, Options]] = {
    "SGD": (SGD, {}),
    "momentum": (SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "dampening": (SGD, {"momentum": 0.9, "dampening": 0.5, "trust": TRUST}),
    "nesterov": (SGD, {"momentum": 0.9, "nesterov": True, "trust": TRUST, "exclude": "1d"}),
    "RMSprop": (RMSprop, {}),
    "RMSprop-all": (
        RMSprop,
        {"momentum": 0.9, "centered": True, "eps": 1e-2, "trust": TRUST, "max_grad_norm": 1.0},
    ),
    "adabound": (SGD, {"trust": TrustRatio(bounds="adabound", final=0.1, gamma=0.1)}),
    "phi": (SGD, {"trust": TrustRatio(weight_norm_bounds=(0.0, 10.0))}),
    "LARS": (LARS, {"weight_decay": 0.01, "coefficient": 0.1}),
    "DATE": (DATE, {}),
}
setups = pytest.mark.parametrize("name", SETUPS)
SHAPES = [(5, 4), (4,), ()]


def make(name: str, seed: int = 0, **group: Any) -> tuple[LayerwiseOptimizer, list[Parameter]]:
    """Return an optimizer with two groups, and its parameters."""
    cls, options = SETUPS[name]
    params = [Parameter(w) for w in random_tensors(SHAPES, seed)]
    groups: Any = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]
    optimizer: LayerwiseOptimizer = cls(groups, lr=0.05, **{**options, **group})
    return optimizer, params


def give_gradients(params: list[Parameter], seed: int) -> None:
    for param, grad in zip(params, random_tensors(SHAPES, seed), strict=True):
        param.grad = grad


def take_steps(optimizer: Optimizer, params: list[Parameter], *seeds: int) -> None:
    for seed in seeds:
        give_gradients(params, seed)
        optimizer.step()


# --- constructor ----------------------------------------------------------------------------------


@twins
def test_arguments_are_torchs_and_more(ours: Any, torchs: Any) -> None:
    """Same names, kinds, defaults and, where they are positional, places."""
    own, twin = (inspect.signature(cls).parameters for cls in (ours, torchs))
    for name, expected in twin.items():
        assert own[name].default == expected.default, name
        assert own[name].kind == expected.kind, name
    positional = [name for name, p in twin.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(own)[: len(positional)] == positional
    for name in ("trust", "exclude", "max_grad_norm", "momentum_scaling", "on_nonfinite"):
        assert own[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert {"foreach", "fused", "capturable", "differentiable"} <= set(own)


@twins
def test_groups_have_torchs_options(ours: Any, torchs: Any) -> None:
    param = Parameter(torch.ones(2))
    (own,), (twin,) = (cls([param]).param_groups for cls in (ours, torchs))
    assert {key: own[key] for key in twin if key != "params"} == {
        key: value for key, value in twin.items() if key != "params"
    }


@pytest.mark.parametrize("cls", [SGD, RMSprop, LARS, DATE])
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


@twins
def test_a_twin_keeps_the_same_states(ours: Any, torchs: Any) -> None:
    params = [Parameter(torch.ones(3))]
    params[0].grad = torch.ones(3)
    saved = []
    for cls in (ours, torchs):
        optimizer = cls(params, momentum=0.9)
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


@pytest.mark.parametrize("first", ["SGD", "LARS", "RMSprop"])
def test_hooks_fire_once(first: str) -> None:
    """Whichever class of the family was made first."""
    make(first)
    for name in ("SGD", "LARS", "RMSprop"):
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


@pytest.mark.parametrize("name", ["SGD", "momentum", "nesterov", "RMSprop", "LARS", "DATE"])
def test_gradients_of_zero_move_nothing(name: str) -> None:
    optimizer, params = make(name, weight_decay=0.0)
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


@pytest.mark.parametrize("name", ["momentum", "nesterov", "RMSprop-all", "DATE"])
@pytest.mark.parametrize("form", ["outside", "ratio_inside"])
def test_a_rate_of_zero_moves_nothing_in_any_state(name: str, form: str) -> None:
    group: Options = {} if name == "DATE" else {"momentum_scaling": form}
    optimizer, params = make(name, **group)
    take_steps(optimizer, params, 1, 2)
    for options in optimizer.param_groups:
        options["lr"] = 0.0
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


def test_an_optimizer_for_each_parameter_in_the_backward_pass() -> None:
    """A layer-wise step needs no other layer: the same bits as one optimizer for all."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    twin = copy.deepcopy(module)
    options: Options = {"lr": 0.1, "momentum": 0.9, "trust": TRUST}
    whole = SGD(module.parameters(), **options)
    parts = {param: SGD([param], **options) for param in twin.parameters()}

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


# --- checkpoints ----------------------------------------------------------------------------------


def through_a_file(optimizer: Optimizer) -> Any:
    """Return the optimizer's state as a weights-only load of its file gives it."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def restore_saved(optimizer: LayerwiseOptimizer, params: list[Parameter], name: str) -> Any:
    fresh, copies = make(name, seed=9)
    with torch.no_grad():
        for to, value in zip(copies, params, strict=True):
            to.copy_(value)
    fresh.load_state_dict(through_a_file(optimizer))
    return fresh, copies


def restore_copied(optimizer: LayerwiseOptimizer, params: list[Parameter], name: str) -> Any:
    twin = copy.deepcopy(optimizer)
    return twin, [param for group in twin.param_groups for param in group["params"]]


def restore_pickled(optimizer: LayerwiseOptimizer, params: list[Parameter], name: str) -> Any:
    twin = pickle.loads(pickle.dumps(optimizer))
    return twin, [param for group in twin.param_groups for param in group["params"]]


@setups
@pytest.mark.parametrize("restore", [restore_saved, restore_copied, restore_pickled])
def test_a_restored_run_continues_in_every_bit(name: str, restore: Callable[..., Any]) -> None:
    optimizer, params = make(name)
    take_steps(optimizer, params, 1, 2)
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
        group["trust_upper"] = 3.0
    twin, copies = restore(optimizer, params, name)
    for seed in (3, 4):
        take_steps(optimizer, params, seed)
        take_steps(twin, copies, seed)
        assert_same_bits(copies, params)
    for mine, its in zip(params, copies, strict=True):
        states, twins_states = optimizer.state.get(mine, {}), twin.state.get(its, {})
        assert list(states) == list(twins_states)
        assert_same_bits(list(states.values()), list(twins_states.values()))
        assert all(a is not b for a, b in zip(states.values(), twins_states.values(), strict=True))
    assert twin.param_groups[0]["trust_upper"] == 3.0
    assert twin.param_groups[0]["exclude"] == optimizer.param_groups[0]["exclude"]


@setups
def test_loading_a_fresh_state_changes_nothing(name: str) -> None:
    """Accelerate does it in its constructor."""
    optimizer, params = make(name)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not optimizer.state
    other, others = make(name)
    take_steps(optimizer, params, 1)
    take_steps(other, others, 1)
    assert_same_bits(params, others)


def test_copies_have_all_public_attributes() -> None:
    optimizer, params = make("RMSprop-all")
    take_steps(optimizer, params, 1)
    public = {key for key in vars(optimizer) if not key.startswith("_")}
    assert {key for key in vars(copy.deepcopy(optimizer)) if not key.startswith("_")} == public


CHECKPOINTS: list[tuple[Any, Any, Options]] = [
    (SGD, torch.optim.SGD, {}),
    (SGD, torch.optim.SGD, {"momentum": 0.9}),
    (SGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    (RMSprop, torch.optim.RMSprop, {}),
    (RMSprop, torch.optim.RMSprop, {"momentum": 0.9, "centered": True, "eps": 1e-2}),
]
checkpoints = pytest.mark.parametrize(("ours", "torchs", "options"), CHECKPOINTS)


def run_of(cls: Any, options: Options, *seeds: int) -> tuple[Any, list[Parameter]]:
    params = [Parameter(w) for w in random_tensors(SHAPES, 0)]
    more = {"foreach": False} if cls.__module__.startswith("torch") else {}
    optimizer = cls(params, lr=0.05, **options, **more)
    take_steps(optimizer, params, *seeds)
    return optimizer, params


@checkpoints
def test_a_checkpoint_of_torchs_continues_here(ours: Any, torchs: Any, options: Options) -> None:
    theirs, params = run_of(torchs, options, 1, 2, 3)
    optimizer = ours([Parameter(param.detach().clone()) for param in params], lr=9.0)
    optimizer.load_state_dict(through_a_file(theirs))
    (group,) = optimizer.param_groups
    assert {key: group[key] for key in ("lr", *options)} == {"lr": 0.05, **options}
    mine = group["params"]
    for seed in (4, 5):
        give_gradients(mine, seed)
        judged_optimizer_step(optimizer)  # the states are taken up, dampening included
        take_steps(theirs, params, seed)
    for param, its in zip(mine, params, strict=True):
        torch.testing.assert_close(param.detach(), its.detach())


@checkpoints
def test_a_checkpoint_of_ours_continues_in_torch(ours: Any, torchs: Any, options: Options) -> None:
    optimizer, params = run_of(ours, options, 1, 2, 3)
    theirs = torchs([Parameter(param.detach().clone()) for param in params], lr=9.0, foreach=False)
    theirs.load_state_dict(through_a_file(optimizer))
    copies = theirs.param_groups[0]["params"]
    for seed in (4, 5):
        take_steps(optimizer, params, seed)
        take_steps(theirs, copies, seed)
    for param, its in zip(params, copies, strict=True):
        torch.testing.assert_close(param.detach(), its.detach())


def test_old_checkpoints() -> None:
    """torch has saved a buffer of None, a step that is a float, and fewer options."""
    optimizer, params = run_of(RMSprop, {"momentum": 0.9}, 1, 2)
    saved = through_a_file(optimizer)
    for values in saved["state"].values():
        values["step"] = float(values["step"])
    for key in ("maximize", "foreach", "differentiable", "capturable", "fused", "trust"):
        del saved["param_groups"][0][key]
    other = RMSprop([Parameter(param.detach().clone()) for param in params], lr=1.0, trust=TRUST)
    other.load_state_dict(saved)
    (group,) = other.param_groups
    assert (group["trust"], group["maximize"], group["lr"]) == (True, False, 0.05)
    give_gradients(group["params"], 3)
    judged_optimizer_step(other)
    assert other.state[group["params"][0]]["step"].item() == 3

    sgd = SGD([Parameter(param.detach().clone()) for param in params], momentum=0.9, dampening=0.5)
    state = {i: {"momentum_buffer": None} for i in range(len(params))}
    sgd.load_state_dict({**sgd.state_dict(), "state": state})
    params = sgd.param_groups[0]["params"]
    take_steps(sgd, params, 1)
    for param in params:
        assert param.grad is not None
        assert torch.equal(sgd.state[param]["momentum_buffer"], param.grad)  # undamped


def test_an_unpickled_optimizer_of_an_older_version_gets_new_options() -> None:
    optimizer, _ = make("momentum")
    for group in optimizer.param_groups:
        del group["trust_eps"], group["on_nonfinite"], group["momentum_scaling"]
    twin = pickle.loads(pickle.dumps(optimizer))
    (group, _) = twin.param_groups
    assert [group[k] for k in ("trust_eps", "on_nonfinite", "momentum_scaling")] == [
        0.0,
        "propagate",
        "outside",
    ]
    take_steps(twin, [p for g in twin.param_groups for p in g["params"]], 1)


def test_a_state_of_another_number_of_groups_is_torchs_error() -> None:
    optimizer, params = make("momentum")
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(SGD(params).state_dict())


def test_unknown_keys_of_a_group_survive() -> None:
    """SWALR and others keep their own there."""
    optimizer, params = make("momentum")
    optimizer.param_groups[0]["swa_lr"] = 0.25
    twin, copies = restore_saved(optimizer, params, "momentum")
    assert twin.param_groups[0]["swa_lr"] == 0.25
    take_steps(twin, copies, 1)


def test_new_parameters_data_and_states_are_followed() -> None:
    """``p.data =``, ``module.to`` and loading replace memory under a plan that is kept."""
    optimizer, params = make("RMSprop-all")
    take_steps(optimizer, params, 1, 2)
    params[0].data = params[0].data.clone()
    give_gradients(params, 3)
    judged_optimizer_step(optimizer)
    optimizer.state[params[1]]["square_avg"] = torch.ones(4)
    give_gradients(params, 4)
    judged_optimizer_step(optimizer)


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


@pytest.mark.parametrize("name", ["momentum", "RMSprop-all"])
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


@pytest.mark.parametrize("cls", [SGD, RMSprop, LARS])
def test_repr_shows_the_options(cls: Any) -> None:
    text = repr(cls([Parameter(torch.ones(2))], lr=0.125))
    assert re.match(rf"{cls.__name__} \(\nParameter Group 0", text)
    assert "lr: 0.125" in text
    assert "trust_upper" in text
