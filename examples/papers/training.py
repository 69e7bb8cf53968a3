"""One run: its recipe's steps, a checkpoint after every epoch, and what it leaves behind."""

from __future__ import annotations

import math
import os
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from demo.data import DataError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

    from date_optim import Recipe
    from date_optim.optimizer import LayerwiseOptimizer

    from .study import Case


class Training(ABC):
    """What is trained.

    Attributes
    ----------
    model : torch.nn.Module
    optimizer : LayerwiseOptimizer
        Of the model's parameters.
    recipe : Recipe
        Of the run, at its batch size.
    """

    model: nn.Module
    optimizer: LayerwiseOptimizer
    recipe: Recipe

    @abstractmethod
    def add_gradients(self, step: int) -> float:
        """Add the gradients of step `step`, counted from 0, and return its loss."""

    @abstractmethod
    def evaluate(self, split: str) -> float:
        """Measure the model on ``"validation"`` or ``"test"``."""

    def probe(self, step: int) -> dict[str, float]:
        """Look at the model after step `step`; what is not empty is recorded."""
        return {}

    def carried(self) -> dict[str, Any]:
        """What goes from step to step beside the model, as tensors and numbers."""
        return {}

    def carry(self, state: dict[str, Any]) -> None:
        """Take up what `carried` returned."""
        assert not state


@dataclass
class Record:
    """What a run left so far.

    Attributes
    ----------
    epochs : list of float
        Where the model was evaluated, in epochs.
    loss : list of float
        Mean loss of the steps since the evaluation before.
    validation : list of float
    raw_ratio : dict of str to list of float
        Each layer's trust ratio at every step, before its bounds; where asked for.
    probes : dict of str to list of float
        What `Training.probe` returned, and the ``"step"`` and ``"epoch"`` of each.
    seconds : float
        Of training, without evaluations.
    """

    epochs: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    raw_ratio: dict[str, list[float]] = field(default_factory=dict)
    probes: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0


def train(
    case: Case,
    training: Training,
    checkpoint: Path,
    on_epoch: Callable[[Record], None] = lambda _: None,
) -> dict[str, Any]:
    """Run a case to its end, from its last checkpoint if there is one.

    Parameters
    ----------
    case : Case
        Its settings decide what is recorded: ``"telemetry"`` asks for the ratios, ``"split"`` says
        what the model is measured on after the last step.
    training : Training
    checkpoint : Path
        Written after every epoch. One of other settings or another device is not used.
    on_epoch : callable, optional
        Called after every epoch.

    Returns
    -------
    dict
        The record's lists; ``"diverged"``, the epoch in which loss or weights ceased to be finite,
        None where they never did; the ``"final"`` measurement, None of a run that diverged.

    Raises
    ------
    DataError
        If the checkpoint cannot be read.
    """
    optimizer, recipe = training.optimizer, training.recipe
    scheduler = recipe.scheduler(optimizer)
    record, first = Record(), 0
    if (saved := load(checkpoint, case, training)) is not None:
        training.model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        training.carry(saved["carried"])
        restore_random(saved["random"])
        record, first = Record(**saved["record"]), saved["step"]
    diverged, losses = None, []
    for step in range(first, recipe.iterations):
        start = time.perf_counter()
        optimizer.zero_grad()
        losses.append(training.add_gradients(step))
        optimizer.step()
        scheduler.step()
        if case.settings.get("telemetry"):
            for name, layer in optimizer.read_telemetry().items():
                record.raw_ratio.setdefault(name, []).append(float(layer.raw_ratio))
        record.seconds += time.perf_counter() - start
        epoch = recipe.samples_after(step + 1) / recipe.baseline.samples
        at_end = ends_epoch(recipe, step + 1)
        if not math.isfinite(losses[-1]) or (at_end and not is_finite(training.model)):
            diverged = epoch
            break
        if found := training.probe(step):
            for name, value in {"step": step + 1, "epoch": epoch, **found}.items():
                record.probes.setdefault(name, []).append(value)
        if at_end:
            record.epochs.append(epoch)
            record.loss.append(sum(losses) / len(losses))
            record.validation.append(training.evaluate("validation"))
            losses = []
            save(checkpoint, case, training, scheduler.state_dict(), record, step + 1)
            on_epoch(record)
    final = None if diverged is not None else training.evaluate(case.settings["split"])
    return {
        **vars(record),
        "final": final,
        "diverged": diverged,
        "steps": recipe.iterations,
        "samples": recipe.baseline.samples,
    }


def is_finite(model: nn.Module) -> bool:
    """Whether all weights are."""
    return all(bool(torch.isfinite(param).all()) for param in model.parameters())


def ends_epoch(recipe: Recipe, steps: int) -> bool:
    """Whether the last of so many steps completes an epoch; the last of the run always does."""
    if steps == recipe.iterations:
        return True
    done, before = (recipe.samples_after(i) // recipe.baseline.samples for i in (steps, steps - 1))
    return done > before


def save(
    path: Path,
    case: Case,
    training: Training,
    scheduler: dict[str, Any],
    record: Record,
    step: int,
) -> None:
    """Write a checkpoint, or leave the one before as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    state = {
        "settings": dict(case.settings),
        "model": training.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "scheduler": scheduler,
        "carried": training.carried(),
        "random": random_states(),
        "device": device_of(training),
        "record": vars(record),
        "step": step,
    }
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def load(path: Path, case: Case, training: Training) -> dict[str, Any] | None:
    """Read a checkpoint of these settings and this device, if there is one."""
    if not path.exists():
        return None
    try:
        saved: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # whatever a damaged file makes of torch's reader
        raise DataError(f"{path} cannot be read ({error}); remove it to begin anew") from error
    same = saved["settings"] == dict(case.settings) and saved["device"] == device_of(training)
    return saved if same else None


def device_of(training: Training) -> str:
    """Name the device that trains."""
    return next(training.model.parameters()).device.type


def random_states() -> list[torch.Tensor]:
    """States of torch's generators: the CPU's, and the GPU's where there is one."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_available() else states


def restore_random(states: list[torch.Tensor]) -> None:
    """Set torch's generators to what `random_states` returned."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)
