"""Whether a parameter is a whole layer, whose norm is the layer's."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

_INSTEAD = (
    "share the optimizer's states out by ZeroRedundancyOptimizer instead, which keeps layers "
    "whole, or step without a trust ratio (trust=None)"
)


def check_whole(param: Tensor, name: Callable[[], str]) -> None:
    """Refuse what a wrapper has flattened or partitioned: its norm would be nobody's.

    DeepSpeed's stages 1 and 2 hand an optimizer plain tensors, which nothing tells apart.

    Parameters
    ----------
    param : Tensor
        Of a param group with a trust ratio.
    name : callable
        Tells its name for the error.

    Raises
    ------
    RuntimeError
        With what to use instead.
    """
    if getattr(param, "_fsdp_flattened", False):
        raise RuntimeError(
            f"{name()} is part of a flat parameter of FullyShardedDataParallel, which has no norm "
            f"of a layer; {_INSTEAD}"
        )
    if hasattr(param, "ds_id"):
        raise RuntimeError(
            f"{name()} is partitioned by DeepSpeed's ZeRO, which has no norm of a layer; {_INSTEAD}"
        )
