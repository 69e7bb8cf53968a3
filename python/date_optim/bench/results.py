"""Results as files, complete after every case."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from .measure import Row

RAW = ("cold_us", "warm_us", "host_us")
"""Every turn's time: in the JSON alone."""


def results_name(bars: bool, sweep: str | None) -> str:
    """Return the name of a run's files without their ending."""
    return "bars" if bars else f"bench-{sweep}" if sweep else "bench"


def save(folder: Path, name: str, about: dict[str, Any], rows: list[Row]) -> None:
    """Leave ``<name>.json`` and ``<name>.csv``; a file is either the old one or the new one.

    Parameters
    ----------
    folder : Path
        Made where it is not there.
    name : str
        The files' name without its ending.
    about : dict
        What holds for all rows: machine, versions, command.
    rows : list of dict
    """
    folder.mkdir(parents=True, exist_ok=True)
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in RAW]
    partial = folder / f"{name}.partial"
    with partial.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    partial.replace(folder / f"{name}.csv")
    partial.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / f"{name}.json")
