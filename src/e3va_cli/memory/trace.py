"""One step under the tracker, with or without contents: what plans and measurements have in common."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from e3va_cli.data.collate import Batch
from e3va_cli.memory.module_groups import kinds_of
from e3va_cli.memory.regions import counted_regions
from e3va_cli.memory.step import StepSize, init_optimizer_state, state_of, tensors_of, train_step
from e3va_cli.memory.tracker import Peak, StorageTracker
from e3va_cli.models.model import DenseModel


@dataclass(frozen=True)
class StepTrace:
    """What a step held.

    Attributes:
        peak: of the memory that tensors hold.
        resting_bytes: held between steps.
        regions: cut out of the feature maps, by pooling layer.
    """

    peak: Peak
    resting_bytes: int
    regions: dict[str, int]


def trace_step(
    model: DenseModel,
    optimizer: Optimizer,
    batch: Batch,
    size: StepSize,
    rules: AbstractContextManager[Any] | None = None,
) -> StepTrace:
    """Follow one step of the kind that every step but the first is: with the optimizer's state."""
    init_optimizer_state(optimizer, accumulates=size.accumulates)
    tracker = StorageTracker()
    tracker.own(tensors_of(batch), "batch")
    tracker.own(state_of(optimizer), "optimizer")
    with counted_regions(model) as regions, tracker.follow(model, kinds_of), tracker:
        tracker.restart()
        train_step(model, optimizer, batch, size, rules=rules, phase=tracker.phase)
    return StepTrace(tracker.peak, tracker.current_bytes, regions)
