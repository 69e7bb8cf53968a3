"""A few steps of each kind of item on a GPU, short enough to run under compute-sanitizer."""

from __future__ import annotations

import os

import torch

from date_kernels.dispatch import GPU_BACKENDS, GPU_VARIABLE
from date_optim import LAMB, SGD, TrustRatio


def main() -> None:
    """Take steps by each backend that is there."""
    for name, why in GPU_BACKENDS:
        if why() is None:
            os.environ[GPU_VARIABLE] = name
            take_steps()
            print(f"{name}: done")


def take_steps() -> None:
    """Take two steps of a ratio of the gradient, of the update, and of none, with a clip."""
    for make, options in (
        (SGD, {"momentum": 0.9, "trust": TrustRatio(upper=1.0), "max_grad_norm": 1.0}),
        (LAMB, {"on_nonfinite": "skip"}),
        (SGD, {}),
    ):
        sizes = (5, 4096, 4097, 50_001)
        params = [torch.nn.Parameter(torch.ones(size, device="cuda")) for size in sizes]
        optimizer = make(params, lr=0.1, **options)
        for _ in range(2):
            for param in params:
                param.grad = torch.full_like(param, 0.5)
            optimizer.step()
        torch.cuda.synchronize()
        assert all(bool(param.isfinite().all()) for param in params)


if __name__ == "__main__":
    main()
