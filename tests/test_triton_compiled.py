"""The Triton kernels as compiled for GPUs that are not here: what fits where, and how wide."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from date_kernels.items import LEAF

pytest.importorskip("triton")

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Rows:
    """What `triton_compiled.py` found out; its table is printed, too."""
    folder = tmp_path_factory.mktemp("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    program = Path(__file__).with_name("triton_compiled.py")
    command = [sys.executable, str(program), "--json", str(folder / "rows.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\n" + done.stdout)
    found: Rows = json.loads((folder / "rows.json").read_text())
    return found


def test_every_rule_compiles_for_all_dtypes_and_targets(rows: Rows) -> None:
    compiled = {(row["rule"], row["dtypes"], row["target"]) for row in rows}
    rules = {rule for rule, dtypes, _ in compiled if dtypes != "scan"}
    every = {dtypes for _, dtypes, _ in compiled if dtypes != "scan"}
    targets = {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert len(rules) == 6
    assert len(every) == 7
    assert compiled >= {(r, d, t) for r in rules for d in every for t in targets}
    assert compiled >= {("sgd", "scan", target) for target in targets}


def test_two_programs_share_a_multiprocessor_and_nothing_spills(rows: Rows) -> None:
    checked = ("f32/f32/f32", "scan")
    of_float32 = [row for row in rows if "registers" in row and row["dtypes"] in checked]
    assert len(of_float32) >= 21
    for row in of_float32:
        assert row["registers"] <= 128, row
        assert row["spilled_bytes"] == 0, row
        assert row["local"] == 0, row


def test_full_leaves_are_loaded_and_stored_16_bytes_at_a_time(rows: Rows) -> None:
    """Weights and gradient are read to measure and to update, and so are states, and gradients to
    scan a leaf; of 256 threads each takes its share of a tile, four elements an access."""
    for row in rows:
        if "registers" in row and row["dtypes"] == "f32/f32/f32":
            states = row["uses"].bit_count()
            each = row["tile"] // (256 * 4)  # accesses a thread and array
            assert row["wide_loads"] >= each * (4 + 2 * states) + LEAF // (256 * 4), row
            assert row["wide_stores"] >= each * (1 + 2 * states), row


def test_nothing_is_fused(rows: Rows) -> None:
    for row in rows:
        if "registers" in row:
            assert row["fused"] == 0, row
