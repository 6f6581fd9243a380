"""The memory of a training step without running it: no GPU, no weights, no data, in seconds.

The step runs on tensors that have sizes but no contents, while the tracker follows their storages. What depends on
contents takes its configured worst case. In float32 these are meta tensors; under autocast, which needs to know the
device, fake CPU tensors, which take twice as long.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from e3va_cli.config.run_config import RunConfig
from e3va_cli.memory.cuda_autocast import CudaAutocast
from e3va_cli.memory.flops import Operations
from e3va_cli.memory.step import DTYPES, StepSize, make_batch
from e3va_cli.memory.trace import StepTrace, trace_step
from e3va_cli.memory.tracker import WORKSPACES
from e3va_cli.memory.worst_case import worst_case
from e3va_cli.models.model import build_meta_model, parameter_counts
from e3va_cli.optim.optimizer import build_optimizer
from e3va_cli.utils.environment import MIB

Semantics = Literal["cuda", "cpu"]
# PyTorch gives cuBLAS a workspace for each thread that multiplies, of the forward and of the backward pass: 32 MiB from
# Hopper on and where algorithms are deterministic, else 8 MiB (`parseChosenWorkspaceSize` in CublasHandlePool.cpp).
CUBLAS_WORKSPACES = 2 * 32 * MIB


@dataclass(frozen=True)
class Plan(StepTrace):
    """What a step will need.

    Attributes:
        parameters: counts, as `parameter_counts` gives them.
        operations: floating-point operations of the step's matrix products and convolutions, forward and backward.
        seconds: that planning took.
    """

    parameters: dict[str, int | float]
    operations: int
    seconds: float


def plan(config: RunConfig, size: StepSize, *, num_classes: int, semantics: Semantics = "cuda") -> Plan:
    """Plan one step of the configured network.

    Args:
        config: with `backbone`, `adapter`, `head` and `optimizer`; weights are not looked at.
        size: of the step.
        num_classes: of the head.
        semantics: the device whose rules hold, for what autocast leaves in float32 and for workspaces of libraries.
    """
    started = time.perf_counter()
    model = build_meta_model(config, num_classes=num_classes).train()
    mixed = DTYPES[size.precision] is not None or config.backbone.dtype != "float32"
    contents: AbstractContextManager[Any] = FakeTensorMode(allow_non_fake_inputs=True) if mixed else nullcontext()
    with contents, worst_case():
        if mixed:
            model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))
        optimizer = build_optimizer(model, config.optimizer)
        device = "cpu" if mixed else "meta"
        batch = make_batch(size, num_classes=num_classes, needs=model.head.target_types, device=device)
        rules = CudaAutocast() if mixed and semantics == "cuda" else None
        with Operations() as operations:
            followed = trace_step(model, optimizer, batch, size, rules)
        parameters = parameter_counts(model)
    workspaces = CUBLAS_WORKSPACES if semantics == "cuda" else 0
    return Plan(
        peak=followed.peak.with_kind(WORKSPACES, workspaces),
        resting_bytes=followed.resting_bytes + workspaces,
        regions=followed.regions,
        parameters=parameters,
        operations=operations.total,
        seconds=time.perf_counter() - started,
    )
