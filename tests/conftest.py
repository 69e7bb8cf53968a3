"""Settings of the whole suite."""

import os

import torch
from hypothesis import settings

# Where there is no GPU its kernels are interpreted. Triton asks once, when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Builds of the tests leave the CUDA kernels out, which compile for minutes.
os.environ.setdefault("DATE_KERNELS_CUDA", "OFF")

# The machines that run this are shared: how long one example took says nothing.
settings.register_profile("date-kernels", deadline=None)
settings.load_profile("date-kernels")
