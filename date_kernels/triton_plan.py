"""The plan of a step on a GPU: tables in device memory, and one launch of the Triton engine.

Note [What travels]. Tables of what rarely changes (items, layers) are uploaded when a plan is
built. Gradient addresses and hyper-parameters stand in one array of words, uploaded when they
differ from the last step's. Each upload fills pinned memory of its own from torch's caching
allocator, which hands it out again only once the copy has been made: the caller never waits, and
no copy reads what the next step writes.

Note [Captured steps]. A CUDA graph replays its uploads with the words of the captured step. They
have device memory of their own, so that steps outside the graph cannot change them, and the plan
keeps both alive. A learning rate that changes between replays is a tensor on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from .items import LEAF, Kind, build_items, check_order
from .layers import (
    CPU,
    HALF,
    Call,
    States,
    check_layers,
    check_layout,
    name_in,
)
from .options import Group
from .plan import (
    Options,
    check_groups,
    check_scale,
    differ_in_rates_alone,
    find_rule,
    structure_of,
)
from .reference import Telemetry
from .rules import is_measured
from .tables import TYPES, layer_table, table_of_rows
from .triton_engine import (
    CLOCK,
    COMMON,
    COMMON_FIELDS,
    FOUND,
    FOUND_ADDRESS,
    HEADER,
    ITEM,
    LINE,
    MAX_NORM,
    ONE,
    REPORT,
    SCALE,
    SCALE_ADDRESS,
    SIZE,
    SKIPS,
    layerwise_step,
)
from .triton_rules import TRITON_RULES, TritonRule
from .watch import Watch, make_watch

# Measured on an H100 (us, cold: LARS and LAMB on ResNet-50's shapes, then BERT-large's).

CHUNK = 8192
"""Elements of an item; 16,384 costs 2 to 5%."""

LAG = 3 << 20
"""Elements between a layer's last MEASURE and its first UPDATE: some rounds of all workers, and few
enough to stay in L2. A third of it: LARS 255 instead of 233 on ResNet-50, 3266 instead of 3054."""

WARPS = 8
REGISTERS = 128
PROGRAMS = 2
"""Two programs of 256 threads share a multiprocessor's 65,536 registers. Three of 80 spill: LARS
250
instead of 252, LAMB 401 instead of 378; four of 64: 281 and 465."""

_TRITON_TYPES = (tl.float32, tl.float64, tl.bfloat16, tl.float16)

Pair = tuple[torch.dtype, torch.dtype]


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors in the CPU's memory."""
    return bool(triton.knobs.runtime.interpret)


class DeviceTelemetry(Telemetry):
    """What a step on a device found out; the first look at it waits for the device."""

    def __init__(self, read: Callable[[], dict[str, Any]]) -> None:
        object.__setattr__(self, "_read", read)

    @property
    def is_known(self) -> bool:
        """Whether it has been read."""
        return "ratio" in self.__dict__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        self.__dict__.update(self._read())
        return self.__dict__[name]


@dataclass
class _Launch:
    """The items of one (parameter, gradient) pair of dtypes, or the SCANs of all."""

    pair: Pair | None
    items: Tensor
    scans: int
    judged: bool
    first: int  # of the pair's layers, which stand together
    layers: int


@dataclass
class _Built:
    """Tables in device memory for the tensors and options they were built for."""

    watch: Watch
    layers: Tensor
    launches: list[_Launch]
    order: NDArray[np.int64]  # the layers of a call, as the tables have them
    layer_options: list[tuple[int, bool]]
    words: Tensor
    workspace: dict[str, Tensor]
    uses: int  # a bit for each state that any layer uses
    clips: bool
    skips: bool
    rows: tuple[Options, NDArray[np.int64]] | None = None  # of these options
    last: NDArray[np.int64] | None = None  # the words as they stand on the device


class TritonPlan:
    """One optimizer's steps on a GPU, kept from step to step; see `date_kernels.plan.Plan`.

    Parameters
    ----------
    rule : str
        A family of `date_kernels.rules.RULES`.
    chunk, lag : int
        See `date_kernels.items.build_items`.
    order : callable, optional
        Permutes an item list: every order that `check_order` accepts gives the same bits.

    Attributes
    ----------
    builds : int
        How often it was built.
    """

    def __init__(
        self,
        rule: str,
        *,
        chunk: int = CHUNK,
        lag: int = LAG,
        order: Callable[[NDArray[np.int64]], NDArray[np.int64]] | None = None,
    ) -> None:
        self.rule = find_rule(rule)
        self.builds = 0
        self._functions = TRITON_RULES[rule]
        # Of a row of options; even, so that what stands behind any number of rows is aligned alike
        # and Triton compiles once.
        self._width = -(-(COMMON.value + len(self._functions.fields)) // 2) * 2
        self._chunk = chunk
        self._lag = lag
        self._order = order
        self._options: Options | None = None
        self._signature: tuple[Any, ...] | None = None
        self._built: _Built | None = None
        self._captured: list[Any] = []

    def step(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: States,
        steps: Sequence[Tensor | None],
        groups: Sequence[Group],
        *,
        grad_scale: Tensor | float | None = None,
        found_inf: Tensor | float | None = None,
        name_of: Callable[[int], str] | None = None,
    ) -> Telemetry:
        """Take one step in place; see `date_kernels.step`."""
        groups = [self.rule.complete(group, rate_on_device=True) for group in groups]
        options = [self.rule.values(group) for group in groups]
        if options != self._options:
            rates_alone = differ_in_rates_alone(options, self._options)
            check_groups(self.rule, groups, rates_alone=rates_alone)
        call = Call(params, grads, states, steps, groups)
        built = self._fitting(call, found_inf is not None, name_of)
        self._options = options
        if not params:
            return _telemetry(built)
        device = params[0].device
        scale_address, scale, scale_tensor = _number(grad_scale, device, 1.0)
        if scale_tensor is None:
            scale = check_scale(scale)
        found_address, found, found_tensor = _number(found_inf, device, 0.0)
        gradients = built.watch.gradients[built.order]
        if not gradients.all():  # an empty layer, or a gradient that has lost its memory
            check_layers(self.rule, call, name_of, device)
        if built.rows is None or built.rows[0] != options:
            built.rows = options, self._rows(built, groups)
        max_norm = groups[0]["max_grad_norm"] if built.clips else math.inf
        header = _header((scale_address, found_address), (scale, found, max_norm), built.skips)
        words = np.concatenate((header, built.rows[1], gradients))
        with _on(device):
            self._upload(built, words)
            for launch in built.launches:
                self._launch(built, launch)
        for tensor in (scale_tensor, found_tensor):
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(device))
        torch.autograd.graph.increment_version(built.watch.written)
        return _telemetry(built)

    def _fitting(
        self, call: Call, found_inf_given: bool, name_of: Callable[[int], str] | None
    ) -> _Built:
        """The plan of before where it still fits, else a new one."""
        signature = (structure_of(self.rule, call), found_inf_given)
        if self._built is None or signature != self._signature or not self._built.watch.fits(call):
            self._built = None
            self._built = self._build(call, found_inf_given, name_of)
            self._signature = signature
        return self._built

    def _build(
        self, call: Call, found_inf_given: bool, name_of: Callable[[int], str] | None
    ) -> _Built:
        device = call.params[0].device if call.params else CPU
        if call.params and (device.type == "cuda") == interpreted():
            where = "interprets kernels on the CPU" if interpreted() else "needs a GPU"
            raise RuntimeError(
                f"{name_in(name_of, 0)} is on {device}, but Triton {where}; move the parameters, "
                "or let the backend follow them"
            )
        of_layer = check_layers(self.rule, call, name_of, device)
        check_layout(self.rule, call, name_of)
        params, grads, _, _, groups = call
        pairs = [(p.dtype, g.dtype) for p, g in zip(params, grads, strict=True)]
        distinct = list(dict.fromkeys(pairs))
        order = sorted(range(len(params)), key=lambda i: distinct.index(pairs[i]))
        layer_options = list(dict.fromkeys(of_layer))
        table = layer_table(self.rule, call, of_layer, chunk=self._chunk, order=order)
        sizes = table[:, SIZE.value]
        clips = bool(groups) and groups[0]["max_grad_norm"] is not None
        skips = bool(groups) and groups[0]["on_nonfinite"] == "skip"
        measured = [is_measured(groups[of_layer[i][0]], of_layer[i][1]) for i in order]
        scan = clips or (skips and not found_inf_given)
        counts = [(pair, pairs.count(pair)) for pair in distinct]
        n_words = HEADER.value + len(layer_options) * self._width + len(params)
        self.builds += 1
        return _Built(
            watch=make_watch(call),
            layers=_upload(table, device),
            launches=self._launches(sizes.tolist(), measured, counts, scan, device),
            order=np.array(order, dtype=np.int64),
            layer_options=layer_options,
            words=torch.empty(n_words, dtype=torch.int64, device=device),
            workspace=_workspace(len(params), int((-(-sizes // LEAF)).sum()), device),
            uses=sum(
                1 << bit
                for bit, key in enumerate(self.rule.states)
                if any(key in self.rule.used(group) for group in groups)
            ),
            clips=clips,
            skips=found_inf_given or skips,
        )

    def _launches(
        self,
        sizes: list[int],
        measured: list[bool],
        counts: list[tuple[Pair, int]],
        scan: bool,
        device: torch.device,
    ) -> list[_Launch]:
        """One launch for each pair; before several pairs one that scans them all."""
        launches: list[_Launch] = []
        apart = scan and len(counts) > 1
        if apart:
            every = build_items(sizes, [False] * len(sizes), scan=True, chunk=self._chunk)
            scans = every[every[:, 3] == Kind.SCAN]
            launches.append(_Launch(None, self._items(scans, 0, device), len(scans), False, 0, 0))
        first = 0
        for pair, count in counts:
            items = build_items(
                sizes[first : first + count],
                measured[first : first + count],
                scan=scan and not apart,
                chunk=self._chunk,
                whole=LEAF,
                lag=self._lag,
            )
            n_scans = int((items[:, 3] == Kind.SCAN).sum())
            table = self._items(items, first, device)
            launches.append(_Launch(pair, table, n_scans, apart, first, count))
            first += count
        return launches

    def _items(self, items: NDArray[np.int64], first: int, device: torch.device) -> Tensor:
        if self._order is not None:
            built = items
            items = self._order(built)
            if sorted(map(tuple, items)) != sorted(map(tuple, built)):
                raise ValueError("an order may neither add nor drop items")
        check_order(items)
        table = np.empty((len(items), ITEM.value), dtype=np.int32)
        table[:, 0] = items[:, 0] // LEAF
        table[:, 1] = -(-(items[:, 1] - items[:, 0]) // LEAF)
        table[:, 2] = items[:, 2] + first
        table[:, 3] = items[:, 3]
        return _upload(table, device)

    def _rows(self, built: _Built, groups: Sequence[Group]) -> NDArray[np.int64]:
        """The rows of options, one after the other."""
        fields = (*COMMON_FIELDS, *self._functions.fields)
        table = table_of_rows(self.rule, groups, built.layer_options, fields)
        rows = np.zeros((len(table), self._width))
        rows[:, : len(fields)] = table
        return rows.view(np.int64).ravel()

    def _upload(self, built: _Built, words: NDArray[np.int64]) -> None:
        """Note [What travels], Note [Captured steps]."""
        if built.words.is_cuda and torch.cuda.is_current_stream_capturing():
            staging = torch.from_numpy(words).pin_memory()
            built.words = torch.empty_like(built.words)
            built.last = None
            built.words.copy_(staging, non_blocking=True)
            self._captured.append((staging, built.words, built))
        elif built.last is None or not np.array_equal(words, built.last):
            if any(built.words is words_of for _, words_of, _ in self._captured):
                built.words = torch.empty_like(built.words)
            built.words.copy_(_pinned(words, built.words.device), non_blocking=True)
            built.last = words

    def _launch(self, built: _Built, launch: _Launch) -> None:
        n_items = launch.items.shape[0]
        if n_items == 0:
            return
        functions = self._functions
        rows = HEADER.value + len(built.layer_options) * self._width
        work = built.workspace
        args = (
            launch.items,
            n_items,
            launch.scans,
            int(launch.judged),
            built.layers,
            launch.first,
            launch.layers,
            built.words,
            built.words.view(torch.float64),
            built.words[rows:],
            self._width,
            work["slots"],
            work["slots"].numel() // 2,
            work["reports"],
            work["verdict"],
            work["arrived"],
            work["published"],
            work["clock"],
        )
        w, g = (None, None) if launch.pair is None else map(triton_type, launch.pair)
        constants = {
            "PREPARE": functions.prepare,
            "DIRECTION": functions.direction,
            "CONCLUDE": functions.conclude,
            "USES": built.uses,
            "W": w,
            "G": g,
            "T": tl.float64 if w == tl.float64 else tl.float32,
            "TILE": tile_of(functions, launch.pair),
        }
        if interpreted():
            layerwise_step[(2,)](*args, **constants)
            return
        properties = torch.cuda.get_device_properties(launch.items.device)
        programs = min(n_items, PROGRAMS * properties.multi_processor_count)
        layerwise_step[(programs,)](*args, **constants, **compile_options())


def tile_of(functions: TritonRule, pair: Pair | None) -> int:
    """Elements that a program holds at a time.

    A leaf of float32 where the rule's registers suffice: LARS 233 us instead of 252 on ResNet-50,
    3054 instead of 3269 on BERT-large; other rules would spill. 16-bit values take registers to
    convert, and float64 twice as many.
    """
    if pair is None or pair[0] in HALF:
        return LEAF // 2
    if pair[0] == torch.float64:
        return LEAF // 4
    return LEAF if functions.light else LEAF // 2


def triton_type(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a torch dtype."""
    return _TRITON_TYPES[TYPES.index(dtype)]


def compile_options() -> dict[str, Any]:
    """How the kernel is compiled: nothing fused, so that it rounds as ``csrc`` does."""
    options: dict[str, Any] = {"num_warps": WARPS, "enable_fp_fusion": False}
    if torch.version.cuda is not None:
        options["maxnreg"] = REGISTERS
    return options


def _header(
    addresses: tuple[int, int], numbers: tuple[float, float, float], skips: bool
) -> NDArray[np.int64]:
    """What stands in the words before the rows of options."""
    words = np.zeros(HEADER.value, dtype=np.int64)
    values = words.view(np.float64)
    words[SCALE_ADDRESS.value], words[FOUND_ADDRESS.value] = addresses
    values[SCALE.value], values[FOUND.value], values[MAX_NORM.value] = numbers
    words[SKIPS.value] = skips
    values[ONE.value] = 1.0
    return words


def _number(
    value: Tensor | float | None, device: torch.device, default: float
) -> tuple[int, float, Tensor | None]:
    """Where a kernel finds a number: an address on its device, or the value itself."""
    if value is None:
        return 0, default, None
    if isinstance(value, Tensor) and value.device.type != "cpu":
        tensor = value.to(device, torch.float32)
        return tensor.data_ptr(), default, tensor
    return 0, float(value), None


def _pinned(array: NDArray[Any], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _upload(array: NDArray[Any], device: torch.device) -> Tensor:
    return _pinned(array, device).to(device, non_blocking=True, copy=True)


def _workspace(n_layers: int, n_slots: int, device: torch.device) -> dict[str, Tensor]:
    """What kernels keep between items, and from launch to launch."""
    reports = np.tile([math.nan, math.nan, math.nan, 1.0, 0.0, 0.0], (n_layers, 1))
    return {
        "slots": torch.empty(2 * n_slots, dtype=torch.float64, device=device),
        "reports": _upload(reports, device),
        "verdict": _upload(np.array([math.nan, 1.0, 0.0]), device),
        "arrived": torch.zeros(n_layers, dtype=torch.int32, device=device),
        "published": torch.zeros(n_layers, dtype=torch.int32, device=device),
        "clock": torch.zeros(CLOCK.value * LINE.value, dtype=torch.int32, device=device),
    }


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
    else:
        yield


def _telemetry(built: _Built) -> DeviceTelemetry:
    def read() -> dict[str, Any]:
        table = built.workspace["reports"].cpu().numpy()
        reports = np.empty_like(table)
        reports[built.order] = table
        total_norm, clip, skip = built.workspace["verdict"].tolist()
        if skip:
            reports[:] = [math.nan, math.nan, math.nan, 1.0, 0.0, 1.0]
        names = ("weight_norm", "measured_norm", "raw_ratio", "ratio", "clamp")
        columns = dict(zip(names, reports.T.copy()[:5], strict=True))
        return {
            **columns,
            "skipped": reports[:, REPORT.value - 1] != 0,
            "total_norm": total_norm if built.clips else math.nan,
            "clip": clip if built.clips else 1.0,
        }

    return DeviceTelemetry(read)
