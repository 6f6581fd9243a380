"""Losses in chunks with eager backward passes: a chunk's activations are freed before the next chunk is computed.

    loss = sum_i L_i(inputs, weights),   without gradients between chunks (as between the stages of a cascade)

The forward pass computes each chunk's gradients and accumulates them; the backward pass returns the sums. Results equal
plain autograd's up to rounding, with the memory of the largest chunk instead of all. The gradients are those of the sum
of all losses times one common factor; other combinations raise an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from e3va_cli.utils.amp import autocast_dtype, without_autocast

LossChunks = Callable[[dict[str, Tensor]], Iterator[dict[str, Tensor]]]
_eager = ContextVar("_eager", default=True)


@contextmanager
def one_backward_pass() -> Iterator[None]:
    """Disable eager backward passes in the block: save all activations, as plain autograd does."""
    token = _eager.set(False)
    try:
        yield
    finally:
        _eager.reset(token)


def eager_backward(chunks: LossChunks, inputs: dict[str, Tensor], modules: Iterable[nn.Module]) -> dict[str, Tensor]:
    """Return the losses of all chunks by name, to be minimized as their sum.

    Weight losses inside the chunks: if the results are weighted or some are left out, the backward pass raises a
    ValueError.

    Args:
        chunks: called with the inputs; yields the losses of each chunk.
        inputs: tensors to differentiate, such as the levels of a pyramid.
        modules: modules used by the chunks, to differentiate too.
    """
    # float16 gradients need the loss scale, which is known in the backward pass only.
    needs_loss_scale = any(autocast_dtype(t) == torch.float16 for t in inputs.values())
    if needs_loss_scale or not (_eager.get() and torch.is_grad_enabled()):
        return {name: value for chunk in chunks(inputs) for name, value in chunk.items()}
    weights = [weight for module in modules for weight in module.parameters()]
    names: list[str] = []
    values = _EagerBackward.apply(chunks, names, tuple(inputs), *inputs.values(), *weights)
    return dict(zip(names, values, strict=True))


class _EagerBackward(torch.autograd.Function):
    """Losses with precomputed gradients."""

    @staticmethod
    def forward(
        ctx: Any, chunks: LossChunks, names: list[str], input_names: tuple[str, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Tensors: inputs named `input_names`, then weights. Appends the losses' names to `names`."""
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in tensors[: len(input_names)]]
        leaves = [t for t in (*inputs, *tensors[len(input_names) :]) if t.requires_grad]
        sums: list[Tensor | None] = [None] * len(leaves)
        values: list[Tensor] = []
        with torch.enable_grad():
            for chunk in chunks(dict(zip(input_names, inputs, strict=True))):
                names += chunk
                values += [value.detach() for value in chunk.values()]
                with without_autocast(tensors[0]):  # as in a plain backward pass
                    gradients = torch.autograd.grad(torch.stack(list(chunk.values())).sum(), leaves, allow_unused=True)
                for index, gradient in enumerate(gradients):
                    total = sums[index]
                    if gradient is not None:  # may be expanded or shared between inputs, so not added to in place
                        sums[index] = gradient if total is None else total + gradient
                del chunk, gradients
        ctx.save_for_backward(*sums)
        ctx.needs_grad = [t.requires_grad for t in tensors]
        ctx.set_materialize_grads(False)
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the saved gradients times the losses' common factor."""
        saved, factor = iter(ctx.saved_tensors), common_factor(grads)
        sums = [next(saved) if needs_grad else None for needs_grad in ctx.needs_grad]
        return None, None, None, *(None if s is None else s * factor for s in sums)


def common_factor(grads: Sequence[Tensor | None]) -> Tensor:
    """Return the value that the gradients of all losses have in common.

    Raises:
        ValueError: they differ, or some are missing.
    """
    first, *others = grads
    if first is None or not all(other is not None and is_same_scalar(first, other) for other in others):
        raise ValueError(
            "all losses must be summed with one common factor, as their gradients are computed in the forward pass; "
            "apply weights where the head computes the losses"
        )
    return first


def is_same_scalar(one: Tensor, other: Tensor) -> bool:
    """Return whether two scalars are equal or both NaN; elements of one expanded scalar need no device sync."""
    locations = [(t.untyped_storage()._cdata, t.storage_offset(), t.dtype) for t in (one, other)]
    return locations[0] == locations[1] or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
