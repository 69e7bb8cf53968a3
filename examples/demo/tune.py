"""Choose config.py's recipe and bounds on the validation images; write down what was tried.

    make demo-tune      # about 15 minutes; writes docs/demo/tuning.json

The test images are not looked at, and the seeds are not the demo's. The order is fair to the plain
rule: the recipe is the one that suits *it* best, at the small batch and at the large one, and the
bounds are chosen afterwards, on that recipe.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo.config import SETTINGS, Settings
from demo.data import PACKAGE_FOLDER, DataSet, load_digits, load_fashion_mnist
from demo.report import describe_machine, describe_versions, write_json
from demo.train import train

if TYPE_CHECKING:
    from collections.abc import Iterable

SEEDS = (100, 101, 102)
"""Not the demo's. The small batch, which hardly depends on them, is tried with the first alone."""

LEARNING_RATES = (5e-4, 1e-3, 2e-3)
WARMUP_EPOCHS = {"Fashion-MNIST": (0.03, 0.06, 0.12), "scikit-learn digits": (0.25, 0.5, 1.0)}
BOUNDS = ((0.01, 1.0), (0.03, 3.0), (0.1, 1.0), (0.3, 3.0))

RULE = (
    "Accuracy in percent on the validation images after the last step, mean over the seeds. "
    "Recipe: the highest sum for the plain rule at the small and at the large batch. "
    "Bounds: the highest accuracy with that recipe. "
    "Of candidates equal to a hundredth of a point, the first."
)


@dataclass(frozen=True)
class Candidate:
    """One method at one point of the grid, and its accuracy by seed."""

    method: str
    lr: float
    warmup_epochs: float
    lower: float | None
    upper: float | None
    seeds: Sequence[int]
    accuracy: Sequence[float]

    @property
    def mean(self) -> float:
        """Mean accuracy over the seeds."""
        return mean(self.accuracy)


def choose_recipe(small: Iterable[Candidate], large: Iterable[Candidate]) -> Candidate:
    """Choose as `RULE` says among the plain rule's candidates at both batch sizes, in one order."""
    pairs = zip(small, large, strict=True)
    return max(pairs, key=lambda pair: round(pair[0].mean + pair[1].mean, 2))[0]


def choose_bounds(bounded: Iterable[Candidate]) -> Candidate:
    """Choose as `RULE` says."""
    return max(bounded, key=lambda candidate: round(candidate.mean, 2))


def tune(data: DataSet, settings: Settings) -> dict[str, Any]:
    """Try the grid around `settings` on one data set; return all candidates and the choice."""
    grid = [
        replace(settings, lr=lr, warmup_epochs=warmup)
        for lr in LEARNING_RATES
        for warmup in WARMUP_EPOCHS[data.name]
    ]
    small = [_try("small", data, point, SEEDS[:1]) for point in grid]
    large = [_try("plain", data, point, SEEDS) for point in grid]
    recipe = choose_recipe(small, large)
    settings = replace(settings, lr=recipe.lr, warmup_epochs=recipe.warmup_epochs)
    bounded = [
        _try("bounded", data, replace(settings, lower=lower, upper=upper), SEEDS)
        for lower, upper in BOUNDS
    ]
    bounds = choose_bounds(bounded)
    return {
        "validation_images": len(data.validation),
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "large_batch_size": settings.large_batch_size,
        "candidates": [
            {**asdict(candidate), "mean": candidate.mean}
            for candidate in (*small, *large, *bounded)
        ],
        "choice": {
            "lr": recipe.lr,
            "warmup_epochs": recipe.warmup_epochs,
            "lower": bounds.lower,
            "upper": bounds.upper,
        },
    }


def _try(key: str, data: DataSet, settings: Settings, seeds: Sequence[int]) -> Candidate:
    method = next(method for method in settings.make_methods() if method.key == key)
    recipe = settings.make_recipe(len(data.train))
    runs = [train(method, recipe, data, seed, use_test=False) for seed in seeds]
    bounded = key == "bounded"
    candidate = Candidate(
        key,
        settings.lr,
        settings.warmup_epochs,
        settings.lower if bounded else None,
        settings.upper if bounded else None,
        seeds,
        [run.validation[-1] for run in runs],
    )
    accuracies = " ".join(f"{accuracy:5.1f}" for accuracy in candidate.accuracy)
    seconds = sum(run.seconds for run in runs)
    print(
        f"{method.label} at {method.batch_size}, lr {settings.lr:g}, "
        f"warm-up {settings.warmup_epochs:g} epochs: {accuracies}  ({seconds:.0f} s)",
        flush=True,
    )
    return candidate


def main() -> None:
    """Tune both data sets."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, default=PACKAGE_FOLDER, help="the four idx files")
    parser.add_argument("--out", type=Path, default=Path("docs/demo"), help="default: %(default)s")
    arguments = parser.parse_args()
    tuned = {
        data.name: tune(data, SETTINGS[data.name])
        for data in (load_fashion_mnist(arguments.data), load_digits())
    }
    write_json(
        {
            "schema": 1,
            "rule": RULE,
            "data": tuned,
            "versions": describe_versions(),
            "machine": describe_machine(),
        },
        arguments.out / "tuning.json",
    )


if __name__ == "__main__":
    main()
