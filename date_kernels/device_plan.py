"""The plan of a step on a GPU: tables in device memory, and launches over them.

Note [What travels]. Tables of what rarely changes (items, layers) are uploaded when a plan is
built. Gradient addresses and hyper-parameters stand in one array of words, uploaded when they
differ from the last step's, or carried by the launch itself where the backend's launches carry so
many. Each upload fills pinned memory of its own from torch's caching
allocator, which hands it out again only once the copy has been made: the caller never waits, and
no copy reads what the next step writes.

Note [Captured steps]. A CUDA graph replays its uploads with the words of the captured step. They
have device memory of their own, so that steps outside the graph cannot change them, and the plan
keeps both alive. Words that a launch carries are written anew by every launch, replayed or not. A
learning rate that changes between replays is a tensor on the device.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .host_copy import HostCopy
from .items import LEAF, Kind, build_items, check_order
from .layers import CPU, Call, check_layers, check_layout, name_in, state_dtype
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
from .stepper import Request, Stepper
from .tables import SIZE, layer_table, table_of_rows
from .watch import Watch, make_watch

# Measured on an H100 (us, cold: LARS and LAMB on ResNet-50's shapes, then BERT-large's; Triton).

CHUNK = 8192
"""Elements of an item; 16,384 costs 2 to 5%."""

LAG = 3 << 20
"""Elements between a layer's last MEASURE and its first UPDATE: some rounds of all workers, and few
enough to stay in L2. A third of it: LARS 255 instead of 233 on ResNet-50, 3266 instead of 3054."""

CLOCK = 160
"""Words of 32 bits that hold either engine's clock."""

Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype]
"""Of parameters, gradients and states: what a launch is compiled for."""


class Scalars(NamedTuple):
    """Numbers of a step; an address that is not 0 comes before the value."""

    scale_address: int
    scale: float
    found_address: int
    found: float
    max_norm: float


class DeviceTelemetry(Telemetry):
    """What a step on a device found out; the first look at it waits for the device.

    Parameters
    ----------
    source : Tensor
        The device's numbers, which the next step overwrites.
    columns : callable
        Makes the attributes from them.
    """

    def __init__(
        self, source: Tensor, columns: Callable[[NDArray[np.float64]], dict[str, Any]]
    ) -> None:
        self.__dict__.update(_source=source, _columns=columns, _copy=None)

    @property
    def is_known(self) -> bool:
        """Whether it has been read."""
        return "ratio" in self.__dict__

    @property
    def has_arrived(self) -> bool:
        """Whether a look at it waits for nothing, after `start_copy`."""
        return self._copy is not None and self._copy.has_arrived

    def start_copy(self) -> None:
        """Have the device send it, in one copy; nobody waits."""
        if self._copy is None:
            self.__dict__["_copy"] = HostCopy(self._source)

    def again(self) -> DeviceTelemetry:
        """The device's numbers anew: no replay of a step tells the host."""
        return DeviceTelemetry(self._source, self._columns)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        self.start_copy()
        self.__dict__.update(self._columns(self._copy.numpy()))
        return self.__dict__[name]


@dataclass
class Launch:
    """The items of the layers of one `Dtypes`, or the SCANs of all."""

    dtypes: Dtypes | None
    items: Tensor
    scans: int
    judged: bool
    first: int  # of the layers, which stand together
    layers: int


@dataclass
class Built:
    """Tables in device memory for the tensors and options they were built for."""

    watch: Watch
    layers: Tensor
    launches: list[Launch]
    order: NDArray[np.int64]  # the layers of a call, as the tables have them
    layer_options: list[tuple[int, bool]]
    words: Tensor
    workspace: dict[str, Tensor]
    uses: int  # a bit for each state that any layer uses
    clips: bool
    skips: bool
    rows: tuple[Options, NDArray[np.int64]] | None = None  # of these options
    last: NDArray[np.int64] | None = None  # the words as they were uploaded


class DevicePlan(Stepper):
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

    _n_header = 0
    """Words before the rows of options."""

    _row_multiple = 1
    """What a row's words are filled up to a multiple of."""

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
        self._chunk = chunk
        self._lag = lag
        self._order = order
        self._options: Options | None = None
        self._signature: tuple[Any, ...] | None = None
        self._built: Built | None = None
        self._captured: list[Any] = []
        self._fields = self._fields_of(rule)
        self._width = -(-len(self._fields) // self._row_multiple) * self._row_multiple

    def take(self, request: Request) -> Telemetry:
        """Take one step in place; see `date_kernels.step`."""
        (params, grads, states, steps, groups), grad_scale, found_inf, name_of = request
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
            built.rows = options, self._rows(groups, built.layer_options)
        max_norm = groups[0]["max_grad_norm"] if built.clips else math.inf
        scalars = Scalars(scale_address, scale, found_address, found, max_norm)
        words = np.concatenate((self._header(built, scalars), built.rows[1], gradients))
        with _on(device):
            self._send(built, words)
            for launch in built.launches:
                self._launch(built, launch, scalars, words)
        for tensor in (scale_tensor, found_tensor):
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(device))
        torch.autograd.graph.increment_version(built.watch.written)
        return _telemetry(built)

    def _fitting(
        self, call: Call, found_inf_given: bool, name_of: Callable[[int], str] | None
    ) -> Built:
        """The plan of before where it still fits, else a new one."""
        signature = (structure_of(self.rule, call), found_inf_given)
        if self._built is None or signature != self._signature or not self._built.watch.fits(call):
            self._built = None
            self._built = self._build(call, found_inf_given, name_of)
            self._signature = signature
        return self._built

    def _build(
        self, call: Call, found_inf_given: bool, name_of: Callable[[int], str] | None
    ) -> Built:
        device = call.params[0].device if call.params else CPU
        if call.params:
            self._check_device(device, name_in(name_of, 0))
        of_layer = check_layers(self.rule, call, name_of, device)
        check_layout(self.rule, call, name_of)
        params, grads, _, _, groups = call
        dtypes = [
            (param.dtype, grad.dtype, state_dtype(groups[number], param))
            for param, grad, (number, _) in zip(params, grads, of_layer, strict=True)
        ]
        distinct = list(dict.fromkeys(dtypes))
        order = sorted(range(len(params)), key=lambda i: distinct.index(dtypes[i]))
        layer_options = list(dict.fromkeys(of_layer))
        table = layer_table(self.rule, call, of_layer, chunk=self._chunk, order=order)
        sizes = table[:, SIZE]
        clips = bool(groups) and groups[0]["max_grad_norm"] is not None
        skips = bool(groups) and groups[0]["on_nonfinite"] == "skip"
        measured = [is_measured(groups[of_layer[i][0]], of_layer[i][1]) for i in order]
        scan = clips or (skips and not found_inf_given)
        counts = [(each, dtypes.count(each)) for each in distinct]
        n_words = self._n_header + len(layer_options) * self._width + len(params)
        self.builds += 1
        return Built(
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
        counts: list[tuple[Dtypes, int]],
        scan: bool,
        device: torch.device,
    ) -> list[Launch]:
        """One launch for each of the dtypes; before several one that scans them all."""
        launches: list[Launch] = []
        apart = scan and len(counts) > 1
        if apart:
            every = build_items(sizes, [False] * len(sizes), scan=True, chunk=self._chunk)
            scans = every[every[:, 3] == Kind.SCAN]
            launches.append(Launch(None, self._items(scans, 0, device), len(scans), False, 0, 0))
        first = 0
        for dtypes, count in counts:
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
            launches.append(Launch(dtypes, table, n_scans, apart, first, count))
            first += count
        return launches

    def _items(self, items: NDArray[np.int64], first: int, device: torch.device) -> Tensor:
        if self._order is not None:
            built = items
            items = self._order(built)
            if sorted(map(tuple, items)) != sorted(map(tuple, built)):
                raise ValueError("an order may neither add nor drop items")
        check_order(items)
        return _upload(self._item_table(items, first), device)

    def _rows(
        self, groups: Sequence[Group], layer_options: Sequence[tuple[int, bool]]
    ) -> NDArray[np.int64]:
        """The rows of options, one after the other."""
        table = table_of_rows(self.rule, groups, layer_options, self._fields)
        rows = np.zeros((len(table), self._width))
        rows[:, : len(self._fields)] = table
        return rows.view(np.int64).ravel()

    @abstractmethod
    def _fields_of(self, rule: str) -> Sequence[str]:
        """The names of a row's numbers, in the kernels' order."""

    @abstractmethod
    def _check_device(self, device: torch.device, name: str) -> None:
        """Refuse a device that the kernels do not run on; `name` is a parameter there."""

    @abstractmethod
    def _item_table(self, items: NDArray[np.int64], first: int) -> NDArray[Any]:
        """Items as kernels read them; `first` is the table's layer that they count from."""

    @abstractmethod
    def _header(self, built: Built, scalars: Scalars) -> NDArray[np.int64]:
        """What stands in the words before the rows of options."""

    @abstractmethod
    def _launch(
        self, built: Built, launch: Launch, scalars: Scalars, words: NDArray[np.int64]
    ) -> None:
        """Launch the kernel; nobody waits."""

    def _most_in_launch(self) -> int:
        """The most words that travel with a launch itself."""
        return 0

    def _send(self, built: Built, words: NDArray[np.int64]) -> None:
        """Note [What travels], Note [Captured steps]."""
        capturing = built.words.is_cuda and torch.cuda.is_current_stream_capturing()
        if words.size > self._most_in_launch():
            self._upload(built, words, capturing=capturing)
        else:
            built.last = None
            if capturing:
                self._captured.append((None, built.words, built))

    def _upload(self, built: Built, words: NDArray[np.int64], *, capturing: bool) -> None:
        if capturing:
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
    reports = np.tile([math.nan, math.nan, math.nan, 1.0, 0.0, 0.0], n_layers)
    # In one piece, which one copy brings to the host.
    telemetry = _upload(np.append(reports, [math.nan, 1.0, 0.0]), device)
    return {
        "slots": torch.empty(2 * n_slots, dtype=torch.float64, device=device),
        "telemetry": telemetry,
        "reports": telemetry[:-3].view(n_layers, 6),
        "verdict": telemetry[-3:],
        "arrived": torch.zeros(n_layers, dtype=torch.int32, device=device),
        "published": torch.zeros(n_layers, dtype=torch.int32, device=device),
        "clock": torch.zeros(CLOCK, dtype=torch.int32, device=device),
    }


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
    else:
        yield


def _telemetry(built: Built) -> DeviceTelemetry:
    def columns(numbers: NDArray[np.float64]) -> dict[str, Any]:
        table = numbers[:-3].reshape(-1, 6)
        reports = np.empty_like(table)
        reports[built.order] = table
        total_norm, clip, skip = numbers[-3:].tolist()
        if skip:
            reports[:] = [math.nan, math.nan, math.nan, 1.0, 0.0, 1.0]
        names = ("weight_norm", "measured_norm", "raw_ratio", "ratio", "clamp")
        return {
            **dict(zip(names, reports.T.copy()[:5], strict=True)),
            "skipped": reports[:, 5] != 0,
            "total_norm": total_norm if built.clips else math.nan,
            "clip": clip if built.clips else 1.0,
        }

    return DeviceTelemetry(built.workspace["telemetry"], columns)
