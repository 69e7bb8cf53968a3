"""The one step of every optimizer here: from torch's param groups to one call of the kernels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import repeat
from operator import is_
from typing import Any, ClassVar, TypeAlias, TypedDict, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from date_kernels import (
    MASTER,
    MOST_STEPS,
    RULES,
    Stepper,
    Telemetry,
    check_saved_state,
    check_state_dtype,
    has_master,
    make_collect,
    make_stepper,
    new_state,
    state_dtype,
)
from date_kernels.rules import Rule, check_common, check_group, needs_step

from .compiled import handle_of, kind_of, take_step
from .telemetry import Arrivals, LayerTelemetry, Reading
from .trust_ratio import TrustRatio, group_options
from .whole import check_whole

Exclude: TypeAlias = str | Callable[[str | None, Tensor], bool] | None
"""None, ``"1d"``, or a predicate of (name or None, parameter)."""


class Layerwise(TypedDict, total=False):
    """The arguments of every class here beside torch's: Note [Layer-wise arguments].

    It stands in `date_optim.optimizers`.
    """

    trust: TrustRatio | None
    exclude: Exclude
    max_grad_norm: float | None
    momentum_scaling: str
    weight_decay_in: str
    master_weights: bool
    state_dtype: torch.dtype | None
    on_nonfinite: str


_LAYERWISE = Layerwise(
    trust=None,
    exclude=None,
    max_grad_norm=None,
    momentum_scaling="outside",
    weight_decay_in="gradient",
    master_weights=False,
    state_dtype=None,
    on_nonfinite="propagate",
)

_PREDICATE = "predicate"
"""What stands in ``defaults["exclude"]`` for a predicate, which is not kept itself."""


class ConflictError(ValueError, RuntimeError):
    """Two arguments that exclude each other; torch raises RuntimeError for some of these."""


class LayerwiseOptimizer(Optimizer):
    """Base of the optimizers here: groups of plain scalars, torch's state keys, one native call.

    Parameters
    ----------
    params : iterable
        As torch.optim: tensors, (name, tensor) pairs or dicts of a param group.
    defaults : dict
        The options of the rule, with torch's names.
    layerwise : Layerwise
        Those that every rule has; what it leaves out has its default.
    """

    rule: ClassVar[str]
    """The kernels' family."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any], layerwise: Layerwise) -> None:
        for key in layerwise.keys() - _LAYERWISE.keys():
            raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {key!r}")
        defaults = {**defaults, **_LAYERWISE, **layerwise}
        exclude = defaults["exclude"]
        _check_exclude(exclude)
        if isinstance(defaults["trust"], bool):
            raise TypeError(f"trust must be a TrustRatio or None, not {defaults['trust']}")
        defaults = _expand_trust(defaults)
        defaults["exclude"] = _PREDICATE if callable(exclude) else exclude
        self._check(defaults)
        self._exclude: Exclude = exclude  # for the groups given now; gone afterwards
        super().__init__(params, defaults)
        del self._exclude

    def _check(self, group: dict[str, Any]) -> None:
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, not of shape {tuple(lr.shape)}")
        if group["fused"] and group["foreach"]:
            raise ConflictError("`fused` and `foreach` cannot be `True` together.")
        self._check_flags(group)
        check_group(RULES[self.rule], RULES[self.rule].complete(group))

    def _check_flags(self, group: dict[str, Any], params: Sequence[Tensor] = ()) -> None:
        if group["fused"] and group["differentiable"]:
            raise RuntimeError("`fused` does not support `differentiable`; leave one at False")
        if group["differentiable"]:
            raise RuntimeError(
                f"{type(self).__name__} does not support `differentiable`; leave it at False"
            )
        if group["capturable"] and any(param.device.type == "cpu" for param in params):
            raise RuntimeError(
                f"{type(self).__name__} does not support `capturable` on the CPU: it is for "
                "parameters on a GPU, whose steps a CUDA graph captures; leave it at False"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as torch.optim; it may have its own ``trust`` and ``exclude``.

        Parameters
        ----------
        param_group : dict
            ``"params"`` and any options that differ from the constructor's.

        Raises
        ------
        ValueError
            For options out of their range, or where the constructor was given a predicate and this
            group no ``exclude``: the predicate was not kept.
        """
        group = _expand_trust(param_group)
        exclude = group.pop("exclude", getattr(self, "_exclude", self.defaults["exclude"]))
        if exclude == _PREDICATE:
            raise ValueError(
                "the predicate that the optimizer was built with is not kept; "
                "give this param group its own exclude="
            )
        _check_exclude(exclude)
        _check_ratio_options(group, self.defaults)
        complete = {**self.defaults, **group}
        self._check(complete)
        check_common([*self.param_groups, complete])
        super().add_param_group(group)
        try:
            self._check_flags(self.param_groups[-1], self.param_groups[-1]["params"])
            self._check_state_dtypes(self.param_groups[-1], self.param_groups[-1]["params"])
            self.param_groups[-1]["exclude"] = _resolve(exclude, self.param_groups[-1])
        except BaseException:
            self.param_groups.pop()
            raise

    def _check_state_dtypes(self, group: dict[str, Any], params: Sequence[Tensor]) -> None:
        if group["state_dtype"] is not None:
            names = self._names()
            for param in params:
                check_state_dtype(RULES[self.rule], group, param, names[id(param)])

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Complete the options and counters of a state that lacks them, but for ``exclude``."""
        super().__setstate__(state)
        self.defaults = {**_LAYERWISE, **self.defaults}
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key != "exclude":
                    group.setdefault(key, value)
        for param, values in self.state.items():
            step = values.get("step")
            if step is not None and not (isinstance(step, Tensor) and step.dtype == torch.float32):
                values["step"] = torch.full(
                    (), float(step), dtype=torch.float32, device=param.device
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer or of its torch.optim twin.

        Options that the state does not hold stay as they are. As torch does, it keeps the tensors
        of the state itself where their dtype fits.

        Parameters
        ----------
        state_dict : dict
            As `state_dict` returns it.

        Raises
        ------
        ValueError, RuntimeError
            Before anything changes: for a state of another rule or of other options than its groups
            say, or one that is not whole.
        """
        saved: dict[str, Any] = {}

        def check(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            saved.update(self._checked(state_dict))
            return saved

        # The first comes after hooks that adapt a state, the second before those that look at it.
        hooks = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(
                lambda _: self._keep_dtypes(saved["state"], saved["param_groups"]), prepend=True
            ),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _checked(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state with options that it lacks as they are now; refuse what does not fit."""
        for key, kind in (("state", dict), ("param_groups", list)):
            if not isinstance(state_dict.get(key), kind):
                raise ValueError(
                    f"the state dict has no {kind.__name__} {key!r}: it is no optimizer's"
                )
        groups = state_dict["param_groups"]
        for number, group in enumerate(groups):
            if "params" not in group:
                raise ValueError(f"param group {number} of the state dict has no 'params'")
        sizes = [[len(group["params"]) for group in of] for of in (groups, self.param_groups)]
        if sizes[0] == sizes[1]:  # if not, torch says so
            of_torch = ["trust" not in group for group in groups]
            groups = [_merged(*pair) for pair in zip(self.param_groups, groups, strict=True)]
            for number, (own, group) in enumerate(zip(self.param_groups, groups, strict=True)):
                self._check(group)
                self._check_flags(group, own["params"])
                self._check_state_dtypes(group, own["params"])
                _check_excluded(group, number)
            check_common(groups)
            self._check_saved(state_dict["state"], groups, of_torch)
            for number, group in enumerate(state_dict["param_groups"]):
                _check_rule_of(RULES[self.rule], group, number)
        return {**state_dict, "param_groups": groups}

    def _check_saved(
        self, states: dict[int, Any], groups: list[dict[str, Any]], of_torch: list[bool]
    ) -> None:
        """Refuse a saved state that this optimizer's options do not make."""
        rule, names = RULES[self.rule], self._names()
        members = Counter(index for group in groups for index in group["params"])
        if repeated := [index for index, times in members.items() if times > 1]:
            raise ValueError(f"the state dict has {repeated[0]!r} in its param groups twice")
        if strangers := [index for index in states if index not in members]:
            raise ValueError(
                f"the state dict has states of {strangers[0]!r}, which is in none of its param "
                "groups"
            )
        for own, group, torchs in zip(self.param_groups, groups, of_torch, strict=True):
            for param, index in zip(own["params"], group["params"], strict=True):
                saved = states.get(index)
                try:
                    if not isinstance(saved, dict | None):
                        raise ValueError(f"it is {saved!r:.80}, not a dict of states")
                    check_saved_state(rule, group, param, saved or {}, of_torch=torchs)
                    _check_count((saved or {}).get("step"))
                except ValueError as error:
                    raise ValueError(
                        f"the saved state of {names[id(param)]} does not fit "
                        f"{type(self).__name__}: {error}"
                    ) from None

    def _keep_dtypes(self, states: dict[int, Any], groups: list[dict[str, Any]]) -> None:
        """Undo torch's cast of states to a 16-bit parameter's dtype.

        Nothing is lost on the way but what ``state_dtype`` asks for.
        """
        known = {*RULES[self.rule].states, MASTER, "step"}  # others are a wrapper's
        for own, group in zip(self.param_groups, groups, strict=True):
            for param, index in zip(own["params"], group["params"], strict=True):
                for key, value in (states.get(index) or {}).items():
                    if isinstance(value, Tensor) and key in known:
                        dtype = torch.float32 if key == "step" else state_dtype(group, param, key)
                        self.state[param][key] = value.to(param.device, dtype)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch.amp.GradScaler leaves unscaling and skipping to `step`.

        Only where every param group asks for it with ``fused=True``: trainers refuse to clip the
        gradients of an optimizer that does.
        """
        return all(group["fused"] is True for group in self.param_groups)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step over all param groups in one native call.

        Parameters
        ----------
        closure : callable, optional
            Reevaluates the model and returns the loss.

        Returns
        -------
        The closure's loss, or None.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            Before anything is written: parameters, states and step counts are as they were.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            self._traced_step()
            return loss
        gathered = self.__dict__.get("_gathered")
        if gathered is None or not gathered.refresh(self):
            gathered = self._gathered = _Gathered(self)
        self.__dict__.pop("_telemetry", None)
        if gathered.params:
            telemetry = self._take(gathered, gathered.params)
            gathered.keep_new_states(self, telemetry)
        gathered.grads = []  # their memory is the user's to free
        return loss

    def _take(self, layers: _Layers, own: list[Tensor]) -> Telemetry:
        """Step over layers; `own` are the param groups' tensors, by which they are known."""
        self._check_capture(layers.params[0])
        # Where GradScaler leaves them for the time of a step; it asks whether they are there.
        grad_scale, found_inf = map(self.__dict__.get, ("grad_scale", "found_inf"))
        name_of = self._name_of(own)
        if grad_scale is not None:
            _check_writable(layers.grads, name_of)
        telemetry = self._stepper_of().step(
            layers.params,
            layers.grads,
            layers.states,
            layers.steps,
            layers.groups,
            grad_scale=grad_scale,
            found_inf=found_inf,
            name_of=name_of,
        )
        self._telemetry = own, telemetry
        if grad_scale is not None:
            _unscale(layers.grads, grad_scale, found_inf)
        return telemetry

    def _traced_step(self) -> None:
        """What Dynamo traces: Note [Traced steps] in `date_optim.compiled`."""
        tensors: tuple[list[Tensor], ...] = ([], [], [], [])
        handle: list[int] = []
        members: list[int] = []
        counts, rates = [], []
        for group in self.param_groups:
            found: tuple[list[Any], ...] = ([], [], [], [], [], [])
            self._init_group(group, *found)
            for all_of, of_group in zip(tensors, found[:4], strict=True):
                all_of.extend(of_group)
            members.extend(found[4])
            counts.append(len(found[4]))
            handle = found[5]
            if isinstance(group["lr"], Tensor):
                rates.append(group["lr"])
        kind = kind_of(RULES[self.rule], self.param_groups)
        # Without torch.no_grad, which a graph does not undo where the operator raises: no output of
        # it has a gradient anyway.
        take_step(handle[0], *tensors, rates, members, counts, kind)

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[Tensor],
        steps: list[Tensor],
        members: list[int],
        handle: list[int],
    ) -> None:
        """Fill the lists with a group's layers; Dynamo runs it while it traces a step."""
        [number] = [i for i, own in enumerate(self.param_groups) if own is group]
        if number == 0:  # all groups at once, for the calls that follow
            self._traced = _Gathered(self)
            self._traced.keep_new_states(self, None)
        gathered = self._traced
        if number == len(self.param_groups) - 1:
            del self._traced
        handle.append(handle_of(self))
        places = {id(param): place for place, param in enumerate(group["params"])}
        for layer in gathered.groups[number]["params"]:
            params.append(gathered.params[layer])
            grads.append(gathered.grads[layer])
            states.extend(x[layer] for x in gathered.states.values() if x[layer] is not None)
            if gathered.steps[layer] is not None:
                steps.append(gathered.steps[layer])
            members.append(places[id(gathered.params[layer])])

    def take_traced(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[Tensor],
        steps: list[Tensor],
        rates: list[Tensor],
        members: list[int],
        counts: list[int],
        kind: str,
    ) -> None:
        """See `date_optim.compiled.take_step`."""
        self.__dict__.pop("_telemetry", None)
        if not params:
            return
        if kind != kind_of(RULES[self.rule], self.param_groups):
            raise RuntimeError("options that decide which states there are changed in a graph")
        layers = _Layers(self)
        own: list[Tensor] = []
        left_states, left_steps, left_rates = iter(states), iter(steps), iter(rates)
        for number, (group, count) in enumerate(zip(self.param_groups, counts, strict=True)):
            _check(self, group, number)
            lr = next(left_rates) if isinstance(group["lr"], Tensor) else group["lr"]
            first = len(own)
            places = members[first : first + count]
            own += [group["params"][place] for place in places]
            exclude = tuple(group["exclude"][place] for place in places)
            indices = tuple(range(first, len(own)))
            layers.groups.append({**group, "lr": lr, "params": indices, "exclude": exclude})
            keys = RULES[self.rule].used(group)
            counted = needs_step(RULES[self.rule], group)
            for param in params[first : len(own)]:
                has = {*keys, *((MASTER,) if has_master(group, param) else ())}
                for key, column in layers.states.items():
                    column.append(next(left_states) if key in has else None)
                layers.steps.append(next(left_steps) if counted else None)
        layers.params, layers.grads = params, grads
        self._take(layers, own)

    def _check_capture(self, param: Tensor) -> None:
        """Refuse a capture that torch.optim would refuse, too: it asks for ``capturable=True``."""
        if not param.is_cuda:
            return
        capturable = all(group["capturable"] for group in self.param_groups)
        if not capturable and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a CUDA graph captures step() of {type(self).__name__}, but not all of its param "
                "groups have capturable=True"
            )

    def _stepper_of(self) -> Stepper:
        # Not in __init__: copies and pickles of an Optimizer lose its attributes, and a plan
        # belongs to one optimizer.
        stepper: Stepper | None = self.__dict__.get("_stepper")
        if stepper is None:
            stepper = self._stepper = make_stepper(self.rule)
        return stepper

    def _names(self) -> dict[int, str]:
        """By a parameter's id: its own name where no other has it, else ``<group>.<index>``."""
        members = [
            (param, names[index] if names else None, f"{number}.{index}")
            for number, group in enumerate(self.param_groups)
            for names in [group.get("param_names")]
            for index, param in enumerate(group["params"])
        ]
        uses = Counter(own for _, own, _ in members)
        return {
            id(param): place if own is None or uses[own] > 1 else own
            for param, own, place in members
        }

    def _name_of(self, params: list[Tensor]) -> Callable[[int], str]:
        """What errors call a layer of a step; all names are made at once, when one is needed."""
        names = cache(self._names)
        return lambda layer: names()[id(params[layer])]

    def start_reading(self) -> Reading:
        """Have a GPU send what the last step found out, without waiting for it."""
        params, telemetry = self.__dict__.get("_telemetry", ([], None))
        if telemetry is not None and any(group["capturable"] for group in self.param_groups):
            telemetry = telemetry.again()
        return Reading(params, telemetry, self._names)

    def read_telemetry(self, wait: bool = True) -> dict[str, LayerTelemetry]:
        """What the last step found out about each layer that took part in it.

        Parameters
        ----------
        wait : bool, default: True
            Wait for a GPU to have finished the step. If not, the numbers are of the newest step
            that was read so and has finished; there are none before the first has. The next calls
            bring this step's. Without a GPU it is finished already.

        Returns
        -------
        dict of str to LayerTelemetry
            By the parameter's name where the optimizer was given ``named_parameters()``, else
            ``"<group>.<index>"``. Empty before the first step. It is not part of ``state_dict()``.
        """
        reading = self.start_reading()
        if wait:
            return reading.layers()
        arrivals: Arrivals = self.__dict__.setdefault("_arrivals", Arrivals())
        return arrivals.newest(reading)

    def report_per_parameter_metrics(
        self, param: Tensor, name: str, optimizer_metrics: dict[str, Any]
    ) -> dict[str, Any]:
        """Add the numbers of a parameter: Composer's ``OptimizerMonitor`` looks for this method.

        It calls it for every parameter that has a gradient, after a step; the first call waits for
        a GPU.

        Parameters
        ----------
        param : Tensor
        name : str
            What the monitor calls it.
        optimizer_metrics : dict
            Gets ``trust/ratio/<name>``, ``trust/raw_ratio/<name>``, ``trust/weight_norm/<name>``
            and ``trust/measured_norm/<name>`` where the parameter has a ratio of its own.

        Returns
        -------
        dict
            `optimizer_metrics`.
        """
        _, telemetry = self.__dict__.get("_telemetry", ([], None))
        known, layers, asked = self.__dict__.get("_reported", (None, {}, set()))
        if telemetry is not known or id(param) in asked:  # another round
            layers, asked = self.start_reading().by_id(), set()
            self._reported = telemetry, layers, asked
        asked.add(id(param))
        if id(param) in layers:
            numbers = layers[id(param)].scalars(name)
            optimizer_metrics |= {f"trust/{key}": value for key, value in numbers.items()}
        return optimizer_metrics


class _Layers:
    """The layers of a step, as the sequences that the kernels take; none yet."""

    def __init__(self, optimizer: LayerwiseOptimizer) -> None:
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.states: dict[str, list[Tensor | None]] = {
            key: [] for key in RULES[optimizer.rule].states
        }
        if any(group["master_weights"] for group in optimizer.param_groups):
            self.states[MASTER] = []
        self.steps: list[Tensor | None] = []
        self.groups: list[dict[str, Any]] = []


class _Gathered(_Layers):
    """The layers that have a gradient.

    It is kept from step to step as long as `refresh` finds the same layers.
    """

    def __init__(self, optimizer: LayerwiseOptimizer) -> None:
        super().__init__(optimizer)
        rule = RULES[optimizer.rule]
        self.new: list[tuple[int, str, Tensor]] = []  # states that exist once the step has happened
        self.stale: list[int] = []  # layers with master weights that the step will not keep up
        names = cache(optimizer._names)
        for number, group in enumerate(optimizer.param_groups):
            _check(optimizer, group, number)
            self._add(optimizer, rule, group, names)
        self._saved = [optimizer.state.get(param, {}) for param in self.params]
        self._collect = make_collect()
        self._columns = [
            (key, column)
            for key, column in (*self.states.items(), ("step", self.steps))
            if not all(map(is_, column, repeat(None)))
        ]
        self._of_state = [*optimizer.state.values()]
        self._dtypes = [param.dtype for param in self.params] if MASTER in self.states else []
        self._uses = _uses_of(optimizer)

    def refresh(self, optimizer: LayerwiseOptimizer) -> bool:
        """Take up this step's gradients, states and options; False where layers are others."""
        if self.new or self.stale or _uses_of(optimizer) != self._uses:
            return False
        if self._dtypes and [param.dtype for param in self.params] != self._dtypes:
            return False  # who has master weights has changed
        # Layers without a gradient are not among ours: which ones is not worth keeping.
        grads = self._collect(
            [group["params"] for group in optimizer.param_groups],
            self.params,
            optimizer.state,
            self._of_state,
            self._saved,
            self._columns,
        )
        if grads is None:
            return False
        self.grads = grads
        for number, group in enumerate(optimizer.param_groups):
            _check(optimizer, group, number)
            members = self.groups[number]["params"]
            self.groups[number] = {**group, "params": members, "exclude": tuple(group["exclude"])}
        return True

    def _add(
        self,
        optimizer: LayerwiseOptimizer,
        rule: Rule,
        group: dict[str, Any],
        names: Callable[[], dict[int, str]],
    ) -> None:
        def new(key: str, param: Tensor) -> Tensor:
            tensor = new_state(rule, group, param, key, names()[id(param)])
            self.new.append((len(self.params), key, tensor))
            return tensor

        saved_of = optimizer.state.get
        columns = [(key, self.states[key]) for key in rule.used(group)]
        masters = self.states[MASTER] if group["master_weights"] else None
        counted = needs_step(rule, group)
        first = len(self.params)
        exclude = []
        for param, excluded in zip(group["params"], group["exclude"], strict=True):
            grad = param.grad
            if grad is None:
                continue
            if group["fused"] and (param.is_meta or not param.is_floating_point()):
                raise RuntimeError(  # torch's words
                    "`fused=True` requires all the params to be floating point Tensors on a "
                    f"device, but {names()[id(param)]} is {param.dtype} on {param.device}; move it "
                    "first, as .to_empty(device=...) does"
                )
            if group["trust"]:
                check_whole(param, partial(_name_in, names, param))
            saved = saved_of(param) or {}
            for key, column in columns:
                state = saved.get(key)
                column.append(new(key, param) if state is None else state)
            state = saved.get(MASTER)
            if has_master(group, param):
                state = new(MASTER, param) if state is None else state
            elif state is not None:
                self.stale.append(len(self.params))
                state = None
            if masters is not None:
                masters.append(state)
            if counted:
                step = saved.get("step")
                self.steps.append(self._new_step(saved, param) if step is None else step)
            exclude.append(excluded)
            self.params.append(param)
            self.grads.append(grad)
        count = len(self.params)
        for unused in (self.steps, *self.states.values()):
            unused.extend([None] * (count - len(unused)))
        members = tuple(range(first, count))
        self.groups.append({**group, "params": members, "exclude": tuple(exclude)})

    def _new_step(self, saved: dict[str, Any], param: Tensor) -> Tensor:
        # A momentum buffer that torch saved without a counter has seen its first step.
        seen = saved.get("momentum_buffer") is not None
        step = torch.full((), float(seen), dtype=torch.float32, device=param.device)
        self.new.append((len(self.params), "step", step))
        return step

    def keep_new_states(self, optimizer: LayerwiseOptimizer, telemetry: Telemetry | None) -> None:
        """Hand new states over, and drop those left behind.

        Not before the step, which may raise or skip a layer, but where the step is only traced.
        Whether a device has skipped one is not asked, since that would wait for it: a new state
        still stands at its start then.
        """

        def taken(layer: int) -> bool:
            return telemetry is None or not (telemetry.is_known and telemetry.skipped[layer])

        for layer, key, tensor in self.new:
            if taken(layer):
                optimizer.state[self.params[layer]][key] = tensor
        for layer in self.stale:
            if taken(layer):
                values = optimizer.state[self.params[layer]]
                del values[MASTER]
                if not values:
                    del optimizer.state[self.params[layer]]


def _name_in(names: Callable[[], dict[int, str]], param: Tensor) -> str:
    return names()[id(param)]


def _check_writable(grads: list[Tensor], name_of: Callable[[int], str]) -> None:
    """Refuse gradients that `_unscale` could not write to."""
    for layer, grad in enumerate(grads):
        sizes = zip(grad.shape, grad.stride(), strict=True)
        if grad.is_inference() or any(size > 1 and stride == 0 for size, stride in sizes):
            raise RuntimeError(
                f"the gradient of {name_of(layer)} cannot be unscaled in place: it is an expanded "
                "view or an inference tensor; give its .clone(), or fused=None and let GradScaler "
                "unscale"
            )


def _unscale(
    grads: list[Tensor], grad_scale: Tensor | float, found_inf: Tensor | float | None
) -> None:
    """Leave the gradients as torch's fused optimizers do: unscaled, or as they are after an inf.

    Nobody waits for a GPU.
    """
    device = grads[0].device
    divisor = torch.as_tensor(grad_scale, dtype=torch.float32, device=device).reshape(())
    if found_inf is not None:
        found = torch.as_tensor(found_inf, device=device).reshape(())
        divisor = torch.where(found != 0, torch.ones_like(divisor), divisor)
    with torch.no_grad():
        torch._foreach_div_(grads, divisor)


def _uses_of(optimizer: LayerwiseOptimizer) -> list[tuple[Any, ...]]:
    """What decides which states the layers of each group have."""
    rule = RULES[optimizer.rule]
    return [
        (
            len(group["params"]),
            rule.used(group),
            needs_step(rule, group),
            group["master_weights"],
            bool(group["trust"]),
        )
        for group in optimizer.param_groups
    ]


def _check(optimizer: LayerwiseOptimizer, group: dict[str, Any], number: int) -> None:
    """Refuse what a user may have changed in a group since it was added."""
    optimizer._check_flags(group, group["params"] if group["capturable"] else ())
    _check_excluded(group, number)


def _expand_trust(group: dict[str, Any]) -> dict[str, Any]:
    """The group with a TrustRatio, or None, replaced by its plain scalars."""
    if "trust" not in group or isinstance(group["trust"], bool):
        return dict(group)
    trust = group["trust"]
    if trust is not None and not isinstance(trust, TrustRatio):
        raise TypeError(
            f"trust must be a TrustRatio or None, not {trust!r}; "
            "e.g. trust=TrustRatio(lower=.1, upper=1)"
        )
    return {**group, **group_options(trust)}


def _merged(own: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """A saved group, with the options that it does not hold as they are."""
    group = {**{key: value for key, value in own.items() if key != "params"}, **saved}
    decoupled = group.pop("decoupled_weight_decay", False)
    # torch's word for one of our three places; that of an update is a rule that it does not have.
    if decoupled and "weight_decay_in" not in saved and own["weight_decay_in"] != "update":
        group["weight_decay_in"] = "weights"
    return group


def _check_rule_of(rule: Rule, saved: dict[str, Any], number: int) -> None:
    """Refuse a saved group that has more of another rule's options, ours among them.

    A run without states leaves nothing else that tells whose it is.
    """
    own = saved.keys() & rule.options.keys()
    for other in RULES.values():
        theirs = saved.keys() & other.options.keys()
        if theirs > own:
            raise ValueError(
                f"param group {number} of the state dict has "
                f"{', '.join(map(repr, sorted(theirs - own)))}, options of rule {other.name!r}, "
                f"not of {rule.name!r}; load it into the optimizer that saved it"
            )


def _check_ratio_options(group: dict[str, Any], known: dict[str, Any]) -> None:
    """Refuse options of the ratio without their prefix, which nobody would read."""
    for key in group.keys() - known.keys():
        if f"trust_{key}" in known:
            raise ValueError(f"a param group says trust_{key}, not {key}, or has its own trust=")


def _check_exclude(exclude: Exclude) -> None:
    if not (exclude is None or exclude == "1d" or callable(exclude)):
        raise ValueError(
            f"Invalid exclude value: {exclude!r}; "
            "take None, '1d' or a predicate of (name or None, parameter)"
        )


def _check_excluded(group: dict[str, Any], number: int) -> None:
    """Refuse a group whose ``exclude``, as it stands there, is not a bool for each parameter."""
    exclude = group["exclude"]
    if not isinstance(exclude, (tuple, list)) or len(exclude) != len(group["params"]):
        raise ValueError(
            f"param group {number}: exclude must hold a bool for each of its "
            f"{len(group['params'])} params, not {exclude!r}; None, '1d' and predicates "
            "are for constructors and add_param_group"
        )


def _check_count(step: Any) -> None:
    """Refuse a saved step that is no number of steps."""
    try:
        count = 0.0 if step is None else float(step)
    except (TypeError, ValueError, RuntimeError):
        count = math.nan
    if not (0 <= count <= MOST_STEPS and count.is_integer()):
        raise ValueError(f"'step' is {step!r:.80}, not a number of steps up to 2**24")


def _resolve(exclude: Exclude, group: dict[str, Any]) -> tuple[bool, ...]:
    params = group["params"]
    names = group.get("param_names") or [None] * len(params)
    if callable(exclude):
        return tuple(bool(exclude(name, param)) for name, param in zip(names, params, strict=True))
    return tuple(exclude == "1d" and param.ndim <= 1 for param in params)
