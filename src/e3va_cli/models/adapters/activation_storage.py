"""Storage of an adapter's input z for the backward pass, which needs one product of it: `z^T rows`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

CHUNK_TOKENS = 8192  # dequantized at a time
INT8_MAX = 127
MIN_SCALE = torch.finfo(torch.float32).tiny
GROUP_SIZE = 64  # channels per scale: a quarter of a bit each


class ActivationStorage(Protocol):
    """Save z in the forward pass and multiply by it in the backward pass."""

    def pack(self, z: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors to save for tokens z (N, C)."""
        ...

    def weight_grad(self, packed: tuple[Tensor, ...], rows: Tensor) -> Tensor:
        """Return `z^T rows` (C, r) from the saved tensors and rows (N, r), in float32 or the dtype of `rows`."""
        ...


class CastStorage:
    """Save z as floating-point numbers.

    Args:
        dtype: dtype to round z to, such as bfloat16; None keeps the dtype of z.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype

    def pack(self, z: Tensor) -> tuple[Tensor, ...]:
        """Return the tokens, cast."""
        return (z.to(self.dtype or z.dtype),)

    def weight_grad(self, packed: tuple[Tensor, ...], rows: Tensor) -> Tensor:
        """Multiply at once, or in chunks where z must be cast, so that few tokens are cast at a time."""
        chunk_tokens = CHUNK_TOKENS if packed[0].dtype != rows.dtype else len(rows)
        chunks = zip(packed[0].split(chunk_tokens), rows.split(chunk_tokens), strict=True)
        return sum_in_place(z.to(rows.dtype).T @ chunk for z, chunk in chunks)


class Int8Storage:
    """Save z in 8-bit integers: a quarter of the memory of float32.

        z_nc ~ q_nc t_ng s_c        q: integers, t: scales per token and channel group g, s: scales per channel

    A few channels of pre-trained features are hundreds of times larger than the rest, so scales per token alone would
    round the rest to zero. s is the root mean square of a channel over all tokens; t is the largest magnitude of what
    remains in a group.
    """

    def pack(self, z: Tensor) -> tuple[Tensor, ...]:
        """Return int8 values (N, C), bfloat16 scales (N, groups) and float32 scales (C,)."""
        chunks = z.split(CHUNK_TOKENS)
        channels = (sum_in_place(c.float().square().sum(0) for c in chunks) / len(z)).sqrt_().clamp_(min=MIN_SCALE)
        integers = torch.empty_like(z, dtype=torch.int8, memory_format=torch.contiguous_format)
        groups = z.new_empty(group_channels(integers).shape[:2], dtype=torch.bfloat16)
        for chunk, q, t in zip(chunks, integers.split(CHUNK_TOKENS), groups.split(CHUNK_TOKENS), strict=True):
            scaled = group_channels(chunk / channels)
            # bfloat16 rounds by 1/512 at most, so no value exceeds INT8_MAX after rounding.
            t.copy_((scaled.abs().amax(2) / INT8_MAX).clamp_(min=MIN_SCALE))
            q.copy_(scaled.div_(t.unsqueeze(2)).round_().flatten(1))
        return integers, groups, channels

    def weight_grad(self, packed: tuple[Tensor, ...], rows: Tensor) -> Tensor:
        """Dequantize in chunks; the scales per channel multiply the result."""
        chunks = zip(*(tensor.split(CHUNK_TOKENS) for tensor in (*packed[:2], rows)), strict=True)
        total = sum_in_place(
            (group_channels(q) * t.to(chunk.dtype).unsqueeze(2)).flatten(1).T @ chunk for q, t, chunk in chunks
        )
        return total * packed[2].unsqueeze(1)


def group_channels(tokens: Tensor) -> Tensor:
    """Reshape tokens (N, C) to (N, groups, C / groups); one group where GROUP_SIZE does not divide C."""
    width = tokens.shape[1]
    return tokens.unflatten(1, (-1, GROUP_SIZE if width % GROUP_SIZE == 0 else width))


def sum_in_place(products: Iterator[Tensor]) -> Tensor:
    """Sum tensors as they arrive, in the storage of the first."""
    total = next(products)
    for product in products:
        total.add_(product)
    return total


def build_storage(activations: str, bits: int) -> ActivationStorage:
    """Return the storage of `adapter.activations` and `adapter.compress_bits`."""
    if activations != "compress":
        return CastStorage()
    return CastStorage(torch.bfloat16) if bits == 16 else Int8Storage()
