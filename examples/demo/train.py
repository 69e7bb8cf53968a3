"""One run: exactly the recipe's number of full batches, from one unbroken stream of samples."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from date_optim import RMSprop

from .model import make_lenet5

if TYPE_CHECKING:
    from collections.abc import Callable

    from date_optim import Recipe

    from .config import Method
    from .data import DataSet, Images

PIECE = 256
"""Images passed through the model at once. A larger batch is the mean over such pieces: the same
gradient, in two thirds of the time, since a piece's activations stay in the cache."""

EVALUATIONS_PER_EPOCH = 2


@dataclass
class Run:
    """What one run left behind.

    Attributes
    ----------
    epochs, validation : list of float
        Where in the run the validation images were looked at, and the accuracy in percent.
    test : float
        Accuracy in percent on the test images, looked at once, after the last step.
    lr : list of float
        The rate of every step.
    raw_ratio, ratio : dict of str to list of float
        Each layer's trust ratio at every step, as computed and as applied; empty without trust.
    seconds : float
        Wall time, evaluations included.
    """

    method: str
    seed: int
    epochs: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    test: float = float("nan")
    lr: list[float] = field(default_factory=list)
    raw_ratio: dict[str, list[float]] = field(default_factory=dict)
    ratio: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = float("nan")


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a step; `accuracy` is the latest on the validation images."""

    iteration: int
    loss: float
    accuracy: float
    lr: float


def sample_stream(samples: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` indices below `samples` from permutation after permutation, without a break.

    The stream of ``torch.utils.data.RandomSampler(data, num_samples=count)``: a batch may begin in
    one permutation and end in the next, so that every batch is full and all samples are used alike.

    Returns
    -------
    Tensor
        Of shape (count,), int64.
    """
    passes = -(-count // samples)
    return torch.cat([torch.randperm(samples, generator=generator) for _ in range(passes)])[:count]


def train(
    method: Method,
    recipe: Recipe,
    data: DataSet,
    seed: int,
    on_step: Callable[[Progress], None] = lambda _: None,
    *,
    use_test: bool = True,
) -> Run:
    """Train LeNet-5 once.

    Parameters
    ----------
    method : Method
        Batch size and trust ratio.
    recipe : Recipe
        At any batch size; it is scaled to the method's.
    data : DataSet
        Trained on `data.train`.
    seed : int
        Of the initial weights and of the stream of samples: two methods of one batch size and seed
        start at the same weights and see the same batches.
    on_step : callable, optional
        Called after every step.
    use_test : bool, default: True
        False leaves the test images untouched.
    """
    start = time.perf_counter()
    recipe = recipe.at(batch_size=method.batch_size)
    torch.manual_seed(seed)
    model = make_lenet5()
    optimizer = RMSprop(model.named_parameters(), lr=recipe.peak, trust=method.trust)
    scheduler = recipe.scheduler(optimizer)
    count = recipe.iterations * recipe.batch_size
    stream = sample_stream(len(data.train), count, torch.Generator().manual_seed(seed))
    accuracy = measure_accuracy(model, data.validation)
    run = Run(method.key, seed, epochs=[0.0], validation=[accuracy])
    for iteration, batch in enumerate(stream.view(recipe.iterations, -1), start=1):
        optimizer.zero_grad()
        loss = add_gradients(model, data.train, batch)
        run.lr.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        if method.trust is not None:
            for name, layer in optimizer.read_telemetry().items():
                run.raw_ratio.setdefault(name, []).append(float(layer.raw_ratio))
                run.ratio.setdefault(name, []).append(float(layer.ratio))
        if _is_evaluated(iteration, recipe):
            accuracy = measure_accuracy(model, data.validation)
            run.epochs.append(iteration * recipe.batch_size / len(data.train))
            run.validation.append(accuracy)
        on_step(Progress(iteration, loss, accuracy, run.lr[-1]))
    if use_test:
        run.test = measure_accuracy(model, data.test)
    run.seconds = time.perf_counter() - start
    return run


def add_gradients(model: nn.Module, train: Images, batch: Tensor) -> float:
    """Add the gradient of the mean loss over the images with indices `batch`; return that loss."""
    total = 0.0
    for piece in torch.split(batch, PIECE):
        output = model(train.images[piece])
        loss = cross_entropy(output, train.labels[piece], reduction="sum") / len(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total


@torch.no_grad()
def measure_accuracy(model: nn.Module, data: Images) -> float:
    """Measure the accuracy in percent."""
    guesses = [model(piece).argmax(dim=1) for piece in torch.split(data.images, PIECE)]
    return 100 * int((torch.cat(guesses) == data.labels).sum()) / len(data)


def _is_evaluated(iteration: int, recipe: Recipe) -> bool:
    """Whether this step completes another half of an epoch; the last one always does."""
    samples = recipe.baseline.samples
    done, before = (
        i * recipe.batch_size * EVALUATIONS_PER_EPOCH // samples for i in (iteration, iteration - 1)
    )
    return done > before
