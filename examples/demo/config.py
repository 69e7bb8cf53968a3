"""What is compared: four methods on one recipe for each data set, as tune.py chose it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from date_optim import Recipe, TrustRatio


@dataclass(frozen=True)
class Method:
    """One row of the table: a batch size and a trust ratio, or none."""

    key: str
    label: str
    batch_size: int
    trust: TrustRatio | None


@dataclass(frozen=True)
class Settings:
    """The recipe of the small batch, the large batch it is scaled to, and the bounds used there."""

    batch_size: int
    large_batch_size: int
    lr: float
    warmup_epochs: float
    epochs: int
    lower: float
    upper: float

    def shorten(self, epochs: int) -> Settings:
        """Take another number of epochs, of which the warm-up keeps its share."""
        return replace(self, epochs=epochs, warmup_epochs=self.warmup_epochs * epochs / self.epochs)

    def make_recipe(self, samples: int) -> Recipe:
        """Make the recipe of the small batch."""
        return Recipe(
            batch_size=self.batch_size,
            lr=self.lr,
            warmup_epochs=self.warmup_epochs,
            epochs=self.epochs,
            samples=samples,
        )

    def make_methods(self) -> tuple[Method, ...]:
        """Make the four methods, in the order of LIMIT's table 3."""
        small, large = self.batch_size, self.large_batch_size
        bounds = TrustRatio(lower=self.lower, upper=self.upper)
        return (
            Method("small", "plain", small, None),
            Method("plain", "plain", large, None),
            Method("unbounded", "unbounded", large, TrustRatio()),
            Method("bounded", f"bounded [{self.lower:g}, {self.upper:g}]", large, bounds),
        )


SETTINGS = {
    "Fashion-MNIST": Settings(
        batch_size=256,
        large_batch_size=8192,
        lr=1e-3,
        warmup_epochs=0.12,
        epochs=6,
        lower=0.01,
        upper=1.0,
    ),
    "scikit-learn digits": Settings(
        batch_size=32,
        large_batch_size=512,
        lr=1e-3,
        warmup_epochs=0.5,
        epochs=30,
        lower=0.03,
        upper=3.0,
    ),
}
"""By the data set's name."""
