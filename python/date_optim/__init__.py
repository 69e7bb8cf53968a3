"""Drop-in torch optimizers with a bounded layer-wise trust ratio, and recipes for large batches."""

from .optimizer import LayerTelemetry
from .optimizers import DATE, LARS, SGD, RMSprop
from .recipe import Recipe
from .trust_ratio import TrustRatio

__all__ = ["DATE", "LARS", "SGD", "LayerTelemetry", "RMSprop", "Recipe", "TrustRatio"]
