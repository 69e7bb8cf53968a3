"""Hugging Face's Trainer: docs/trainers.md's recipes."""

from pathlib import Path

import pytest
from integrations.recipes import assert_resumes

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


@pytest.mark.parametrize("number", [0, 1], ids=["optimizer_cls_and_kwargs", "optimizers"])
def test_the_recipe_resumes(number: int, tmp_path: Path) -> None:
    assert_resumes("Hugging Face Trainer", tmp_path, "checkpoint-10", number=number)
