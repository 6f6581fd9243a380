"""Estimate the memory of a training step without running it: no GPU, no weights, no data, in seconds.

The step runs on tensors without storage contents while the tracker follows their sizes. Data-dependent sizes take the
largest values that the configuration allows. In float32 the tensors are meta tensors; autocast needs a device, so
mixed precision runs on fake CPU tensors, which takes twice as long.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from e3va_cli.config.run_config import RunConfig
from e3va_cli.memory.cuda_autocast import CudaAutocast
from e3va_cli.memory.flops import FlopCounter
from e3va_cli.memory.step import DTYPES, StepSize, random_batch
from e3va_cli.memory.torch_private import FakeTensorMode
from e3va_cli.memory.trace import StepTrace, trace_step
from e3va_cli.memory.tracker import WORKSPACES
from e3va_cli.memory.workspaces import CUBLAS_WORKSPACES, cudnn_workspace
from e3va_cli.memory.worst_case_shapes import worst_case_shapes
from e3va_cli.models.model import build_meta_model, parameter_counts
from e3va_cli.optim.optimizer import build_optimizer

DeviceType = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class MemoryEstimate(StepTrace):
    """Estimated memory and arithmetic of a step.

    Attributes:
        parameters: of `parameter_counts`.
        flops: floating-point operations of matrix products, convolutions and attention, forward and backward.
        seconds: duration of the estimate.
    """

    parameters: dict[str, int | float]
    flops: int
    seconds: float


def estimate_memory(
    config: RunConfig, size: StepSize, *, num_classes: int, device_type: DeviceType = "cuda"
) -> MemoryEstimate:
    """Estimate one training step of the configured model.

    Args:
        config: with `backbone`, `adapter`, `head` and `optimizer`; no weights are loaded.
        size: of the step.
        num_classes: of the head.
        device_type: determines which operators autocast runs in float32, and the workspaces of libraries.
    """
    started = time.perf_counter()
    model = build_meta_model(config, num_classes=num_classes).train()
    mixed = DTYPES[size.precision] is not None or config.backbone.dtype != "float32"
    fake_tensors: AbstractContextManager[Any] = FakeTensorMode(allow_non_fake_inputs=True) if mixed else nullcontext()
    with fake_tensors, worst_case_shapes():
        if mixed:
            model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))
        optimizer = build_optimizer(model, config.optimizer)
        device = "cpu" if mixed else "meta"
        batch = random_batch(size, num_classes=num_classes, target_types=model.head.target_types, device=device)
        on_cuda = device_type == "cuda"
        with FlopCounter() as counter:
            trace = trace_step(
                model,
                optimizer,
                batch,
                size,
                autocast_mode=CudaAutocast() if mixed and on_cuda else None,
                workspace=cudnn_workspace if on_cuda else None,
            )
        parameters = parameter_counts(model)
    workspaces = CUBLAS_WORKSPACES if on_cuda else 0
    return MemoryEstimate(
        peak=trace.peak.with_category(WORKSPACES, workspaces),
        between_steps_bytes=trace.between_steps_bytes + workspaces,
        rois=trace.rois,
        offloaded_bytes=trace.offloaded_bytes,
        streamed_bytes=trace.streamed_bytes,
        parameters=parameters,
        flops=counter.total,
        seconds=time.perf_counter() - started,
    )
