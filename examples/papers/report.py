"""Writes the tables of docs/papers.md and its pictures from docs/papers/*.json.

    python examples/papers/report.py

tests/test_papers.py holds the page to the results.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

from report import BLOCK, filled, table

from papers.studies import STUDIES

ROOT = Path(__file__).resolve().parents[2]
__all__ = ["BLOCK", "BLOCKS", "PAGE", "RESULTS", "filled", "load"]

PAGE = ROOT / "docs/papers.md"
RESULTS = ROOT / "docs/papers"


def load(name: str) -> dict[str, Any]:
    """Load a study's committed document."""
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return document


def block(name: str) -> str:
    """What a study's document says: on what it was measured, and its tables."""
    document = load(name)
    results = document["results"]

    def every(key: str) -> str:
        return ", ".join(sorted({each[key] for each in results}))

    hours = sum(each["seconds"] for each in results) / 3600
    parts = [
        f"{every('device')}, one thread a run, torch {every('torch')}, kernels: "
        f"{every('backend')}, commit {every('commit')}: `{document['command']}`, {len(results)} "
        f"runs, {hours:.1f} hours of training steps."
    ]
    for title, found in STUDIES[name].tables(results).items():
        parts += [f"{title}:", table(list(found.head), 1, [list(row) for row in found.rows])]
    return "\n\n".join(parts)


BLOCKS: dict[str, Callable[[], str]] = {name: partial(block, name) for name in STUDIES}


def main() -> None:
    """Write the page and the pictures."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), BLOCKS), encoding="utf-8")
    for path in sorted(RESULTS.glob("*.json")):
        results = load(path.stem)["results"]
        STUDIES[path.stem].draw(results).savefig(path.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
