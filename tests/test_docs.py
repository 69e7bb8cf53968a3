"""The examples in docstrings run."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name",
    [
        "date_kernels.dispatch",
        "date_optim.optimizers",
        "date_optim.recipe",
        "date_optim.trust_ratio",
    ],
)
def test_examples_run(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted > 0
    assert results.failed == 0
