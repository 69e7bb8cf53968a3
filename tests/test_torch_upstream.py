"""torch's own test file of its optimizers, run on ours where PYTORCH_TEST_DIR names a checkout's.

The file is not in torch's wheel: the variable names the folder ``test`` of a checkout of the
version installed. It runs in a process of its own, since it reads the list of optimizers when it is
imported. Stubs of the file stand for it here, so that a failure in it is seen to fail.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import unittest
from pathlib import Path

import pytest
from torch.testing._internal import common_optimizers
from torch_infos import INFOS, SUITE

TEST_DIR = "PYTORCH_TEST_DIR"


def run_suite(folder: str) -> int:
    """Run the folder's TestOptimRenewed on our infos; return the status for the shell."""
    common_optimizers.optim_db[:] = INFOS
    sys.path.insert(0, folder)
    names = vars(importlib.import_module("test_optim"))
    suite = unittest.TestSuite(
        unittest.defaultTestLoader.loadTestsFromTestCase(names[name])
        for name in names
        if name.startswith(SUITE)  # once for each device
    )
    result = unittest.TextTestRunner().run(suite)
    print(f"{result.testsRun} ran, {len(result.skipped)} of them skipped")
    return 0 if result.wasSuccessful() and result.testsRun > len(result.skipped) else 1


def run_in_a_process(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, __file__, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.mark.skipif(TEST_DIR not in os.environ, reason=f"{TEST_DIR} names no checkout of torch")
def test_torchs_own_suite() -> None:
    ran = run_in_a_process(Path(os.environ[TEST_DIR]))
    assert ran.returncode == 0, ran.stdout


STUB = """
import torch
from torch.testing._internal.common_device_type import instantiate_device_type_tests, onlyCPU
from torch.testing._internal.common_optimizers import optim_db, optims
from torch.testing._internal.common_utils import TestCase


class TestOptimRenewed(TestCase):
    @onlyCPU
    @optims(optim_db, dtypes=[torch.float32])
    def test_tensor_lr(self, device, dtype, optim_info):
        params = [torch.ones(2, device=device, dtype=dtype)]
        for case in optim_info.optim_inputs_func(device=device):
            optim_info.optim_cls(params, **case.kwargs)
        assert CONDITION

    @onlyCPU
    @optims(optim_db)
    def test_complex_2d(self, device, dtype, optim_info):
        self.fail("it is skipped by declaration")


class TestLRScheduler(TestCase):
    def test_of_another_class(self):
        self.fail("it is not ours")


instantiate_device_type_tests(TestOptimRenewed, globals(), only_for="cpu")
"""


def run_stub(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_optim.py").write_text(text)
    return run_in_a_process(folder)


def test_a_suite_that_passes(tmp_path: Path) -> None:
    """It sees our classes, and its tests that are skipped by declaration do not run."""
    ours = 'optim_info.optim_cls.__module__.startswith("date_optim.")'
    ran = run_stub(tmp_path, STUB.replace("CONDITION", ours))
    assert ran.returncode == 0, ran.stdout
    assert "20 ran, 10 of them skipped" in ran.stdout


def test_a_suite_that_fails(tmp_path: Path) -> None:
    ran = run_stub(tmp_path, STUB.replace("CONDITION", 'optim_info.name != "LAMB"'))
    assert ran.returncode == 1
    assert "FAILED (failures=1, skipped=10)" in ran.stdout
    assert "test_tensor_lr_LAMB_cpu_float32" in ran.stdout


def test_a_file_without_the_suite(tmp_path: Path) -> None:
    """A rename in torch does not go unnoticed."""
    ran = run_stub(tmp_path, "")
    assert ran.returncode == 1
    assert "0 ran" in ran.stdout


if __name__ == "__main__":
    sys.exit(run_suite(sys.argv.pop()))
