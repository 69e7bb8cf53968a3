"""Items: how layers are cut, and in which orders workers may claim the cuts."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LEAF = 4096
"""Elements of one partial sum (``csrc/plan.h``)."""


class Kind(enum.IntEnum):
    """The kinds of items (``csrc/plan.h``)."""

    PLAIN = 0
    WHOLE = 1
    MEASURE = 2
    SCAN = 3
    UPDATE = 4


def build_items(
    sizes: Sequence[int],
    measured: Sequence[bool],
    *,
    scan: bool,
    chunk: int,
    whole: int | None = None,
    lag: int | None = None,
) -> NDArray[np.int64]:
    """Cut layers into items.

    Parameters
    ----------
    sizes : sequence of int
        Elements of each layer.
    measured : sequence of bool
        Whether the layer's norms are taken.
    scan : bool
        Whether all gradients are looked at first.
    chunk : int
        Elements of an item: a power of two, at least one leaf.
    whole : int, optional
        Elements up to which a layer is one WHOLE item; a chunk by default.
    lag : int, optional
        Elements that other items visit between a layer's last MEASURE and its first UPDATE, so that
        nobody waits for a ratio that is still being worked out. Without it there are no UPDATEs:
        who measured a chunk updates it.

    Returns
    -------
    ndarray of int64, shape (items, 4)
        Rows (begin, end, layer, kind): all SCANs, then the layers in order, each layer's UPDATEs
        backwards, since what was measured last is in the cache.
    """
    if chunk < LEAF or chunk & (chunk - 1):
        raise ValueError(f"chunk must be a power of two of at least {LEAF}, not {chunk}")
    whole = chunk if whole is None else whole
    parts = [_cut(*layer, Kind.SCAN, chunk) for layer in enumerate(sizes)] if scan else []
    waiting: deque[tuple[int, int]] = deque()  # (layer, elements visited when it was measured)
    visited = 0
    for layer, size in enumerate(sizes):
        if not measured[layer] or size <= whole:
            kind = Kind.WHOLE if measured[layer] else Kind.PLAIN
            parts.append(_cut(layer, size, kind, max(chunk, size) if measured[layer] else chunk))
        else:
            parts.append(_cut(layer, size, Kind.MEASURE, chunk))
            if lag is not None:
                waiting.append((layer, visited + size))
        visited += size
        while waiting and lag is not None and visited - waiting[0][1] >= lag:
            ready, _ = waiting.popleft()
            parts.append(_cut(ready, sizes[ready], Kind.UPDATE, chunk)[::-1])
            visited += sizes[ready]
    parts += [_cut(layer, sizes[layer], Kind.UPDATE, chunk)[::-1] for layer, _ in waiting]
    return np.concatenate(parts) if parts else np.empty((0, 4), dtype=np.int64)


def _cut(layer: int, size: int, kind: Kind, chunk: int) -> NDArray[np.int64]:
    begin = np.arange(0, max(size, 1), chunk, dtype=np.int64)
    items = np.empty((len(begin), 4), dtype=np.int64)
    items[:, 0] = begin
    items[:, 1] = np.minimum(begin + chunk, size)
    items[:, 2] = layer
    items[:, 3] = kind
    return items


def check_order(items: NDArray[np.int64]) -> None:
    """Refuse an order in which an engine could wait for ever (``csrc/engine.h``).

    Where there are UPDATEs, each stands behind its layer's MEASUREs; where there are none, a
    layer's MEASUREs stand together.
    """
    layers, kinds = items[:, 2], items[:, 3]
    if np.any(np.diff((kinds == Kind.SCAN).astype(np.int8)) > 0):
        raise ValueError("every SCAN must stand before all other items")
    updates = kinds == Kind.UPDATE
    if not updates.any():
        others = layers[kinds != Kind.SCAN]
        runs = others[np.flatnonzero(np.diff(others, prepend=-1))]
        if len(runs) != len(np.unique(runs)):
            raise ValueError("a layer's items must stand together")
        return
    last = np.full(layers.max() + 1, -1)
    measures = np.flatnonzero(kinds == Kind.MEASURE)
    last[layers[measures]] = measures  # the last assignment stays
    if np.any(last[layers[updates]] > np.flatnonzero(updates)):
        raise ValueError("every UPDATE must stand behind its layer's MEASUREs")
