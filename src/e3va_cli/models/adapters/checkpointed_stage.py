"""A highway stage that saves only its input: the frozen stage is recomputed in the backward pass.

Each block only adds to the highway, so the highway's gradient is the same at every block of a stage. One forward pass
of the frozen stage then yields each adapter's input in turn, and with it the adapter's gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from e3va_cli.models.adapters.dual_low_rank import (
    DualLowRankAdapter,
    add_adapter_output_,
    cast_tokens,
    low_rank_tensors,
    weight_gradients,
)
from e3va_cli.models.backbones.base import Branch
from e3va_cli.utils.amp import autocast_dtype

WEIGHTS = 6  # tensors per adapter


def checkpointed_stage(
    highway: Tensor,
    x: Tensor,
    patches: Callable[[Tensor], Tensor],
    branches: Sequence[Branch],
    adapters: Sequence[DualLowRankAdapter],
) -> tuple[Tensor, Tensor]:
    """Run a stage; return the highway, updated in place, (B, H, W, C), and the frozen stream after it.

    The stream `x`, whose `patches` are a map like the highway, is saved for the backward pass and must not share its
    storage with the highway.
    """
    weights = [weight for adapter in adapters for weight in adapter.weights]
    return _CheckpointedStage.apply(highway, x, patches, branches, *weights)


class _CheckpointedStage(torch.autograd.Function):
    """Saves the input of the stage only."""

    @staticmethod
    def forward(
        ctx: Any,
        highway: Tensor,
        x: Tensor,
        patches: Callable[[Tensor], Tensor],
        branches: Sequence[Branch],
        *weights: Tensor,
    ) -> Any:
        """Highway: (B, H, W, C); x: the stream; weights: six per branch."""
        ctx.save_for_backward(x, *weights)
        ctx.patches, ctx.branches, ctx.autocast = patches, branches, autocast_of(x)
        x = x.clone()
        for index, branch in enumerate(branches):
            own = branch_weights(weights, index)
            z = branch(x)
            x.add_(z)
            add_adapter_output_(highway, cast_tokens(patches(z), own), own)
        ctx.mark_dirty(highway)
        ctx.mark_non_differentiable(x)
        return highway, x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_stream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of all adapters; the highway's gradient passes through unchanged."""
        x, *weights = ctx.saved_tensors
        x = x.clone()
        gradients: list[Tensor] = []
        for index, branch in enumerate(ctx.branches):
            own = branch_weights(weights, index)
            with ctx.autocast:
                z = branch(x)
                x.add_(z)
                tokens = cast_tokens(ctx.patches(z), own)
            rows = grad.reshape(tokens.shape).to(tokens.dtype)
            grads, grad_low_rank_in = weight_gradients(rows, low_rank_tensors(tokens, own), own)
            gradients += [(tokens.T @ grad_low_rank_in).to(own[0].dtype), *grads]
        return grad, None, None, None, *gradients


def branch_weights(weights: Sequence[Tensor], index: int) -> Sequence[Tensor]:
    """Return the weights of one branch's adapter."""
    return weights[WEIGHTS * index : WEIGHTS * (index + 1)]


def autocast_of(x: Tensor) -> AbstractContextManager[Any]:
    """Return the current autocast context, to enter it again in the backward pass."""
    dtype = autocast_dtype(x)
    return nullcontext() if dtype is None else torch.autocast(x.device.type, dtype=dtype)
