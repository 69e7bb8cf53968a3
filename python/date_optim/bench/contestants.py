"""Who takes part: ours and what one would use instead, by base rule.

All of a rule get the same options: torch's defaults, but for the weight decay, so that each trains
with one. Rates and gradients stand still, so that LARS's learning rate inside or outside its
momentum buffer is the same number; `Contestant.same` is the call of ours that computes what the
contestant does (docs/peers.md), in which a note's deviation shows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from date_kernels import info, make_stepper
from date_optim import LAMB, LARS, SGD, Adadelta, Adagrad, Adam, AdamW, Lion, RMSprop, TrustRatio
from date_optim.optimizer import LayerwiseOptimizer

from .peers import timm_optim
from .traffic import STATES

Params = list[Tensor]
Make = Callable[..., Optimizer]
MakeOurs = Callable[..., LayerwiseOptimizer]

OURS = "date-kernels"
BOTH = ("cpu", "cuda")
CUDA = ("cuda",)


@dataclass(frozen=True)
class Contestant:
    """What takes steps.

    Attributes
    ----------
    name : str
    peer : str
        A key of `date_optim.bench.peers.PEERS`, or `OURS`.
    make : callable
        Makes its optimizer of a list of parameters; options come after them.
    same : callable
        Makes ours that computes the same.
    trust : {None, "gradient", "update"}
        What its trust ratio is of.
    note : str
        Where its arithmetic differs from that of ours with its kind of ratio.
    devices : tuple of str
        Where it runs.
    writes_gradients : bool
        Whether its step changes ``p.grad``.
    """

    name: str
    peer: str
    make: Make
    same: MakeOurs
    trust: str | None = None
    note: str = ""
    devices: tuple[str, ...] = BOTH
    writes_gradients: bool = False

    @property
    def is_ours(self) -> bool:
        """Whether it is of this project."""
        return self.peer == OURS


RULES = tuple(STATES)
"""Base rules, by their names on the command line."""

_PLAIN: dict[str, tuple[type[Any], type[Any] | None, dict[str, Any]]] = {
    "sgd": (SGD, torch.optim.SGD, {"lr": 1e-3, "weight_decay": 1e-4}),
    "momentum": (SGD, torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}),
    "adam": (AdamW, torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 1e-2}),
    "adagrad": (Adagrad, torch.optim.Adagrad, {"lr": 1e-3, "weight_decay": 1e-4}),
    "rmsprop": (RMSprop, torch.optim.RMSprop, {"lr": 1e-3, "weight_decay": 1e-4}),
    "adadelta": (Adadelta, torch.optim.Adadelta, {"lr": 1.0, "weight_decay": 1e-4}),
    "lion": (Lion, None, {"lr": 1e-4, "weight_decay": 1e-2}),
}
"""Ours, torch's and the options of both."""

_FUSED = {"sgd": BOTH, "momentum": BOTH, "adam": BOTH, "adagrad": ("cpu",)}
"""Where torch has a fused step."""

_LARS: dict[str, Any] = _PLAIN["momentum"][2]
_LAMB: dict[str, Any] = {**_PLAIN["adam"][2], "eps": 1e-6}
_UNBOUNDED = 1e30
"""For arguments that must be a bound: none that a norm here reaches."""


def _make(cls: Callable[..., Any], params: Params, **options: Any) -> Any:
    return cls(params, **options)


def _peer(module: str, name: str, params: Params, **options: Any) -> Any:
    """Make another package's optimizer; it is imported now."""
    if module.startswith("timm."):
        found = timm_optim(module.removeprefix("timm."))
    else:
        found = importlib.import_module(module)
    return getattr(found, name)(params, **options)


def _faster(module: str, name: str, params: Params, **options: Any) -> Any:
    """Make one that can step on lists of tensors; on a CPU that is slower than one by one."""
    return _peer(module, name, params, **options, foreach=params[0].is_cuda)


class Compiled:
    """torch's step on tensors of a list, compiled as its documentation says."""

    def __init__(self, make: Make, params: Params, **options: Any) -> None:
        # Else torch would go on, uncompiled, once it has compiled the step of too many optimizers.
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        self.optimizer = make(params, **options)
        self.step = torch.compile(self.optimizer.step)


def _plain(rule: str) -> list[Contestant]:
    """Ours without a ratio and with DATE's, and torch's."""
    ours, theirs, options = _PLAIN[rule]
    plain: MakeOurs = partial(_make, ours, **options)
    of = "update" if rule == "lion" else "gradient"  # the norm of signs alone says little
    bounded = TrustRatio(of=of, lower=0.1, upper=1.0)
    date: MakeOurs = partial(_make, ours, **options, trust=bounded)
    found = [
        Contestant("plain", OURS, plain, plain),
        Contestant("DATE", OURS, date, date, of),
    ]
    if theirs is None:
        return found
    foreach: Make = partial(_make, theirs, **options, foreach=True)
    compiled: Any = partial(Compiled, foreach)
    if rule in _FUSED:
        fused: Make = partial(_make, theirs, **options, fused=True)
        found.append(Contestant("torch fused", "torch-fused", fused, plain, devices=_FUSED[rule]))
    return [
        *found,
        Contestant("torch foreach", "torch-foreach", foreach, plain),
        Contestant("torch compiled", "torch-compiled", compiled, plain),
    ]


def _lars() -> list[Contestant]:
    ratio: dict[str, Any] = {**_LARS, "coefficient": 1.0}
    everywhere: MakeOurs = partial(_make, LARS, **ratio, exclude=None)
    of_buffer = TrustRatio(of="update", upper=1.0)
    return [
        Contestant("LARS", OURS, everywhere, everywhere, "gradient"),
        Contestant(
            "timm Lars",
            "timm",
            partial(_faster, "timm.lars", "Lars", **_LARS, trust_coeff=1.0, eps=0.0),
            everywhere,
            "gradient",
        ),
        Contestant(
            "pytorch-optimizer LARS",
            "pytorch-optimizer",
            partial(_faster, "pytorch_optimizer", "LARS", **_LARS, trust_coefficient=1.0),
            partial(_make, LARS, **ratio),
            "gradient",
            "no ratio and no decay for 1-d layers; writes into the gradients",
            writes_gradients=True,
        ),
        Contestant(
            "torch-optimizer LARS",
            "torch-optimizer",
            partial(_peer, "torch_optimizer", "LARS", **_LARS, trust_coefficient=1.0, eps=0.0),
            everywhere,
            "gradient",
        ),
        Contestant(
            "bitsandbytes LARS",
            "bitsandbytes",
            partial(_peer, "bitsandbytes.optim", "LARS32bit", **_LARS, max_unorm=1.0),
            partial(_make, SGD, **_LARS, trust=of_buffer),
            "update",
            "ratio of the momentum buffer, at most 1",
            CUDA,
        ),
    ]


def _lamb() -> list[Contestant]:
    everywhere: MakeOurs = partial(_make, LAMB, **_LAMB, exclude=None)

    def uncorrected(**ratio: Any) -> MakeOurs:
        return partial(
            _make,
            Adam,
            **_LAMB,
            weight_decay_in="update",
            bias_correction=False,
            trust=TrustRatio(of="update", **ratio),
        )

    return [
        Contestant("LAMB", OURS, everywhere, everywhere, "update"),
        Contestant(
            "timm Lamb",
            "timm",
            partial(_faster, "timm.lamb", "Lamb", **_LAMB, max_grad_norm=None, always_adapt=True),
            everywhere,
            "update",
        ),
        Contestant(
            "pytorch-optimizer Lamb",
            "pytorch-optimizer",
            partial(
                _faster,
                "pytorch_optimizer",
                "Lamb",
                **_LAMB,
                adam_debias=True,
                weight_decouple=False,
            ),
            uncorrected(weight_norm_bounds=(0.0, 10.0), eps=_LAMB["eps"]),
            "update",
            "no bias correction; min(||w||, 10)",
        ),
        Contestant(
            "torch-optimizer Lamb",
            "torch-optimizer",
            partial(_peer, "torch_optimizer", "Lamb", **_LAMB, clamp_value=_UNBOUNDED),
            uncorrected(),
            "update",
            "no bias correction",
        ),
        Contestant(
            "bitsandbytes LAMB",
            "bitsandbytes",
            partial(_peer, "bitsandbytes.optim", "LAMB32bit", **_LAMB, max_unorm=1.0),
            partial(_make, AdamW, **_LAMB, trust=TrustRatio(of="update", upper=1.0)),
            "update",
            "ratio at most 1; decay taken off the weights",
            CUDA,
        ),
        Contestant(
            "apex FusedLAMB",
            "apex",
            partial(
                _peer,
                "apex.optimizers",
                "FusedLAMB",
                **_LAMB,
                max_grad_norm=_UNBOUNDED,
                use_nvlamb=True,
            ),
            everywhere,
            "update",
            "writes the update into the gradients",
            CUDA,
            writes_gradients=True,
        ),
        Contestant(
            "DeepSpeed FusedLamb",
            "deepspeed",
            partial(_peer, "deepspeed.ops.lamb", "FusedLamb", **_LAMB, bias_correction=False),
            uncorrected(lower=0.01, upper=10.0),
            "update",
            "no bias correction; ratio within [0.01, 10]",
            CUDA,
        ),
    ]


def _lion() -> list[Contestant]:
    ours, _, options = _PLAIN["lion"]
    plain: MakeOurs = partial(_make, ours, **options)
    return [
        Contestant(
            "timm Lion",
            "timm",
            partial(_faster, "timm.lion", "Lion", **options),
            plain,
        ),
        Contestant(
            "pytorch-optimizer Lion",
            "pytorch-optimizer",
            partial(_faster, "pytorch_optimizer", "Lion", **options),
            plain,
        ),
    ]


_MORE = {"momentum": _lars, "adam": _lamb, "lion": _lion}

BASELINES = ("torch fused", "torch foreach", "timm Lion", "pytorch-optimizer Lion")
"""What ratios are of: the first of these that was measured."""


def by_backend(make: MakeOurs, backend: str, params: Params, **options: Any) -> LayerwiseOptimizer:
    """Make ours and let one backend take its steps.

    Parameters
    ----------
    make : callable
    backend : str
        A key of ``date_kernels.info().backends``.
    params : list of Tensor
    **options
        Over those that it is made with.
    """
    optimizer = make(params, **options)
    optimizer._stepper = make_stepper(optimizer.rule, backend)
    return optimizer


def _every(rule: str) -> list[Contestant]:
    return [*_plain(rule), *(_MORE[rule]() if rule in _MORE else [])]


def others(rule: str, device: str, peers: Sequence[str]) -> list[tuple[Contestant, str]]:
    """Return which of the peers cannot take part on a device, or by a rule, and why.

    Parameters
    ----------
    rule, device, peers
        As those of `contestants`.
    """
    every = [each for each in _every(rule) if each.peer in peers]
    elsewhere = [(each, f"not for {device}") for each in every if device not in each.devices]
    have_one = {each.peer for each in every}
    nothing: MakeOurs = partial(_make, _PLAIN[rule][0])
    return elsewhere + [
        (Contestant(peer, peer, nothing, nothing), f"not for {rule}")
        for peer in peers
        if peer not in have_one
    ]


def contestants(rule: str, device: str, peers: Sequence[str]) -> list[Contestant]:
    """Return who takes part on a device: ours, and the peers asked for.

    On a GPU each of ours stands there once for every backend that is available, the one that it
    takes by itself first and without the backend's name.

    Parameters
    ----------
    rule : str
        One of `RULES`.
    device : {"cpu", "cuda"}
    peers : sequence of str
        Keys of `date_optim.bench.peers.PEERS`.
    """
    every = _every(rule)
    ours = [each for each in every if each.is_ours]
    if device == "cuda":
        available = [name for name in ("triton", "cuda") if info().backends[name] is None]
        ours += [
            replace(
                each, name=f"{each.name}, {backend}", make=partial(by_backend, each.same, backend)
            )
            for backend in available[1:]
            for each in ours
        ]
    return [*ours, *(each for each in every if each.peer in peers and device in each.devices)]
