"""Writes the tables of README.md and docs/performance.md from bench/results/*.json.

    python bench/report.py

A page says where a table goes, ``<!-- results: NAME -->`` to ``<!-- end of NAME -->``; the rest of
it is written by hand. tests/test_docs.py holds the pages to the results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs/performance.md")
RESULTS = ROOT / "bench/results"

Document = dict[str, Any]


def documents(key: str) -> Iterator[Document]:
    """Return the results of one of the three programs, by what only its files say."""
    for path in sorted(RESULTS.glob("*.json")):
        document: Document = json.loads(path.read_text(encoding="utf-8"))
        if key in document:
            yield document


BY_COMMAND = "machine"  # python -m date_optim.bench
BY_GPU = "multiprocessors"  # bench/gpu.py
BY_HOST = "tensors_on"  # bench/host.py


def table(columns: list[str], left: int, rows: list[list[str]]) -> str:
    """Return a table whose first columns, `left` of them, are words."""
    rule = ["---"] * left + ["---:"] * (len(columns) - left)
    lines = [f"| {' | '.join(columns)} |", f"|{'|'.join(rule)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def gpu_summary() -> str:
    """Microseconds of the README's rules, a line for each device and model."""
    shown = [("momentum", name) for name in ("torch fused", "ours", "ours, LARS")]
    shown += [("adam", name) for name in ("torch fused", "ours", "ours, LAMB")]
    rows = []
    for document in documents(BY_GPU):
        times = {(x["model"], x["rule"], x["contestant"]): x["us_p50"] for x in document["rows"]}
        for model in ("resnet50", "bert-large", "llama-1b"):
            cells = [f"{times[(model, *column)]:.0f}" for column in shown]
            rows.append([document["device"], model, *cells])
    columns = [
        "device",
        "shapes",
        "SGD, torch",
        "momentum",
        "LARS",
        "AdamW, torch",
        "AdamW",
        "LAMB",
    ]
    return table(columns, 2, rows)


def cpu_summary() -> str:
    """Milliseconds of every contestant on the CPU, or why it was not measured."""
    parts = []
    for document in documents(BY_COMMAND):
        rows = []
        for row in document["rows"]:
            if "status" not in row or row["device"] != "cpu" or row["sweep"]:
                continue  # a bar, or of another table
            if row["status"] != "measured":
                head = [row["model"], row["rule"], f"{row['contestant']}: {row['status']}"]
                rows.append([*head, *[""] * 8])
                continue
            low, high = row["of_baseline_low"], row["of_baseline_high"]
            rows.append(
                [
                    *(row["model"], row["rule"], row["contestant"]),
                    *(f"{row[f'cold_us_{p}'] / 1e3:.1f}" for p in ("p50", "p20", "p80")),
                    f"{row['warm_us_p50'] / 1e3:.1f}",
                    f"{row['gb_per_s']:.1f}",
                    f"{row['of_copy']:.0%}",
                    "" if low is None else f"{row['of_baseline']:.2f} [{low:.2f}, {high:.2f}]",
                    row["baseline"] or "",
                ]
            )
        if rows:
            columns = ["shapes", "rule", "contestant", "cold ms", "p20", "p80", "warm ms"]
            columns += ["GB/s", "of copy", "ratio", "to"]
            machine, versions = document["machine"], document["versions"]
            said = (
                f"{machine['processor']}, {machine['cores']} cores, torch {versions['torch']}, "
                f"commit {document['commit']}: `{document['command']}`"
            )
            parts.append(f"{said}\n\n{table(columns, 3, rows)}")
    return "\n\n".join(parts) or "No run on a CPU is committed yet."


def gpu_details() -> str:
    """Every row of bench/gpu.py."""
    parts = []
    for document in documents(BY_GPU):
        rows = [
            [
                *(row["model"], row["rule"], row["contestant"]),
                *(f"{row[f'us_{p}']:.0f}" for p in ("p50", "p20", "p80")),
                f"{row['host_us_p50']:.0f}",
                f"{row['gb_per_s']:.0f}",
                f"{row['of_copy']:.0%}",
                f"{row['of_torch_fused']:.2f}",
            ]
            for row in document["rows"]
        ]
        columns = ["shapes", "rule", "contestant", "us", "p20", "p80", "host us", "GB/s"]
        columns += ["of copy", "of torch fused"]
        said = (
            f"{document['device']}, copy {document['copy_gb_per_s']:.0f} GB/s, torch "
            f"{document['torch']}, triton {document['triton']}, commit {document['commit']}: "
            f"`{document['command']}`"
        )
        parts.append(f"{said}\n\n{table(columns, 3, rows)}")
    return "\n\n".join(parts)


def host_details() -> str:
    """Every row of bench/host.py."""
    parts = []
    for document in documents(BY_HOST):
        rows = [
            [
                *(row["model"], row["rule"], row["contestant"], row["step"]),
                *(f"{row[f'us_{p}']:.0f}" for p in ("p50", "p20", "p80")),
                f"{row['bar_us']:.0f}",
                f"{row['of_torch_fused']:.2f}",
            ]
            for row in document["rows"]
        ]
        columns = ["shapes", "rule", "contestant", "step", "us", "p20", "p80", "bar us"]
        said = (
            f"{document['processor']}, torch {document['torch']}, commit {document['commit']}: "
            f"`{document['command']}`"
        )
        parts.append(f"{said}\n\n{table([*columns, 'of torch fused'], 4, rows)}")
    return "\n\n".join(parts)


BLOCKS: dict[str, Callable[[], str]] = {
    "gpu": gpu_summary,
    "cpu": cpu_summary,
    "gpu, all": gpu_details,
    "host": host_details,
}
BLOCK = re.compile(r"(<!-- results: (.+?) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)


def filled(page: str, blocks: Mapping[str, Callable[[], str]] = BLOCKS) -> str:
    """Return a page's text with its tables made anew."""
    return BLOCK.sub(lambda found: f"{found[1]}{blocks[found[2]]()}\n{found[3]}", page)


def main() -> None:
    """Write the pages."""
    for path in PAGES:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
