"""Other packages' optimizers, imported when they are asked for."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

PEERS = {
    "torch-fused": "torch",
    "torch-foreach": "torch",
    "torch-compiled": "torch",
    "timm": "timm",
    "pytorch-optimizer": "pytorch_optimizer",
    "torch-optimizer": "torch-optimizer",
    "bitsandbytes": "bitsandbytes",
    "apex": "apex",
    "deepspeed": "deepspeed",
}
"""By name on the command line: the distribution that has it."""


def installed_version(peer: str) -> str | None:
    """Return the version of a peer's distribution, or None where it is not installed.

    Parameters
    ----------
    peer : str
        A key of `PEERS`.
    """
    try:
        return version(PEERS[peer])
    except PackageNotFoundError:
        return None


def timm_optim(module: str) -> ModuleType:
    """Import a module of timm.optim without its package.

    ``import timm`` imports its models, and they want a torchvision that fits torch.

    Raises
    ------
    ModuleNotFoundError
        Where timm is not installed.
    """
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'timm'", name="timm")
    package = sys.modules.setdefault("timm_optim", ModuleType("timm_optim"))
    package.__path__ = [str(Path(spec.origin).parent / "optim")]
    return importlib.import_module(f"timm_optim.{module}")
