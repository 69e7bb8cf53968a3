"""Our LARS and LAMB are the other packages', by the calls that docs/peers.md gives.

Note [Twice the peer's own error]. The yardstick is the peer itself: its run in float32 beside its
run in float64, from the same weights and gradients. In float32 ours may lie at most twice as far
from the peer's float64 run as the peer does. In float64 nothing more exact is at hand, but errors
shrink with eps: the peer's is taken for its float32 error times the ratio of the two eps; ours may
be twice that, and the two lie at most the sum apart. Gradients are given, as in `torch_runs`, and
their size changes from step to step: otherwise LAMB would not see whether they are clipped.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from helpers import Options, assert_same_bits, bits, random_tensors
from torch import Tensor
from torch.nn import Parameter
from torch_runs import distance

import date_optim
from date_kernels.testing import assert_close
from date_optim.bench.peers import timm_optim
from date_optim.optimizer import LayerwiseOptimizer

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs/peers.md").read_text(encoding="utf-8")
HEADED = re.compile(r"^### `([^`\n]+)`$.*?```python\n(.*?)```", re.M | re.S)
CALLS: dict[str, str] = dict(HEADED.findall(DOCS))
"""By peer: the call of ours in docs/peers.md."""

SHAPES = [(60, 33), (33,), (), (5, 4, 3, 3), (500,), (12, 7), (9,)]
STARTS_AT_ZERO = (5, 6)
RATES = [0.01 * (1 + i % 7) for i in range(20)]


class Run(Protocol):
    """What takes steps; optax's has no groups, and its rate from a schedule."""

    param_groups: list[dict[str, Any]]

    def step(self) -> Any: ...


# --- the peers ------------------------------------------------------------------------------------


def peer(name: str) -> Any:
    """Return a peer's class or function; without its package the test is skipped."""
    package, _, attribute = name.rpartition(".")
    if package == "timm.optim":
        if importlib.util.find_spec("timm") is None:
            pytest.skip("could not import 'timm': No module named 'timm'")
        return getattr(timm_optim(attribute.lower()), attribute)
    return getattr(pytest.importorskip(package), attribute)


class Optax:
    """A transformation of optax on torch's parameters."""

    def __init__(self, transformation: str, params: list[Parameter], options: Options) -> None:
        self.optax, self.jax = pytest.importorskip("optax"), pytest.importorskip("jax")
        self.param_groups: list[dict[str, Any]] = []
        self.params = params
        with self.precision():
            self.transformation = peer(transformation)(self.rate, **options)
            self.state = self.transformation.init(self.arrays(params))

    def rate(self, count: Any) -> Any:
        """Return the rate of a step, counted from 0: a schedule of optax."""
        return self.jax.numpy.asarray(RATES)[count]

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Let jax have float64 where the parameters do, and not otherwise."""
        with self.jax.enable_x64(self.params[0].dtype == torch.float64):
            yield

    def arrays(self, tensors: list[Any]) -> list[Any]:
        return [self.jax.numpy.asarray(tensor.detach().numpy()) for tensor in tensors]

    @torch.no_grad()
    def step(self) -> None:
        with self.precision():
            before = self.arrays(self.params)
            grads = self.arrays([param.grad for param in self.params])
            updates, self.state = self.transformation.update(grads, self.state, before)
            for param, after in zip(
                self.params, self.optax.apply_updates(before, updates), strict=True
            ):
                assert str(after.dtype) in str(param.dtype)
                param.copy_(torch.tensor(self.jax.device_get(after)))


# --- the cases ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A peer's options.

    Attributes
    ----------
    call : str
        A key of `CALLS`, which is the peer's name unless it ends with options of the peer.
    options : dict
        The peer's.
    vectors : {"as others", "no decay", "excluded"}
        Whether 1-d layers have no weight decay, or no ratio either.
    rate : float
        What multiplies our rate.
    decoupled : bool
        Whether the weights are shrunk before their norm is taken.
    dtypes : tuple of torch.dtype
        In which the peer computes all that it does.
    """

    call: str
    options: Options = field(default_factory=dict)
    vectors: str = "as others"
    rate: float = 1.0
    decoupled: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)

    @property
    def peer(self) -> str:
        return self.call.partition("(")[0]

    def __str__(self) -> str:
        words = [f"{key}={value}" for key, value in self.options.items()]
        left_out = [] if self.vectors == "as others" else [self.vectors]
        return "-".join([self.call, *words, *left_out])

    def make_peer(self, params: list[Parameter]) -> Run:
        """Make the peer's optimizer, as its users would leave vectors out."""
        if self.peer.startswith("optax."):
            masks = {
                "as others": (),
                "no decay": ("mask",) if self.peer == "optax.lamb" else ("weight_decay_mask",),
                "excluded": ("weight_decay_mask", "trust_ratio_mask"),
            }[self.vectors]
            mask = [param.ndim > 1 for param in params]
            return Optax(self.peer, params, {**self.options, **dict.fromkeys(masks, mask)})
        groups = [{"params": params}] if self.vectors == "as others" else without_decay(params)
        made: Run = peer(self.peer)(groups, lr=RATES[0], **self.options)
        return made

    def make_ours(self, params: list[Parameter]) -> LayerwiseOptimizer:
        """Make ours by the call in docs/peers.md."""
        made: LayerwiseOptimizer = our_call(
            self.call,
            without_decay(params) if self.vectors == "no decay" else params,
            exclude="1d" if self.vectors == "excluded" else None,
            **self.options,
        )
        return made


def without_decay(params: list[Parameter]) -> list[dict[str, Any]]:
    """Return the groups of a user who spares vectors the weight decay."""
    return [
        {"params": [param for param in params if param.ndim > 1]},
        {"params": [param for param in params if param.ndim <= 1], "weight_decay": 0.0},
    ]


def our_call(call: str, params: Any, exclude: str | None = None, **options: Any) -> Any:
    """Evaluate a call in docs/peers.md for the peer's options."""
    parameters = inspect.signature(peer(call.partition("(")[0])).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    names = {**defaults, **options, "params": params, "lr": RATES[0], "exclude": exclude}
    return eval(CALLS[call], {**vars(date_optim), "math": math, **names})


LARS_FORMS: list[Options] = [
    {"weight_decay": 0.1},
    {"momentum": 0.9, "weight_decay": 0.01},
    {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
]
DAMPED: Options = {"momentum": 0.9, "weight_decay": 0.01, "dampening": 0.5}
PLAIN: Options = {"adam_debias": True, "weight_decouple": False}
"""pytorch-optimizer's Lamb as others know it."""
CASES = [
    *(Case("timm.optim.Lars", options) for options in LARS_FORMS),
    Case("timm.optim.Lars", {}),
    Case("timm.optim.Lars", {**DAMPED, "foreach": True}),
    Case("timm.optim.Lars", {"momentum": 0.9, "always_adapt": True}),
    Case("timm.optim.Lars", {"momentum": 0.9, "weight_decay": 0.1, "eps": 1.0}),
    Case("timm.optim.Lars", {"weight_decay": 0.1, "trust_coeff": 0.02, "trust_clip": True}),
    Case(
        "timm.optim.Lars",
        {"momentum": 0.9, "trust_coeff": 0.02, "trust_clip": True, "always_adapt": True},
    ),
    Case("timm.optim.Lars", {"momentum": 0.9, "weight_decay": 0.1}, "excluded"),
    Case("timm.optim.Lars", {"momentum": 0.9, "weight_decay": 0.1}, "no decay"),
    Case("timm.optim.Lars", {"weight_decay": 0.1, "always_adapt": True}, "no decay"),
    Case("timm.optim.Lamb", {}),
    Case("timm.optim.Lamb", {"max_grad_norm": None, "weight_decay": 0.1, "foreach": True}),
    Case("timm.optim.Lamb", {"max_grad_norm": 20.0, "betas": (0.8, 0.95), "eps": 1e-3}),
    Case("timm.optim.Lamb", {"max_grad_norm": 20.0, "bias_correction": False}),
    Case("timm.optim.Lamb", {"trust_clip": True, "weight_decay": 0.1}),
    Case("timm.optim.Lamb", {"weight_decay": 0.0, "foreach": True}),
    Case("timm.optim.Lamb", {"weight_decay": 0.0, "always_adapt": True}),
    Case("timm.optim.Lamb", {"weight_decay": 0.1}, "excluded"),
    Case("timm.optim.Lamb", {"weight_decay": 0.1, "always_adapt": True}, "no decay"),
    Case("timm.optim.Lamb", {"weight_decay": 0.1, "decoupled_decay": True}, decoupled=True),
    Case("timm.optim.Lamb(grad_averaging=False)", {"grad_averaging": False, "weight_decay": 0.1}),
    Case(
        "timm.optim.Lamb(grad_averaging=False)",
        {"grad_averaging": False, "weight_decay": 0, "always_adapt": True, "trust_clip": True},
    ),
    *(Case("torch_optimizer.LARS", options) for options in LARS_FORMS),
    Case("torch_optimizer.LARS", {"momentum": 0.9}),
    Case("torch_optimizer.LARS", {**DAMPED, "trust_coefficient": 0.001, "eps": 1.0}),
    Case("torch_optimizer.LARS", {"momentum": 0.9, "weight_decay": 0.1}, "excluded"),
    Case("torch_optimizer.LARS", {"momentum": 0.9, "weight_decay": 0.1}, "no decay"),
    Case("torch_optimizer.Lamb", {}),
    Case("torch_optimizer.Lamb", {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-3}),
    Case("torch_optimizer.Lamb", {"weight_decay": 0.1, "clamp_value": 1000.0}),
    Case("torch_optimizer.Lamb", {"weight_decay": 0.1, "adam": True}),
    Case("torch_optimizer.Lamb", {"weight_decay": 0.1}, "no decay"),
    *(Case("pytorch_optimizer.LARS", options) for options in LARS_FORMS),
    Case("pytorch_optimizer.LARS", {"momentum": 0.0, "foreach": False}),
    Case("pytorch_optimizer.LARS", {"weight_decay": 0.1, "maximize": True, "foreach": False}),
    Case("pytorch_optimizer.LARS", {"weight_decay": 0.1, "trust_coefficient": 0.02}),
    Case("pytorch_optimizer.LARS", DAMPED, rate=1 - DAMPED["dampening"]),
    Case("pytorch_optimizer.Lamb", {"adam_debias": True}),
    Case("pytorch_optimizer.Lamb", {**PLAIN, "weight_decay": 0.1, "foreach": False}),
    Case(
        "pytorch_optimizer.Lamb",
        {**PLAIN, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "maximize": True},
    ),
    Case("pytorch_optimizer.Lamb", {**PLAIN, "weight_decay": 0.1, "adam": True}),
    Case(
        "pytorch_optimizer.Lamb",
        {"adam_debias": True, "pre_norm": True, "max_grad_norm": 20.0},
        dtypes=(torch.float32,),  # the total norm is float32 everywhere
    ),
    Case("pytorch_optimizer.Lamb", {"adam_debias": True, "weight_decay": 0.1}, decoupled=True),
    *(Case("optax.lars", {"momentum": 0.0, **options}) for options in LARS_FORMS),
    Case("optax.lars", {"trust_coefficient": 0.02, "eps": 1.0, "weight_decay": 0.1}),
    Case("optax.lars", {"weight_decay": 0.1}, "no decay"),
    Case("optax.lars", {"weight_decay": 0.1}, "excluded"),
    Case("optax.lamb", {}),
    Case("optax.lamb", {"b1": 0.8, "b2": 0.95, "eps": 1e-3, "weight_decay": 0.1}),
    Case("optax.lamb", {"weight_decay": 0.1}, "no decay"),
]

NOT_OURS: dict[str, set[str]] = {
    "timm.optim.Lamb": {"caution", "corrected_weight_decay"},
    "torch_optimizer.Lamb": {"debias"},
    "pytorch_optimizer.Lamb": {
        *("rectify", "degenerated_to_sgd", "n_sma_threshold", "fixed_decay", "grad_averaging"),
    },
    "optax.lamb": {"eps_root"},
}
"""By peer: the arguments that docs/peers.md says we do not follow."""


# --- parity ---------------------------------------------------------------------------------------


def initial(dtype: torch.dtype) -> list[Tensor]:
    weights = random_tensors(SHAPES, 0, dtype)
    for i in STARTS_AT_ZERO:
        weights[i].zero_()
    return weights


def gradients(i: int, dtype: torch.dtype) -> list[Tensor]:
    return [2.0 ** -(i % 4) * grad for grad in random_tensors(SHAPES, i + 1, dtype)]


def train(
    make: Callable[[list[Parameter]], Run],
    dtype: torch.dtype,
    rate: float = 1.0,
    before_step: Callable[[Run], None] = lambda run: None,
) -> list[Tensor]:
    """Return the weights after a run."""
    params = [Parameter(weight) for weight in initial(dtype)]
    run = make(params)
    for i, lr in enumerate(RATES):
        for param, grad in zip(params, gradients(i, dtype), strict=True):
            param.grad = grad
        for group in run.param_groups:
            group["lr"] = rate * lr
        before_step(run)
        run.step()
    return [param.detach() for param in params]


def follow_the_decay(optimizer: Run) -> None:
    """Set what docs/peers.md sets beside the rate."""
    section = DOCS.partition("## The same with a group's values")[2]
    code = re.search(r"```python\n(.*?)```", section, re.S)
    assert code is not None
    exec(code[1], {"optimizer": optimizer})


@cache
def peer_runs(index: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the peer's weights in float32 and in float64."""
    make = CASES[index].make_peer
    return train(make, torch.float32), train(make, torch.float64)


@pytest.mark.parametrize(
    ("index", "dtype"),
    [
        pytest.param(i, dtype, id=f"{case}-{str(dtype)[-2:]}")
        for i, case in enumerate(CASES)
        for dtype in case.dtypes
    ],
)
def test_our_call_is_the_peer(index: int, dtype: torch.dtype) -> None:
    """See Note [Twice the peer's own error]."""
    case = CASES[index]
    single, double = peer_runs(index)

    def make(params: list[Parameter]) -> Run:
        optimizer = case.make_ours(params)
        if case.decoupled:
            for group in optimizer.param_groups:
                group["weight_decay_in"] = "weights"
        return optimizer

    before_step = follow_the_decay if case.decoupled else lambda run: None
    ours = train(make, dtype, case.rate, before_step)
    own = distance(single, double)
    allowed = 2 * own
    if dtype == torch.float64:
        allowed = 3 * own * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    moved = distance(double, initial(torch.float64))
    assert 0 < allowed < moved, f"the peer's own error is no yardstick: {allowed} of {moved}"
    error = distance(ours, double)
    assert error <= allowed, f"{error:.3g} from the peer, {allowed:.3g} allowed"


@pytest.mark.parametrize("name", sorted({case.peer for case in CASES}))
def test_every_argument_of_the_peers_is_among_the_cases(name: str) -> None:
    tried = {key for case in CASES if case.peer == name for key in case.options}
    left_out = NOT_OURS.get(name, set())
    elsewhere = {"params", "lr", "learning_rate", "kwargs", "adam_debias"}
    masks = {"mask", "weight_decay_mask", "trust_ratio_mask"}  # `Case.vectors`
    arguments = inspect.signature(peer(name)).parameters.keys()
    assert arguments - elsewhere - masks == (tried | left_out) - elsewhere
    assert all(f"`{key}" in DOCS for key in left_out)


def test_the_documented_versions_are_those_required() -> None:
    required = (ROOT / "tests/peers/requirements.txt").read_text(encoding="utf-8")
    versions = re.findall(r"^\| (\S+) \| ([\d.]+) \|$", DOCS, re.M)
    assert len(versions) == 4
    assert all(f"\n{name}=={version}" in required for name, version in versions)


# --- what we do not copy --------------------------------------------------------------------------

CHANGED = "the package has changed: this test shows nothing any more, and docs/peers.md is wrong"


def take_steps(run: Run, param: Parameter, *grads: Tensor) -> Tensor:
    """Return one layer's weights after a step for each gradient."""
    for grad in grads:
        param.grad = grad.clone()
        run.step()
    return param.detach()


def both_after(case: Case, weight: Tensor, *grads: Tensor) -> tuple[Tensor, Tensor]:
    """Return one layer's weights after the peer's steps and after ours."""
    theirs, mine = Parameter(weight.clone()), Parameter(weight.clone())
    return (
        take_steps(case.make_peer([theirs]), theirs, *grads),
        take_steps(case.make_ours([mine]), mine, *grads),
    )


DECAYED: Options = {"weight_decay": 0.1}


@pytest.mark.parametrize(
    "case",
    [
        Case("timm.optim.Lars", DECAYED),
        Case("timm.optim.Lamb", {**DECAYED, "max_grad_norm": None}),
        Case("torch_optimizer.LARS", DECAYED),
        Case("pytorch_optimizer.LARS", DECAYED),
        Case("optax.lars", DECAYED),
        Case("optax.lamb", DECAYED),
    ],
    ids=str,
)
def test_a_norm_that_float16_does_not_hold(case: Case) -> None:
    """Norms in the parameter's dtype are infinite above 65504; ours is 141421."""
    weight, grad = torch.full((1000, 500), 200.0), torch.ones(1000, 500)
    theirs, mine = both_after(case, weight.half(), grad.half())
    assert not theirs.isfinite().any(), CHANGED
    exact = Parameter(weight.double())
    take_steps(case.make_ours([exact]), exact, grad.double())
    rounding = torch.finfo(torch.float16).eps / 2 * 200
    single = torch.finfo(torch.float32).eps * 200  # may turn a rounding the other way
    assert_close(mine.numpy(), exact.detach().numpy(), rounding + single, "weight")


@pytest.mark.parametrize(
    "case",
    [Case("timm.optim.Lars", DECAYED), Case("torch_optimizer.LARS", DECAYED)],
    ids=str,
)
def test_the_ratio_does_not_jump_where_a_gradient_vanishes(case: Case) -> None:
    """By the formula r is coefficient / decay; timm takes 1, torch-optimizer drops the decay."""
    weight, grad = torch.ones(10, 10, dtype=torch.float64), torch.ones(10, 10, dtype=torch.float64)
    theirs, mine = both_after(case, weight, 0 * grad)
    theirs_near, mine_near = both_after(case, weight, 1e-15 * grad)
    moved, moved_near = (float((weight - w).norm()) for w in (theirs, theirs_near))
    assert moved == 0 or moved > 50 * moved_near, CHANGED
    # The gradient is 1e-14 of the decayed weights, and moves r and the step by as much.
    step = float((weight - mine_near).abs().max())
    eps = torch.finfo(torch.float64).eps
    assert_close(mine.numpy(), mine_near.numpy(), 2e-14 * step + eps, "weight")


def test_larc_clips_the_ratio_of_a_layer_at_zero() -> None:
    """timm takes min(1/lr, 1) there, so that a rate above 1 is 1; ours takes 1."""
    case = Case("timm.optim.Lars", {"trust_clip": True, "always_adapt": True})
    moved = []
    for make in (case.make_peer, case.make_ours):
        param = Parameter(torch.zeros(5))
        run = make([param])
        run.param_groups[0]["lr"] = 4.0
        moved.append(-take_steps(run, param, torch.ones(5)))
    assert torch.equal(moved[0], torch.ones(5)), CHANGED
    assert torch.equal(moved[1], torch.full((5,), 4.0))


@pytest.mark.parametrize(
    ("case", "factor"),
    [
        (
            Case("torch_optimizer.Lamb", {"debias": True, "clamp_value": 1e3, "eps": 0.0}),
            math.sqrt(0.1),
        ),
        (Case("pytorch_optimizer.Lamb", {"eps": 0.0}), 10.0),
    ],
    ids=str,
)
def test_bias_correction_is_of_the_averages(case: Case, factor: float) -> None:
    """Of the rate it is no correction: a normalised update has no bias of scale to correct.

    The first step of LAMB is lr * ||w|| long. There sqrt(1 - beta2) / (1 - beta1) of it and
    1 / (1 - beta1), the default of pytorch-optimizer, are left.
    """
    weight, grad = (x.double() for x in random_tensors([(5, 8), (5, 8)], 0))
    theirs, _ = both_after(case, weight, grad)
    param = Parameter(weight.clone())
    mine = take_steps(date_optim.LAMB([param], RATES[0]), param, grad)
    length = RATES[0] * float(weight.norm())
    rounding = weight.numel() * torch.finfo(torch.float64).eps / RATES[0]  # of w - w'
    assert float((weight - theirs).norm()) == pytest.approx(factor * length, rel=rounding), CHANGED
    assert float((weight - mine).norm()) == pytest.approx(length, rel=rounding)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("timm.optim.Lamb", {"max_grad_norm": None}),
        ("pytorch_optimizer.Lamb", {**PLAIN, "pre_norm": True, "max_grad_norm": 0.0}),
    ],
)
def test_a_group_may_say_max_grad_norm(name: str, options: Options) -> None:
    """The peers read what the constructor was given, whatever stands in the groups."""

    def run(make: Callable[..., Run], norm: float | None, **kwargs: Any) -> list[Tensor]:
        def grouped(params: list[Parameter]) -> Run:
            own = {} if norm is None else {"max_grad_norm": norm}
            return make([{"params": params, **own}], lr=RATES[0], **kwargs)

        return train(grouped, torch.float32)

    assert_same_bits(run(peer(name), 0.5, **options), run(peer(name), None, **options))
    mine = run(date_optim.LAMB, 0.5)
    assert_same_bits(mine, run(date_optim.LAMB, None, max_grad_norm=0.5))
    assert distance(mine, run(date_optim.LAMB, None)) > 0


def test_a_layer_counts_its_own_steps() -> None:
    """timm counts a group's, and so corrects the averages of a layer that comes late too little."""
    moved = []
    for make in (peer("timm.optim.Lamb"), date_optim.LAMB):
        early, late = Parameter(torch.ones(5)), Parameter(torch.ones(5))
        optimizer = make([early, late], lr=0.125, weight_decay=0.0, max_grad_norm=None, eps=0.0)
        take_steps(optimizer, early, *[torch.ones(5)] * 9)
        late.grad = torch.ones(5)
        take_steps(optimizer, early, torch.ones(5))
        moved.append(float((1 - late.detach()).max()))
    corrections = (1 - 0.9) / (1 - 0.9**10) / math.sqrt((1 - 0.999) / (1 - 0.999**10))
    rounding = 10 * torch.finfo(torch.float32).eps
    assert moved[0] == pytest.approx(0.125 * corrections, rel=rounding), CHANGED
    assert moved[1] == pytest.approx(0.125, rel=rounding)


@pytest.mark.parametrize(
    "case",
    [
        Case("pytorch_optimizer.LARS", DECAYED),
        Case("pytorch_optimizer.Lamb", {**PLAIN, "pre_norm": True, "max_grad_norm": 0.5}),
    ],
    ids=str,
)
def test_gradients_stay_as_they_are(case: Case) -> None:
    """pytorch-optimizer leaves other values in them: gradients that are accumulated are wrong."""
    weight, grad = random_tensors([(5, 8), (5, 8)], 0)
    same = []
    for make in (case.make_peer, case.make_ours):
        param = Parameter(weight.clone())
        take_steps(make([param]), param, grad)
        assert param.grad is not None
        same.append(bits(param.grad) == bits(grad))
    assert not same[0], CHANGED
    assert same[1]


def test_the_denominator_is_the_update() -> None:
    """pytorch-optimizer's rectified Lamb takes the norm of the moved weights: r is nearly 1."""
    options: Options = {"rectify": True, "degenerated_to_sgd": True, "adam_debias": True}
    weight, grad = torch.ones(5, 8), torch.full((5, 8), 1000.0)
    theirs, mine = Parameter(weight.clone()), Parameter(weight.clone())
    run = peer("pytorch_optimizer.Lamb")([theirs], lr=1e-6, **options)
    take_steps(run, theirs, grad)
    ratio = float(run.state[theirs]["trust_ratio"])
    assert ratio == pytest.approx(1.0, abs=1e-3), CHANGED  # ||w|| / ||m|| is 0.01
    optimizer = date_optim.LAMB([mine], lr=1e-6)
    take_steps(optimizer, mine, 2 * grad)
    (layer,) = optimizer.read_telemetry().values()
    assert layer.measured_norm == pytest.approx(math.sqrt(40), rel=1e-6)  # of the signs
