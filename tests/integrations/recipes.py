"""The recipes of docs/trainers.md, and how their runs are held to what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_bits

from date_optim import Recipe

TESTS = Path(__file__).parents[1]
DOCUMENT = TESTS.parent / "docs/trainers.md"


def blocks(heading: str) -> list[str]:
    """Return the Python blocks below a heading of the document; "" is what precedes them all."""
    sections = re.split(r"^## (.*)\n", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    section = dict(zip(["", *sections[1::2]], sections[::2], strict=True))[heading]
    return re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)


def declare_operators_of_torchvision() -> None:
    """Let torchvision be imported beside a torch that its compiled operators do not fit.

    PyPI has no build of it for torch's CPU build. It does without its operators, but for two that
    it describes to torch whenever it is imported. timm and torchmetrics, which import it, call
    neither.
    """
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    try:
        torch.ops.load_library(  # type: ignore[no-untyped-call]
            Path(spec.origin).with_name("_C.so")
        )
    except OSError:
        for name in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{name}",
                "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            )


def assert_resumes(
    heading: str, folder: Path, checkpoint: str, *, number: int = 0
) -> dict[str, list[Any]]:
    """Run a recipe, then its second half from the checkpoint, each in a new process.

    The rates must be those of `Recipe`, the second half's and the parameters the same in every bit.

    Returns
    -------
    dict
        What `integrations.worker.watch` saw in the whole run.
    """
    (shared,) = blocks("")
    names: dict[str, Any] = {}
    exec(shared, names)
    recipe: Recipe = names["recipe"]
    params, seen = _run(heading, number, folder)
    assert len(seen["lr"]) == recipe.iterations == 20
    for i, (rates, scales) in enumerate(zip(seen["lr"], seen["scale"], strict=True), start=1):
        assert rates == pytest.approx([recipe.lr(i) * scale for scale in scales], rel=1e-12)
    (path,) = folder.glob(checkpoint)
    resumed, later = _run(heading, number, folder, path)
    assert later == {key: values[10:] for key, values in seen.items()}
    assert_same_bits(resumed, params)
    return seen


def _run(
    heading: str, number: int, folder: Path, *resume: Path
) -> tuple[list[torch.Tensor], dict[str, list[Any]]]:
    done = subprocess.run(
        [sys.executable, "-m", "integrations.worker", heading, str(number), folder, *resume],
        env={**os.environ, "PYTHONPATH": str(TESTS), "HF_HUB_OFFLINE": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    params, seen = torch.load(folder / ("resumed.pt" if resume else "result.pt"))
    return params, seen
