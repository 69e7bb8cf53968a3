"""Settings of the whole suite."""

from hypothesis import settings

# The machines that run this are shared: how long one example took says nothing.
settings.register_profile("date-kernels", deadline=None)
settings.load_profile("date-kernels")
