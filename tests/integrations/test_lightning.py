"""Lightning: docs/trainers.md's recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from integrations.recipes import assert_resumes

from date_optim import LAMB

pytest.importorskip("lightning")
precision = pytest.importorskip("lightning.pytorch.plugins.precision")


def test_the_recipe_resumes(tmp_path: Path) -> None:
    """With closures, in bf16-mixed precision and with clipped gradients."""
    seen = assert_resumes("Lightning", tmp_path, "*step=10.ckpt")
    assert all(seen["closure"])
    assert max(seen["norm"]) == pytest.approx(1.0, rel=1e-5)


def test_who_clips() -> None:
    """Not Lightning beside an optimizer that says that it unscales gradients itself."""
    mixed = precision.MixedPrecision("bf16-mixed", "cpu")
    for fused in (None, False, True):
        param = torch.nn.Parameter(torch.ones(2))
        param.grad = torch.full((2,), 10.0)
        optimizer = LAMB([param], fused=fused)
        if fused:
            with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
                mixed.clip_gradients(optimizer, 1.0)
        else:
            mixed.clip_gradients(optimizer, 1.0)
            assert param.grad.norm().item() == pytest.approx(1.0, rel=1e-5)
