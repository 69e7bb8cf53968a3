"""Rows as tables on the terminal, and how far a run is."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .measure import Row
from .statistics import three_digits


def progress(console: Console) -> Progress:
    """Return a line that shows what is being measured; nothing of it stays."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def table_of(title: str, rows: Sequence[Row]) -> Table:
    """Return the rows of a case, or of a sweep and rule, as a table.

    Parameters
    ----------
    title : str
    rows : sequence of dict
        As `date_optim.bench.measure` makes them.
    """
    varying = [key for key in ("model", "threads") if len({row[key] for row in rows}) > 1]
    on_gpu = any(row["device"] == "cuda" for row in rows)
    baseline = next((row["baseline"] for row in rows if row.get("baseline")), "baseline")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for key in varying:
        table.add_column("shapes" if key == "model" else key)
    table.add_column("contestant", min_width=24, overflow="fold")
    gpu = ["host us", "launches"] if on_gpu else []
    of = f"of {baseline}"
    for column in ("cold ms", "p20 - p80", "warm ms", *gpu, "GB/s", "copy", "5 str.", of, "MB"):
        table.add_column(column, justify="right")
    for row in rows:
        said = Text(row["contestant"], style="bold" if row["ours"] else "")
        remark = row["note"] if row["status"] == "measured" else row["status"]
        if remark:
            said.append(f"\n{remark}", style="dim")
        table.add_row(
            *(str(row[key]) for key in varying),
            said,
            *(_cells(row) if row["status"] == "measured" else []),
        )
    table.caption = (
        "GB/s: of the bytes that the rule needs; beside a large copy's and five streams' rates. "
        "[]: 95% interval of the median ratio. MB: what a step allocates."
    )
    return table


def _cells(row: Row) -> list[str]:
    middle, low, high = (row[f"of_baseline{end}"] for end in ("", "_low", "_high"))
    on_gpu = row["device"] == "cuda"
    return [
        three_digits(row["cold_us_p50"] / 1e3),
        " - ".join(three_digits(row[f"cold_us_{p}"] / 1e3) for p in ("p20", "p80")),
        three_digits(row["warm_us_p50"] / 1e3),
        *([f"{row['host_us_p50']:.0f}", str(row["launches"])] if on_gpu else []),
        three_digits(row["gb_per_s"]),
        f"{row['of_copy']:.0%}",
        f"{row['of_five_streams']:.0%}",
        "" if middle is None else f"{middle:.2f} [{low:.2f}, {high:.2f}]",
        f"{row['peak_bytes'] / 1e6:.1f}",
    ]


def scaling_table(rows: Sequence[Row]) -> Table:
    """Return a sweep over threads as speeds over the first row's, beside those of the memory."""
    first = {row["contestant"]: row for row in reversed(rows) if row["status"] == "measured"}
    table = Table(title="speed over 1 thread", title_justify="left", box=SIMPLE_HEAD)
    for column in ("threads", "contestant", "step", "copy", "five streams"):
        table.add_column(column, justify="left" if column == "contestant" else "right")
    for row in rows:
        if row["threads"] > 1 and row["status"] == "measured":
            alone = first[row["contestant"]]
            table.add_row(
                str(row["threads"]),
                row["contestant"],
                f"{alone['cold_us_p50'] / row['cold_us_p50']:.2f}",
                f"{row['copy_gb_per_s'] / alone['copy_gb_per_s']:.2f}",
                f"{row['five_streams_gb_per_s'] / alone['five_streams_gb_per_s']:.2f}",
            )
    return table
