"""State dicts: restored runs, exchange with torch.optim, and what is refused."""

from __future__ import annotations

import copy
import io
import math
import pickle
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
)
from setups import SETUPS, SHAPES, give_gradients, make, setups, take_steps
from torch.nn import Parameter
from torch.optim import Optimizer
from torch_runs import (
    FULL,
    TWINS,
    BeforeStep,
    Make,
    assert_torchs,
    both,
    every_dtype,
    every_full,
    give,
    run,
    train,
)
from torch_runs import SHAPES as RUN_SHAPES

from date_kernels import MASTER, state_dtype
from date_optim import LAMB, LARS, SGD, Adam, AdamW, Lion, RMSprop, TrustRatio
from date_optim.optimizer import LayerwiseOptimizer

STORES: dict[str, Options] = {
    "f32": {},
    "f64": {"dtype": torch.float64},
    "bf16": {"dtype": torch.bfloat16},
    "f16": {"dtype": torch.float16},
    "bf16-master": {"dtype": torch.bfloat16, "master_weights": True},
    "f16-master": {"dtype": torch.float16, "master_weights": True},
    "bf16-states": {"dtype": torch.bfloat16, "state_dtype": torch.bfloat16},
}
stores = pytest.mark.parametrize("store", STORES)


def through_a_file(optimizer: Optimizer) -> Any:
    """Return the optimizer's state as a weights-only load of its file gives it."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def members(optimizer: Optimizer) -> list[Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


# --- restored runs --------------------------------------------------------------------------------

Restore = Callable[[LayerwiseOptimizer, str, Options], LayerwiseOptimizer]


def saved(optimizer: LayerwiseOptimizer, name: str, store: Options) -> LayerwiseOptimizer:
    fresh, copies = make(name, seed=9, **store)
    with torch.no_grad():
        for to, value in zip(copies, members(optimizer), strict=True):
            to.copy_(value)
    fresh.load_state_dict(through_a_file(optimizer))
    return fresh


def copied(optimizer: LayerwiseOptimizer, name: str, store: Options) -> LayerwiseOptimizer:
    return copy.deepcopy(optimizer)


def pickled(optimizer: LayerwiseOptimizer, name: str, store: Options) -> LayerwiseOptimizer:
    twin: LayerwiseOptimizer = pickle.loads(pickle.dumps(optimizer))
    return twin


def assert_same_states(a: LayerwiseOptimizer, b: LayerwiseOptimizer) -> None:
    """The same keys, dtypes and bits, in other memory."""
    groups = [group for group in a.param_groups for _ in group["params"]]
    for group, mine, its in zip(groups, members(a), members(b), strict=True):
        states, twins_states = a.state.get(mine, {}), b.state.get(its, {})
        assert list(states) == list(twins_states)
        for key, value in states.items():
            assert value.dtype == twins_states[key].dtype
            kept = torch.float32 if key == "step" else state_dtype(group, mine, key)
            assert value.dtype == kept
            assert bits(value) == bits(twins_states[key]), key
            assert value.data_ptr() != twins_states[key].data_ptr()


@stores
@setups
@pytest.mark.parametrize("restore", [saved, copied, pickled])
def test_a_restored_run_continues_in_every_bit(name: str, restore: Restore, store: str) -> None:
    optimizer, params = make(name, **STORES[store])
    take_steps(optimizer, params, 1, 2)
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
        group["trust_upper"] = 3.0
    twin = restore(optimizer, name, STORES[store])
    assert_same_states(optimizer, twin)
    assert [group | {"params": []} for group in twin.param_groups] == [
        group | {"params": []} for group in optimizer.param_groups
    ]
    for seed in (3, 4):
        take_steps(optimizer, params, seed)
        take_steps(twin, members(twin), seed)
        assert_same_bits(members(twin), params)
    assert_same_states(optimizer, twin)


@pytest.mark.parametrize("store", ["bf16", "f16-master"])
@setups
def test_states_hold_more_than_16_bits(name: str, store: str) -> None:
    """So that a state cast to its parameter's dtype would have shown above."""
    optimizer, params = make(name, **STORES[store])
    take_steps(optimizer, params, 1, 2)
    for param in params:
        for key, value in optimizer.state.get(param, {}).items():
            if key != "step" and value.dim():
                assert not torch.equal(value.to(param.dtype).float(), value), key


@setups
def test_a_run_rolled_back_repeats_its_bits(name: str) -> None:
    """Loading replaces states under a plan that is kept."""
    optimizer, params = make(name, dtype=torch.bfloat16)
    take_steps(optimizer, params, 1, 2)
    state, weights = through_a_file(optimizer), [param.detach().clone() for param in params]
    ends = []
    for _ in range(2):
        optimizer.load_state_dict(copy.deepcopy(state))
        with torch.no_grad():
            for param, weight in zip(params, weights, strict=True):
                param.copy_(weight)
        take_steps(optimizer, params, 3, 4)
        ends.append([param.detach().clone() for param in params])
    assert_same_bits(*ends)
    assert not torch.equal(ends[0][0], weights[0])


@setups
def test_a_shallow_copy_is_another_handle(name: str) -> None:
    """It has the same parameters and states: steps by either are steps of one run."""
    (optimizer, params), (alone, others) = make(name), make(name)
    take_steps(optimizer, params, 1)
    handle = copy.copy(optimizer)
    for seed, either in ((2, handle), (3, optimizer), (4, handle)):
        take_steps(either, params, seed)
    take_steps(alone, others, 1, 2, 3, 4)
    assert_same_bits(params, others)


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


@setups
@stores
def test_a_state_dict_is_tensors_by_parameter(name: str, store: str) -> None:
    """What distributed checkpoints can flatten; loaded, it is aliased, as torch does."""
    optimizer, params = make(name, **STORES[store])
    take_steps(optimizer, params, 1)
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    assert state["state"].keys() <= set(range(len(params)))
    fresh, _ = make(name, **STORES[store])
    fresh.load_state_dict(state)
    for index, values in state["state"].items():
        assert {type(value) for value in values.values()} == {torch.Tensor}
        loaded = fresh.state[members(fresh)[index]]
        assert all(loaded[key].data_ptr() == values[key].data_ptr() for key in values)


def test_copies_have_all_public_attributes() -> None:
    optimizer, params = make("RMSprop-all")
    take_steps(optimizer, params, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    public = {key for key in vars(optimizer) if not key.startswith("_")}
    assert {key for key in vars(copy.deepcopy(optimizer)) if not key.startswith("_")} == public


def test_unknown_keys_of_a_group_survive() -> None:
    """SWALR and others keep their own there."""
    optimizer, _ = make("momentum")
    optimizer.param_groups[0]["swa_lr"] = 0.25
    twin = saved(optimizer, "momentum", {})
    assert twin.param_groups[0]["swa_lr"] == 0.25
    take_steps(twin, members(twin), 1)


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


# --- torch.optim's checkpoints --------------------------------------------------------------------


def hand_over(make_next: Make) -> BeforeStep:
    """Return what goes on after 10 steps with another optimizer, which loads the first's state."""

    def before_step(i: int, optimizer: Optimizer) -> Optimizer | None:
        if i != 10:
            return None
        following = make_next(members(optimizer))
        following.load_state_dict(through_a_file(optimizer))
        return following

    return before_step


def blank(cls: Any) -> Make:
    """Return how to make an optimizer whose options are not the run's."""
    return lambda params: cls(params, lr=9.0)


@every_dtype
@every_full
def test_a_checkpoint_of_torchs_continues_here(
    name: str, options: Options, dtype: torch.dtype
) -> None:
    _, twin = both(name, **options)
    mine = train(twin, dtype, before_step=hand_over(blank(TWINS[name][0])))
    assert_torchs(mine, twin, dtype)


@every_dtype
@every_full
def test_a_checkpoint_of_ours_continues_in_torch(
    name: str, options: Options, dtype: torch.dtype
) -> None:
    ours, twin = both(name, **options)
    theirs = train(ours, dtype, before_step=hand_over(blank(TWINS[name][1])))
    assert_torchs(theirs, twin, dtype)


@every_full
def test_a_checkpoint_of_torchs_with_parameters_that_took_no_step(
    name: str, options: Options
) -> None:
    _, twin = both(name, **options)
    late: Options = {"absent": lambda i, n: n > 2 and i < 15}
    before_step = hand_over(blank(TWINS[name][0]))
    mine = train(twin, torch.float32, **late, before_step=before_step)
    assert_torchs(mine, twin, torch.float32, **late)


@pytest.mark.parametrize("how", ["foreach", "fused"])
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam", "AdamW"])
def test_a_checkpoint_of_torchs_other_implementations(name: str, how: str) -> None:
    options: Options = {**FULL[name], "foreach": how == "foreach", how: True}
    _, first = both(name, **options)
    mine = train(first, torch.float32, before_step=hand_over(blank(TWINS[name][0])))
    assert_torchs(mine, both(name, **FULL[name])[1], torch.float32)


@every_full
def test_16_bit_states_of_torchs_are_widened(name: str, options: Options) -> None:
    """Master weights begin at the parameter."""
    _, twin = both(name, **options)
    theirs, _ = run(twin, torch.bfloat16, steps=3)
    optimizer: Any = both(name, lr=9.0, master_weights=True)[0](members(theirs))
    optimizer.load_state_dict(through_a_file(theirs))
    for param in members(theirs):
        for key, value in theirs.state[param].items():
            loaded = optimizer.state[param][key]
            assert loaded.dtype == torch.float32
            assert torch.equal(loaded, value.float())
    give(members(theirs), random_tensors(RUN_SHAPES, 4, torch.bfloat16))
    judged_optimizer_step(optimizer)
    assert all(MASTER in optimizer.state[param] for param in members(theirs))


DECAY: Options = {"lr": 0.05, "weight_decay": 0.2, "eps": 1e-3}
DECOUPLED: list[tuple[Any, Any, bool]] = [
    (partial(torch.optim.Adam, decoupled_weight_decay=True), Adam, True),
    (torch.optim.Adam, Adam, False),
    (torch.optim.AdamW, Adam, True),
    (torch.optim.AdamW, AdamW, True),
    (partial(Adam, weight_decay_in="weights"), torch.optim.Adam, True),
    (partial(Adam, decoupled_weight_decay=True), torch.optim.Adam, True),
    (Adam, torch.optim.Adam, False),
    (AdamW, torch.optim.Adam, True),
    (AdamW, torch.optim.AdamW, True),
    (AdamW, Adam, True),
    (partial(AdamW, weight_decay_in="gradient"), torch.optim.Adam, False),
]


@pytest.mark.parametrize(("first", "second", "decoupled"), DECOUPLED)
def test_decoupled_weight_decay_is_taken_up(first: Any, second: Any, decoupled: bool) -> None:
    _, twin = both("Adam", **DECAY, decoupled_weight_decay=decoupled)
    mine = train(partial(first, **DECAY), torch.float64, before_step=hand_over(blank(second)))
    assert_torchs(mine, twin, torch.float64)


@pytest.mark.parametrize(
    ("cls", "place"), [(Adam, "gradient"), (AdamW, "weights"), (LAMB, "update")]
)
def test_a_state_that_does_not_say_where_decay_stands(cls: Any, place: str) -> None:
    """As torch.optim.AdamW's before it was an Adam: it stays where it is."""
    params = [Parameter(torch.ones(2))]
    state = torch.optim.AdamW(params).state_dict()
    del state["param_groups"][0]["decoupled_weight_decay"]
    optimizer = cls(params)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["weight_decay_in"] == place


def test_our_word_for_a_place_goes_before_torchs() -> None:
    optimizer, _ = make("AdamW")
    state = optimizer.state_dict()
    assert {group["decoupled_weight_decay"] for group in state["param_groups"]} == {True}
    state["param_groups"][1]["weight_decay_in"] = "update"
    optimizer.load_state_dict(state)
    places = [group["weight_decay_in"] for group in optimizer.param_groups]
    assert places == ["weights", "update"]


# --- older and adapted checkpoints ----------------------------------------------------------------


def test_old_checkpoints() -> None:
    """torch has saved a step that is a float, fewer options, and a buffer of None."""
    optimizer, params = make("RMSprop-all")
    take_steps(optimizer, params, 1, 2)
    state = through_a_file(optimizer)
    for values in state["state"].values():
        values["step"] = float(values["step"])
    for group in state["param_groups"]:
        for key in ("maximize", "foreach", "differentiable", "capturable", "fused", "trust"):
            del group[key]
    other, copies = make("RMSprop-all", seed=9)
    other.load_state_dict(state)
    group = other.param_groups[0]
    assert (group["trust"], group["maximize"], group["lr"]) == (True, False, 0.05)
    give_gradients(copies, 3)
    judged_optimizer_step(other)
    assert other.state[copies[0]]["step"].item() == 3

    sgd, params = make("dampening")
    state = {i: {"momentum_buffer": None} for i in range(len(params))}
    sgd.load_state_dict({**sgd.state_dict(), "state": state})
    take_steps(sgd, params, 1)
    for param in params:
        assert param.grad is not None
        assert torch.equal(sgd.state[param]["momentum_buffer"], param.grad)  # undamped


def test_an_unpickled_optimizer_of_an_older_version_gets_new_options() -> None:
    optimizer, _ = make("momentum")
    new = {
        "trust_eps": 0.0,
        "on_nonfinite": "propagate",
        "momentum_scaling": "outside",
        "weight_decay_in": "gradient",
        "master_weights": False,
    }
    for group in optimizer.param_groups:
        for key in new:
            del group[key]
    twin = pickle.loads(pickle.dumps(optimizer))
    for group in twin.param_groups:
        assert {key: group[key] for key in new} == new
    take_steps(twin, members(twin), 1)


def test_a_hook_may_adapt_a_state_by_names() -> None:
    """torch's way to load into another order of parameters."""
    shapes, names = [(4, 3), (4, 3), (5,)], ["a", "b", "c"]

    def named(order: list[int]) -> tuple[LayerwiseOptimizer, dict[str, Parameter]]:
        weights = random_tensors(shapes, 0, torch.bfloat16)
        params = {names[i]: Parameter(weights[i]) for i in order}
        return Adam(params.items(), lr=0.1), params

    def give_by_name(params: dict[str, Parameter], seed: int) -> None:
        give([params[name] for name in names], random_tensors(shapes, seed, torch.bfloat16))

    def adapt(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        (group,) = state["param_groups"]
        of = dict(zip(group["param_names"], group["params"], strict=True))
        (own,) = optimizer.param_groups
        states = {i: state["state"][of[name]] for i, name in enumerate(own["param_names"])}
        return {
            "state": states,
            "param_groups": [{**group, "param_names": own["param_names"]}],
        }

    first, params = named([0, 1, 2])
    second, others = named([2, 0, 1])
    second.register_load_state_dict_pre_hook(adapt)
    give_by_name(params, 1)
    first.step()
    with torch.no_grad():
        for name, param in params.items():
            others[name].copy_(param)
    second.load_state_dict(through_a_file(first))
    for optimizer, given in ((first, params), (second, others)):
        give_by_name(given, 2)
        optimizer.step()
    assert_same_bits([others[name] for name in names], [params[name] for name in names])


def test_a_hook_after_loading_has_the_last_word() -> None:
    """And sees states of their own dtype."""
    optimizer, params = make("Adam", dtype=torch.bfloat16)
    take_steps(optimizer, params, 1)
    fresh, copies = make("Adam", dtype=torch.bfloat16)
    seen = []

    def halve(loaded: Optimizer) -> None:
        for values in loaded.state.values():
            seen.append(values["exp_avg"].dtype)
            values["exp_avg"] = values["exp_avg"] / 2

    fresh.register_load_state_dict_post_hook(halve)
    fresh.load_state_dict(through_a_file(optimizer))
    assert seen == [torch.float32] * len(params)
    for param, other in zip(copies, params, strict=True):
        expected = optimizer.state[other]["exp_avg"] / 2
        assert torch.equal(fresh.state[param]["exp_avg"], expected)


# --- what is refused ------------------------------------------------------------------------------

Spoil = Callable[[dict[str, Any]], Any]


def put(key: str, value: Any) -> Spoil:
    """Replace one of the first parameter's states."""
    return lambda state: state["state"][0].update({key: value})


def say(**options: Any) -> Spoil:
    """Let the second group say something else."""
    return lambda state: state["param_groups"][1].update(options)


def of(cls: Any, **options: Any) -> Spoil:
    """Replace the whole by another optimizer's state after a step."""

    def spoil(state: dict[str, Any]) -> None:
        params = [Parameter(weight) for weight in random_tensors(SHAPES, 0)]
        other = cls([{"params": params[:2]}, {"params": params[2:]}], **options)
        take_steps(other, params, 1)
        state.update(other.state_dict())

    return spoil


TORCH_RMSPROP = of(torch.optim.RMSprop, foreach=False)


def torch_rmsprop_with_momentum(state: dict[str, Any]) -> None:
    TORCH_RMSPROP(state)
    for group in state["param_groups"]:
        group["momentum"] = 0.9


BAD: dict[str, tuple[str, Spoil, str]] = {
    "no state": ("Adam", lambda s: s.pop("state"), "has no dict 'state'"),
    "no groups": ("Adam", lambda s: s.pop("param_groups"), "has no list 'param_groups'"),
    "states in a list": ("Adam", lambda s: s.update(state=[]), "has no dict 'state'"),
    "no params": ("Adam", lambda s: s["param_groups"][1].pop("params"), "group 1 .* no 'params'"),
    "groups": ("Adam", lambda s: s["param_groups"].pop(), "different number of parameter groups"),
    "size": ("Adam", say(params=[2, 3]), "doesn't match the size of optimizer's group"),
    "a list of states": ("Adam", lambda s: s["state"].update({0: [1.0]}), "0.0 .* not a dict"),
    "a tensor of states": ("Adam", lambda s: s["state"].update({0: torch.ones(2)}), "not a dict"),
    "missing": (
        "Adam",
        lambda s: s["state"][2].pop("exp_avg"),
        "saved state of 1.0 does not fit Adam: it lacks 'exp_avg'",
    ),
    "None": ("Adam", put("exp_avg", None), "0.0 .* lacks 'exp_avg'"),
    "no step": ("Adam", put("step", None), "0.0 .* lacks 'step'"),
    "NAdam's": ("Adam", put("mu_product", torch.ones(())), "holds 'mu_product', which rule 'adam'"),
    "strangers alone": (
        "Adam",
        lambda s: s["state"].update({0: {"m": torch.ones(5, 4)}}),
        "0.0 .* lacks 'exp_avg'",
    ),
    "another rule's": (
        "Adam",
        put("square_avg", torch.ones(5, 4)),
        "holds 'square_avg', which rule 'adam' does not have",
    ),
    "shape": ("Adam", put("exp_avg", torch.ones(4, 5)), r"has shape \(4, 5\), .* has \(5, 4\)"),
    "integers": (
        "Adam",
        put("exp_avg", torch.ones(5, 4).int()),
        "'exp_avg' is torch.int32, torch.strided, on cpu; a state is dense floating-point",
    ),
    "sparse": ("Adam", put("exp_avg", torch.ones(5, 4).to_sparse()), "float32, torch.sparse_coo"),
    "no memory": ("Adam", put("exp_avg", torch.ones(5, 4, device="meta")), "strided, on meta"),
    "a number": ("Adam", put("exp_avg", 1.0), "'exp_avg' is a float, not a tensor"),
    "two steps": ("Adam", put("step", torch.ones(2)), r"'step' has shape \(2,\)"),
    "a word for a step": ("Adam", put("step", "two"), "'step' is 'two', not a number of steps"),
    "half a step": ("Adam", put("step", 1.5), "'step' is 1.5, not a number of steps"),
    "a step before the first": ("Adam", put("step", -1.0), "'step' is -1.0, not a number"),
    "NaN steps": ("Adam", put("step", torch.tensor(math.nan)), "'step' is .*nan.*, not a number"),
    "SGD's in Adam": ("Adam", of(SGD, momentum=0.9), "holds 'momentum_buffer', which rule 'adam'"),
    "plain SGD's in Lion": ("Lion", of(SGD), "group 0 .* options of rule 'sgd', not of 'lion'"),
    "plain SGD's in RMSprop": (
        "RMSprop",
        of(SGD),
        "'dampening', 'nesterov', options of rule 'sgd'",
    ),
    "torch's SGD's in LAMB": ("LAMB", of(torch.optim.SGD), "options of rule 'sgd', not of 'adam'"),
    "Adam's in SGD": ("momentum", of(Adam), "holds 'exp_avg', 'exp_avg_sq', which rule 'sgd'"),
    "torch's momentum in LARS": (
        "LARS",
        of(torch.optim.SGD, momentum=0.9),
        "0.0 .* holds gradients as torch scales them, but momentum_scaling='inside'",
    ),
    "a stranger": ("Adam", lambda s: s["state"].update({7: {}}), "states of 7, which is in none"),
    "names": ("Adam", lambda s: s.update(state={"w": s["state"][0]}), "states of 'w', which is"),
    "twice": ("Adam", lambda s: s["param_groups"][0].update(params=[0, 0]), "0 in its .* twice"),
    "a wide master": ("Adam", put("master", torch.ones(5, 4)), "a parameter of torch.float32 is"),
    "too many steps": ("Adam", put("step", 2.0**24 + 2), "not a number of steps up to 2\\*\\*24"),
    "a misspelt bound": ("DATE", say(trust_uper=1.0), "'trust_uper' is no option of the ratio"),
    "Adam's in RMSprop": ("RMSprop", of(torch.optim.Adam), "holds 'exp_avg', .* rule 'rmsprop'"),
    "RMSprop's in Adagrad": ("Adagrad", of(RMSprop), "holds 'square_avg', which rule 'adagrad'"),
    "RMSprop's in Adadelta": ("Adadelta", TORCH_RMSPROP, "lacks 'acc_delta'"),
    "Adadelta's in RMSprop": ("RMSprop", of(torch.optim.Adadelta), "holds 'acc_delta', which rule"),
    "amsgrad": ("Adam", say(amsgrad=True), "1.0 .* it lacks 'max_exp_avg_sq', which these options"),
    "momentum": ("RMSprop", torch_rmsprop_with_momentum, "0.0 .* it lacks 'momentum_buffer'"),
    "centered": ("RMSprop", say(centered=True), "1.0 .* it lacks 'grad_avg'"),
    "an option's range": ("Adam", say(betas=(0.9, 1.0)), "Invalid beta parameter at index 1: 1.0"),
    "an option's word": ("Adam", say(weight_decay_in="biases"), "Invalid weight_decay_in value"),
    "bounds": ("DATE", say(trust_lower=3.0), "trust_lower=3.0 is above trust_upper=1.0"),
    "exclude": ("LAMB", say(exclude=(True, False)), "param group 1: exclude must hold a bool for"),
    "exclude as a word": ("LAMB", say(exclude="1d"), "param group 1: exclude must hold a bool for"),
}


@pytest.mark.parametrize(("name", "spoil", "match"), BAD.values(), ids=BAD)
def test_a_state_that_does_not_fit(name: str, spoil: Spoil, match: str) -> None:
    """It is a ValueError that names what does not, and nothing has changed."""
    (optimizer, params), (alone, others) = make(name), make(name)
    take_steps(optimizer, params, 1, 2)
    take_steps(alone, others, 1, 2)
    state = through_a_file(optimizer)
    sound = copy.deepcopy(state)
    spoil(state)
    groups = copy.deepcopy([group | {"params": []} for group in optimizer.param_groups])
    with optimizer_unchanged(optimizer), pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(state)
    assert [group | {"params": []} for group in optimizer.param_groups] == groups
    optimizer.load_state_dict(sound)
    for hooks in ("pre", "post"):  # through which it is checked
        assert not getattr(optimizer, f"_optimizer_load_state_dict_{hooks}_hooks")
    take_steps(optimizer, params, 3)
    take_steps(alone, others, 3)
    assert_same_bits(params, others)


@pytest.mark.parametrize("flag", ["capturable", "differentiable"])
def test_a_state_with_a_flag_that_is_refused(flag: str) -> None:
    optimizer, params = make("Adam")
    take_steps(optimizer, params, 1)
    state = through_a_file(optimizer)
    say(**{flag: True})(state)
    with optimizer_unchanged(optimizer), pytest.raises(RuntimeError, match=f"support `{flag}`"):
        optimizer.load_state_dict(state)


COUNTED = [name for name, (cls, _) in SETUPS.items() if cls not in (SGD, LARS, Lion)]
"""Not those with a buffer alone: without it the parameter took no step."""


@stores
@pytest.mark.parametrize("name", COUNTED)
def test_a_state_with_any_key_missing_is_refused(name: str, store: str) -> None:
    optimizer, params = make(name, **STORES[store])
    take_steps(optimizer, params, 1)
    for key in optimizer.state[params[0]]:
        state = through_a_file(optimizer)
        del state["state"][1][key]
        with optimizer_unchanged(optimizer), pytest.raises(ValueError, match=f"lacks '{key}'"):
            optimizer.load_state_dict(state)


@pytest.mark.parametrize(("cls", "options"), [(SGD, {"momentum": 0.9}), (Lion, {})])
def test_moving_bounds_need_their_count(cls: Any, options: Options) -> None:
    """Of rules that count no steps by themselves."""
    param = Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    trust = TrustRatio(bounds="adabound", final=0.1, gamma=0.01)
    optimizer = cls([param], lr=0.1, trust=trust, **options)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"] = {0: {k: v for k, v in state["state"][0].items() if k != "step"}}
    with optimizer_unchanged(optimizer), pytest.raises(ValueError, match="lacks 'step'"):
        optimizer.load_state_dict(state)


def test_decay_in_the_update_stays_where_torchs_is_decoupled() -> None:
    optimizer, params = make("LAMB")
    take_steps(optimizer, params, 1)
    twin = torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:]}])
    twin.step()
    optimizer.load_state_dict(twin.state_dict())
    assert [group["weight_decay_in"] for group in optimizer.param_groups] == ["update"] * 2


def test_what_a_wrapper_keeps_beside_the_states_comes_back() -> None:
    """As timm's Lookahead keeps its slow weights: of any kind, and none of our business."""
    (optimizer, params), (other, others) = make("AdamW"), make("AdamW")
    take_steps(optimizer, params, 1)
    kept: dict[str, Any] = {"slow": torch.full((5, 4), 2.0), "count": torch.tensor(3), "note": 0.5}
    optimizer.state[params[0]].update(kept)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    found = other.state[others[0]]
    assert_same_bits([found["slow"]], [kept["slow"]])
    assert found["note"] == 0.5
    take_steps(other, others, 2)
    assert_same_bits([found["slow"]], [kept["slow"]])


def test_states_that_the_options_do_not_use_are_welcome() -> None:
    """A checkpoint with amsgrad or momentum goes on without."""
    optimizer, params = make("Adam-all")
    take_steps(optimizer, params, 1)
    state = through_a_file(optimizer)
    for group in state["param_groups"]:
        group["amsgrad"] = False
    optimizer.load_state_dict(state)
    give_gradients(params, 2)
    judged_optimizer_step(optimizer)
