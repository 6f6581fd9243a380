"""A highway stage that saves only its input: the frozen stage is recomputed in the backward pass.

Each block only adds to the highway, so the highway's gradient is the same at every block of a stage. One forward pass
of the frozen stage then yields each adapter's input in turn, and with it the adapter's gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from e3va_cli.models.backbones.base import Branch
from e3va_cli.utils.amp import autocast_dtype


class HighwayAdapter(Protocol):
    """Interface of an adapter E on the highway. All tensors are (B, H, W, C)."""

    def __call__(self, highway: Tensor, z: Tensor, x: Tensor) -> Tensor:
        """Add E(z, x) to the highway in place; z: output of a residual branch, x: the stream after it."""
        ...

    def weight_gradients(self, grad: Tensor, z: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of all parameters, in their order, from the gradient of the highway."""
        ...

    def parameters(self) -> Any:
        """Return the parameters."""
        ...


def checkpointed_stage(
    highway: Tensor,
    x: Tensor,
    patches: Callable[[Tensor], Tensor],
    branches: Sequence[Branch],
    adapters: Sequence[HighwayAdapter],
) -> tuple[Tensor, Tensor]:
    """Run a stage; return the highway, updated in place, (B, H, W, C), and the frozen stream after it.

    The stream `x`, whose `patches` are a map like the highway, is saved for the backward pass and must not share its
    storage with the highway.
    """
    weights = [weight for adapter in adapters for weight in adapter.parameters()]
    return _CheckpointedStage.apply(highway, x, patches, branches, adapters, *weights)


class _CheckpointedStage(torch.autograd.Function):
    """Saves the input of the stage only."""

    @staticmethod
    def forward(
        ctx: Any,
        highway: Tensor,
        x: Tensor,
        patches: Callable[[Tensor], Tensor],
        branches: Sequence[Branch],
        adapters: Sequence[HighwayAdapter],
        *weights: Parameter,
    ) -> Any:
        """Highway: (B, H, W, C); x: the stream; weights: of all adapters, whose gradients autograd expects."""
        ctx.save_for_backward(x, *weights)
        ctx.patches, ctx.branches, ctx.adapters, ctx.autocast = patches, branches, adapters, autocast_of(x)
        x = x.clone()
        for branch, adapter in zip(branches, adapters, strict=True):
            z = branch.add_to_(x)
            adapter(highway, patches(z), patches(x))
        ctx.mark_dirty(highway)
        ctx.mark_non_differentiable(x)
        return highway, x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_stream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of all adapters; the highway's gradient passes through unchanged."""
        x = ctx.saved_tensors[0].clone()
        gradients: list[Tensor] = []
        for branch, adapter in zip(ctx.branches, ctx.adapters, strict=True):
            with ctx.autocast:
                z = branch.add_to_(x)
                gradients += adapter.weight_gradients(grad, ctx.patches(z), ctx.patches(x))
        return grad, None, None, None, None, *gradients


def autocast_of(x: Tensor) -> AbstractContextManager[Any]:
    """Return the current autocast context, to enter it again in the backward pass."""
    dtype = autocast_dtype(x)
    return nullcontext() if dtype is None else torch.autocast(x.device.type, dtype=dtype)
