"""Run one step under the storage tracker, for estimates and for measurements on a CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from e3va_cli.data.collate import Batch
from e3va_cli.memory.module_groups import module_groups
from e3va_cli.memory.rois import count_rois
from e3va_cli.memory.step import StepSize, batch_tensors, init_optimizer_state, optimizer_tensors, train_step
from e3va_cli.memory.tracker import Peak, StorageTracker, WorkspaceFunction
from e3va_cli.models.model import DenseModel


@dataclass(frozen=True)
class StepTrace:
    """Memory of all tensors in a step.

    Attributes:
        peak: of the step.
        between_steps_bytes: after the step.
        rois: number of pooled RoIs, by pooling layer.
        offloaded_bytes: weights outside of the device.
        streamed_bytes: copied from there to the device.
    """

    peak: Peak
    between_steps_bytes: int
    rois: dict[str, int]
    offloaded_bytes: int
    streamed_bytes: int


def trace_step(
    model: DenseModel,
    optimizer: Optimizer,
    batch: Batch,
    size: StepSize,
    *,
    autocast_mode: AbstractContextManager[Any] | None = None,
    workspace: WorkspaceFunction | None = None,
) -> StepTrace:
    """Trace a step that is not a run's first: the optimizer has its state.

    Args:
        autocast_mode: replaces that of the device.
        workspace: of a `StorageTracker`.
    """
    init_optimizer_state(optimizer, accumulates=size.accumulates)
    streamer = model.extractor.backbone.streamer
    before = streamer.streamed_bytes if streamer else 0
    tracker = StorageTracker(workspace=workspace)
    tracker.track(batch_tensors(batch), "batch")
    tracker.track(optimizer_tensors(optimizer), "optimizer")
    with count_rois(model) as rois, tracker.track_model(model, module_groups), tracker:
        tracker.reset_peak()
        train_step(model, optimizer, batch, size, autocast_mode=autocast_mode, phase=tracker.phase)
    return StepTrace(
        tracker.peak,
        tracker.current_bytes,
        rois,
        offloaded_bytes=streamer.offloaded_bytes if streamer else 0,
        streamed_bytes=streamer.streamed_bytes - before if streamer else 0,
    )
