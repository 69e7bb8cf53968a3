"""Settings of the whole suite."""

import os

import torch
from hypothesis import settings

# Where there is no GPU its kernels are interpreted. Triton asks once, when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The machines that run this are shared: how long one example took says nothing.
settings.register_profile("date-kernels", deadline=None)
settings.load_profile("date-kernels")
