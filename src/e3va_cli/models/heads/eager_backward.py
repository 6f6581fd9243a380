"""Losses in parts, each with its backward pass at once, so that one part's activations are gone before the next's.

    loss = sum_i L_i(inputs, weights),   part i+1 taking no gradient into part i (boxes of a cascade, for one)

While the loss is computed, each part's gradients are taken, added up and kept; the backward pass only hands them on.
The result is that of plain autograd in exact arithmetic, at the memory of the largest part instead of all parts. As
gradients of a sum, they hold for losses that are summed with one common factor; anything else is refused.
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
    """Within the block, the activations of all parts are kept for the step's one backward pass, as in most code."""
    token = _eager.set(False)
    try:
        yield
    finally:
        _eager.reset(token)


def eager_backward(chunks: LossChunks, inputs: dict[str, Tensor], modules: Iterable[nn.Module]) -> dict[str, Tensor]:
    """The losses of all parts, by name, to be minimised as their sum.

    A loss gets its weight inside its part. Weighting the results against each other raises a ValueError in the backward
    pass, and so does leaving some of them out.

    Args:
        parts: called with the inputs; yields the losses of one part after another.
        inputs: what the parts take gradients into, such as the levels of a pyramid.
        modules: those that the parts use.
    """
    # Gradients in float16 need the scale that only the backward pass brings.
    scaled_later = any(autocast_dtype(t) == torch.float16 for t in inputs.values())
    if scaled_later or not (_eager.get() and torch.is_grad_enabled()):
        return {name: value for chunk in chunks(inputs) for name, value in chunk.items()}
    weights = [weight for module in modules for weight in module.parameters()]
    names: list[str] = []
    values = _EagerBackward.apply(chunks, names, tuple(inputs), *inputs.values(), *weights)
    return dict(zip(names, values, strict=True))


class _EagerBackward(torch.autograd.Function):
    """Losses whose gradients are known already."""

    @staticmethod
    def forward(
        ctx: Any, chunks: LossChunks, names: list[str], input_names: tuple[str, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Tensors: inputs by the names `input_names`, then weights. Fills the losses' `names`."""
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in tensors[: len(input_names)]]
        wanted = [t for t in (*inputs, *tensors[len(input_names) :]) if t.requires_grad]
        sums: list[Tensor | None] = [None] * len(wanted)
        values: list[Tensor] = []
        with torch.enable_grad():
            for chunk in chunks(dict(zip(input_names, inputs, strict=True))):
                names += chunk
                values += [value.detach() for value in chunk.values()]
                with without_autocast(tensors[0]):  # as a backward pass after it has it
                    gradients = torch.autograd.grad(torch.stack(list(chunk.values())).sum(), wanted, allow_unused=True)
                for index, gradient in enumerate(gradients):
                    known = sums[index]
                    if gradient is not None:  # which may be expanded, or that of another input as well: not added to
                        sums[index] = gradient if known is None else known + gradient
                del chunk, gradients
        ctx.save_for_backward(*sums)
        ctx.wanted = [t.requires_grad for t in tensors]
        ctx.set_materialize_grads(False)
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The kept gradients times the losses' common factor."""
        saved, factor = iter(ctx.saved_tensors), common_factor(grads)
        sums = [next(saved) if wanted else None for wanted in ctx.wanted]
        return None, None, None, *(None if s is None else s * factor for s in sums)


def common_factor(grads: Sequence[Tensor | None]) -> Tensor:
    """The factor that all losses have in what is differentiated, of its gradients with respect to each of them.

    Raises:
        ValueError: there is none.
    """
    first, *others = grads
    if first is None or not all(other is not None and is_same_scalar(first, other) for other in others):
        raise ValueError(
            "the losses are not summed with one common factor, and the gradients of their plain sum have been taken "
            "already; sum all of them, and weight each where the head computes it"
        )
    return first


def is_same_scalar(one: Tensor, other: Tensor) -> bool:
    """Whether two scalars are equal or both NaN; of an expanded one's elements, told without waiting for the device."""
    places = [(number.untyped_storage()._cdata, number.storage_offset(), number.dtype) for number in (one, other)]
    return places[0] == places[1] or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
