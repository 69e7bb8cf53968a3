"""Telemetry as lines of text: JSON lines, or a table of comma-separated values."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict, fields
from typing import TextIO

from .telemetry import Layers, LayerTelemetry, scalars


def write_jsonl(file: TextIO, layers: Layers, step: int) -> None:
    """Write a step as one line of JSON: ``"step"``, and what `scalars` has without a prefix.

    Parameters
    ----------
    file : text file
        Open for writing, or for appending.
    layers : mapping of str to LayerTelemetry
    step : int
        The step that they are of.

    Notes
    -----
    JSON has no word for what is not finite: it is null there.
    """
    numbers = {k: v if math.isfinite(v) else None for k, v in scalars(layers, prefix="").items()}
    file.write(json.dumps({"step": step, **numbers}) + "\n")


def write_csv(file: TextIO, layers: Layers, step: int) -> None:
    """Write a step as a line for each layer, with all of its numbers.

    Parameters
    ----------
    file : text file
        Open for writing, or for appending, with ``newline=""``, and no pipe: the names of the
        columns are written where it is empty.
    layers : mapping of str to LayerTelemetry
    step : int
        The step that they are of.
    """
    names = ["step", "layer", *(field.name for field in fields(LayerTelemetry))]
    table = csv.DictWriter(file, names)
    if file.tell() == 0:
        table.writeheader()
    for layer, numbers in layers.items():
        table.writerow({"step": step, "layer": layer, **asdict(numbers)})
