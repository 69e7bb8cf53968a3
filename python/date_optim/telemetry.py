"""What a step found out about its layers, and how trackers take it.

The kernels compute these numbers anyway. Reading them waits for the device and copies once; a step
whose numbers nobody reads waits for nothing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from date_kernels import Telemetry

    from .optimizer import LayerwiseOptimizer


@dataclass(frozen=True)
class LayerTelemetry:
    """What the last step found out about one layer.

    Attributes
    ----------
    weight_norm : float
        ``||w||`` before the step; NaN for a layer without trust, whose norms are not taken.
    measured_norm : float
        ``||g||``, ``||g + decay*w||`` with ``weight_decay="combined"``, or ``||u||`` with
        ``of="update"``; NaN as above.
    raw_ratio : float
        The trust ratio before its bounds; NaN as above.
    ratio : float
        The ratio applied; 1 for a layer without trust.
    clamp : int
        -1 where the lower bound was hit, 1 for the upper, 0 for neither.
    skipped : bool
        Whether the layer was left as it was, since its norm or a gradient was not finite.
    """

    weight_norm: float
    measured_norm: float
    raw_ratio: float
    ratio: float
    clamp: int
    skipped: bool

    @property
    def is_measured(self) -> bool:
        """Whether the layer has a trust ratio of its own, and one that is a number."""
        return not (self.skipped or math.isnan(self.raw_ratio))

    def scalars(self, name: str) -> dict[str, float]:
        """``ratio/<name>`` and the numbers behind it; nothing for a layer without its own ratio."""
        keys = ("ratio", "raw_ratio", "weight_norm", "measured_norm") if self.is_measured else ()
        return {f"{key}/{name}": getattr(self, key) for key in keys}


class Reading:
    """The numbers of one step on their way to the host; `LayerwiseOptimizer.start_reading`.

    Parameters
    ----------
    params : sequence of Tensor
        The layers of the step.
    telemetry : Telemetry, optional
        What it found out; None for a step without layers.
    names : callable
        Gives the layers' names by their ids.
    """

    def __init__(
        self,
        params: Sequence[torch.Tensor],
        telemetry: Telemetry | None,
        names: Callable[[], dict[int, str]],
    ) -> None:
        self._params = params
        self._names = names
        self.telemetry = telemetry
        if telemetry is not None:
            telemetry.start_copy()

    @property
    def has_arrived(self) -> bool:
        """Whether `layers` waits for nothing."""
        return self.telemetry is None or self.telemetry.has_arrived

    def layers(self) -> dict[str, LayerTelemetry]:
        """The numbers by the layer's name; waits for them."""
        names = self._names()
        return {names[key]: layer for key, layer in self.by_id().items() if key in names}

    def by_id(self) -> dict[int, LayerTelemetry]:
        """The numbers by the parameter's id; waits for them."""
        found = self.telemetry
        if found is None:
            return {}
        return {
            id(param): LayerTelemetry(
                weight_norm=float(found.weight_norm[i]),
                measured_norm=float(found.measured_norm[i]),
                raw_ratio=float(found.raw_ratio[i]),
                ratio=float(found.ratio[i]),
                clamp=int(found.clamp[i]),
                skipped=bool(found.skipped[i]),
            )
            for i, param in enumerate(self._params)
        }


class Arrivals:
    """The newest numbers that have arrived, of readings in the order of their steps."""

    def __init__(self) -> None:
        self._pending: list[Reading] = []
        self._started: Telemetry | None = None
        self._newest: dict[str, LayerTelemetry] = {}

    def newest(self, reading: Reading) -> dict[str, LayerTelemetry]:
        """Those of `reading` if they have arrived, else of the last one that has, else none."""
        if reading.telemetry is None or reading.telemetry is not self._started:
            self._pending.append(reading)
            self._started = reading.telemetry
        arrived = [index for index, other in enumerate(self._pending) if other.has_arrived]
        if arrived:
            self._newest = self._pending[arrived[-1]].layers()
            del self._pending[: arrived[-1] + 1]
        return dict(self._newest)


Layers = Mapping[str, LayerTelemetry]
"""By a layer's name, as `LayerwiseOptimizer.read_telemetry` returns it."""


def summarize(layers: Layers) -> dict[str, float]:
    """The ratios of all layers in a few numbers.

    Parameters
    ----------
    layers : mapping of str to LayerTelemetry

    Returns
    -------
    dict of str to float
        ``ratio_min``, ``ratio_median`` and ``ratio_max`` over the layers that have a ratio of their
        own, ``at_lower`` and ``at_upper``, the shares of those that hit a bound; ``nonfinite`` and
        ``skipped``, how many layers took a ratio that is NaN, and how many were left as they were.
        Without a layer that has a ratio it is these two.
    """
    measured = [layer for layer in layers.values() if layer.is_measured]
    counts = {
        "nonfinite": float(sum(math.isnan(layer.ratio) for layer in layers.values())),
        "skipped": float(sum(layer.skipped for layer in layers.values())),
    }
    if not measured:
        return counts
    ratios = [layer.ratio for layer in measured]
    return {
        "ratio_min": min(ratios),
        "ratio_median": median(ratios),
        "ratio_max": max(ratios),
        "at_lower": sum(layer.clamp < 0 for layer in measured) / len(measured),
        "at_upper": sum(layer.clamp > 0 for layer in measured) / len(measured),
        **counts,
    }


def scalars(layers: Layers, prefix: str = "trust/") -> dict[str, float]:
    """The summary and each layer's numbers in one flat dict, as ``wandb.log`` takes it.

    Parameters
    ----------
    layers : mapping of str to LayerTelemetry
    prefix : str
        Before every key.

    Returns
    -------
    dict of str to float
        `summarize`'s keys, and for each layer with a ratio of its own ``ratio/<name>``,
        ``raw_ratio/<name>``, ``weight_norm/<name>`` and ``measured_norm/<name>``.
    """
    found = summarize(layers)
    for name, layer in layers.items():
        found |= layer.scalars(name)
    return {prefix + key: value for key, value in found.items()}


class Writer(Protocol):
    """What is used of ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Write one number."""

    def add_histogram(self, tag: str, values: torch.Tensor, global_step: int) -> Any:
        """Write how numbers are spread."""


def write_tensorboard(writer: Writer, layers: Layers, step: int, prefix: str = "trust/") -> None:
    """Write `scalars`, and a histogram of the ratios, to TensorBoard.

    Parameters
    ----------
    writer : Writer
        A ``torch.utils.tensorboard.SummaryWriter``.
    layers : mapping of str to LayerTelemetry
    step : int
        The step that they are of.
    prefix : str
        Before every tag.
    """
    for tag, value in scalars(layers, prefix).items():
        writer.add_scalar(tag, value, step)
    ratios = [layer.ratio for layer in layers.values() if layer.is_measured]
    if ratios:
        writer.add_histogram(f"{prefix}ratio", torch.tensor(ratios), step)


class TelemetryLogger:
    """A step hook that reads the telemetry every so many steps.

    Parameters
    ----------
    write : callable
        ``write(layers, step)``, with what `LayerwiseOptimizer.read_telemetry` returns and the
        number of the step, from 1.
    every : int
        Steps from one reading to the next; the first step is read, too.
    wait : bool
        Wait for a GPU to have finished a step that is read. If not, its row is written, with the
        number of its own step, by the first call that finds it finished; `flush` writes what is
        left after the last step.

    Raises
    ------
    ValueError
        Where `every` is not at least 1.

    Notes
    -----
    Where it reads a step that changed nothing at all, after an infinite gradient say, that is not
    written and does not count; with ``wait=False`` it counts, since later steps are numbered before
    that is known. Steps between readings count, whatever they did.

    Examples
    --------
    >>> import torch, date_optim
    >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> opt = date_optim.SGD([("w", w)], lr=0.1, trust=date_optim.TrustRatio())
    >>> log = lambda layers, step: print(step, layers["w"].raw_ratio)
    >>> hook = opt.register_step_post_hook(date_optim.TelemetryLogger(log, every=2))
    >>> for _ in range(3):
    ...     w.grad = w.detach().clone()
    ...     opt.step()
    1 1.0
    3 1.0
    """

    def __init__(
        self, write: Callable[[Layers, int], object], every: int = 1, wait: bool = True
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, not {every}")
        self.write = write
        self.every = every
        self.wait = wait
        self.steps = 0
        self._pending: deque[tuple[int, Reading]] = deque()

    def __call__(self, optimizer: LayerwiseOptimizer, args: Any = (), kwargs: Any = None) -> None:
        """See ``torch.optim.Optimizer.register_step_post_hook``."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "torch.compile traces the hooks of a step once and for all: call a TelemetryLogger "
                "with the optimizer after each compiled step instead"
            )
        self.steps += 1
        if (self.steps - 1) % self.every == 0:
            self._pending.append((self.steps, optimizer.start_reading()))
        while self._pending and (self.wait or self._pending[0][1].has_arrived):
            self._write_first()

    def flush(self) -> None:
        """Write what is on its way; waits for a GPU."""
        while self._pending:
            self._write_first()

    def _write_first(self) -> None:
        step, reading = self._pending.popleft()
        layers = reading.layers()
        if not all(layer.skipped for layer in layers.values()):
            self.write(layers, step)
        elif self.wait:
            self.steps -= 1
