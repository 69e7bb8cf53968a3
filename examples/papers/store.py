"""Results on disk: a file a case while a study runs, one document when it is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo.data import DataError
from demo.report import to_plain, write_json

from .study import Case, Result, Size, Study

SCHEMA = 1


class Store:
    """Results in a folder.

    Parameters
    ----------
    folder : Path
        Made when it is written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def checkpoint(self, case: Case) -> Path:
        """Where a case that has begun is kept."""
        return self.folder / f"{case.name}.pt"

    def load(self, case: Case) -> Result | None:
        """Load a case's result; None where there is none by the same settings.

        Raises
        ------
        DataError
            If its file is not JSON.
        """
        path = self._path(case)
        if not path.exists():
            return None
        try:
            result: Result = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is not JSON; remove it to run {case.name} again") from error
        return result if result["settings"] == to_plain(dict(case.settings)) else None

    def require(self, case: Case) -> Result:
        """Load a case's result, which is there."""
        if (result := self.load(case)) is None:
            raise KeyError(case.name)
        return result

    def save(self, case: Case, result: Result) -> None:
        """Write a case's result; whatever was kept of its way there is not needed any more."""
        write_whole(self._path(case), dict(result))
        self.checkpoint(case).unlink(missing_ok=True)

    def _path(self, case: Case) -> Path:
        return self.folder / f"{case.name}.json"


def write_whole(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    write_json(content, unfinished)
    os.replace(unfinished, path)


def document(study: Study, size: Size, command: str, results: Sequence[Result]) -> dict[str, Any]:
    """Make the document of a whole study."""
    plain: dict[str, Any] = to_plain(
        {
            "schema": SCHEMA,
            "study": study.name,
            "title": study.title,
            "size": size,
            "command": command,
            "results": list(results),
        }
    )
    return plain
