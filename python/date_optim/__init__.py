"""Drop-in torch optimizers with a bounded layer-wise trust ratio, and recipes for large batches."""

from .optimizers import SGD, Adadelta, Adagrad, Adam, AdamW, Lion, RMSprop
from .presets import DATE, LAMB, LARS
from .recipe import Recipe
from .telemetry import LayerTelemetry, TelemetryLogger, scalars, summarize, write_tensorboard
from .telemetry_files import write_csv, write_jsonl
from .trust_ratio import TrustRatio

__all__ = [
    "DATE",
    "LAMB",
    "LARS",
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "LayerTelemetry",
    "Lion",
    "RMSprop",
    "Recipe",
    "TelemetryLogger",
    "TrustRatio",
    "scalars",
    "summarize",
    "write_csv",
    "write_jsonl",
    "write_tensorboard",
]
