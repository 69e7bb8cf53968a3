"""Plots of rows: time by model, rate by size, time by number of tensors, speed by threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .measure import Row
from .statistics import three_digits

_OURS, _THEIRS = mpl.colormaps["viridis"], mpl.colormaps["autumn"]


def save_plots(folder: Path, name: str, rows: Sequence[Row]) -> list[Path]:
    """Draw what the rows of one run hold, a file for each device.

    Parameters
    ----------
    folder : Path
    name : str
        What the files' names begin with.
    rows : sequence of dict
        Those that were not measured are left out.

    Returns
    -------
    list of Path
    """
    measured = [row for row in rows if row["status"] == "measured"]
    saved = []
    for (device,), of in _groups(measured, "device").items():
        figure = _DRAWN[of[0]["sweep"]](of)
        FigureCanvasAgg(figure)
        path = folder / f"{name}-{device}.png"
        figure.savefig(path, dpi=120)
        saved.append(path)
    return saved


def _groups(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def _colours(rows: Sequence[Row]) -> dict[str, Any]:
    """Ours are blue to green, others red to yellow."""
    found: dict[str, Any] = {}
    for is_ours, colours in ((True, _OURS), (False, _THEIRS)):
        names = dict.fromkeys(row["contestant"] for row in rows if row["ours"] == is_ours)
        found |= {
            name: colours(0.15 + 0.6 * i / max(len(names) - 1, 1)) for i, name in enumerate(names)
        }
    return found


def _time_by_model(rows: Sequence[Row]) -> Figure:
    """Bars of the cold step, a panel for each model and rule."""
    cases = _groups(rows, "rule", "model")
    height = 0.6 + sum(0.8 + 0.22 * len(of) for of in cases.values())
    figure = Figure(figsize=(8, height), layout="constrained")
    ratios = [1 + len(of) for of in cases.values()]
    axes = np.atleast_1d(np.asarray(figure.subplots(len(cases), 1, height_ratios=ratios)))
    colours = _colours(rows)
    for axis, ((rule, model), of) in zip(axes, cases.items(), strict=True):
        names = [row["contestant"] for row in of]
        middle = np.array([row["cold_us_p50"] for row in of]) / 1e3
        below = middle - np.array([row["cold_us_p20"] for row in of]) / 1e3
        above = np.array([row["cold_us_p80"] for row in of]) / 1e3 - middle
        axis.barh(names, middle, color=[colours[name] for name in names])
        axis.errorbar(middle, names, xerr=(below, above), fmt="none", ecolor="gray", elinewidth=1)
        for i, value in enumerate(middle):
            text, end = three_digits(value), (value + above[i], i)
            axis.annotate(text, end, (4, 0), textcoords="offset points", va="center", fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_title(f"{model}, {rule}", loc="left", fontsize=10)
        axis.set_xlabel("ms a step, cold caches (p20 to p80)", fontsize=8)
    return figure


_ROOFS = (("copy_gb_per_s", "copy", "--"), ("five_streams_gb_per_s", "five streams", ":"))
"""What a step's rate is beside: a row's key, its name and its line."""


def _by_rule(
    rows: Sequence[Row],
    key: str,
    value: Callable[[Row, Row], float],
    draw: Callable[[Any, Any], None],
) -> Figure:
    """A panel for each rule, a line for each contestant.

    Parameters
    ----------
    rows : sequence of dict
    key : str
        Of the row's number below.
    value : callable
        That above, from a row and the contestant's first.
    draw : callable
        Adds to a panel what else its rows say.
    """
    rules = _groups(rows, "rule")
    figure = Figure(figsize=(6 * len(rules), 4.5), layout="constrained")
    axes = np.atleast_1d(np.asarray(figure.subplots(1, len(rules))))
    colours = _colours(rows)
    for axis, ((rule,), of) in zip(axes, rules.items(), strict=True):
        axis.set(title=rule, xlabel=key)
        for (name,), line in _groups(of, "contestant").items():
            heights = [value(row, line[0]) for row in line]
            axis.plot([row[key] for row in line], heights, "o-", color=colours[name], label=name)
        draw(axis, of)
        axis.legend(fontsize=8)
    return figure


def _rate_by_size(rows: Sequence[Row]) -> Figure:
    def draw(axis: Any, of: Sequence[Row]) -> None:
        for key, label, style in _ROOFS:
            axis.axhline(max(row[key] for row in of), color="gray", linestyle=style, label=label)
        axis.set(xscale="log", yscale="log", ylabel="GB/s at model bytes, cold caches")

    return _by_rule(rows, "parameters", lambda row, _: float(row["gb_per_s"]), draw)


def _time_by_tensors(rows: Sequence[Row]) -> Figure:
    def draw(axis: Any, of: Sequence[Row]) -> None:
        axis.set(xscale="log", yscale="log", ylabel="ms, cold caches")
        axis.set_xlabel(f"tensors of {of[0]['parameters']:,} parameters together")

    return _by_rule(rows, "tensors", lambda row, _: row["cold_us_p50"] / 1e3, draw)


def _speed_by_threads(rows: Sequence[Row]) -> Figure:
    def draw(axis: Any, of: Sequence[Row]) -> None:
        line = next(iter(_groups(of, "contestant").values()))
        for key, label, style in _ROOFS:
            rates = [row[key] / line[0][key] for row in line]
            threads = [row["threads"] for row in line]
            axis.plot(threads, rates, style, color="gray", label=f"{label}'s rate")
        axis.set(title=f"{line[0]['model']}, {line[0]['rule']}", ylabel="speed over 1 thread")

    return _by_rule(rows, "threads", lambda row, one: one["cold_us_p50"] / row["cold_us_p50"], draw)


_DRAWN = {
    "": _time_by_model,
    "size": _rate_by_size,
    "tensors": _time_by_tensors,
    "threads": _speed_by_threads,
}
"""By sweep."""
