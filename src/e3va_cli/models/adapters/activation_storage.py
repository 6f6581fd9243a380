"""How an adapter's input z is kept for the backward pass, which asks for one thing of it: the product z^T rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

CHUNK_TOKENS = 8192  # that are brought back to full precision together
INT8_MAX = 127  # of a signed 8-bit integer
MIN_SCALE = torch.finfo(torch.float32).tiny  # a scale
GROUP_SIZE = 64  # channels of a token with a scale of their own: a quarter of a bit each


class ActivationStorage(Protocol):
    """A way to keep z."""

    def pack(self, z: Tensor) -> tuple[Tensor, ...]:
        """What is kept of the tokens z (N, C)."""
        ...

    def weight_grad(self, packed: tuple[Tensor, ...], rows: Tensor) -> Tensor:
        """`z^T rows`, (C, r), of what was kept and rows (N, r); in float32 or the rows' dtype."""
        ...


class CastStorage:
    """As floating-point numbers.

    Args:
        dtype: that they are rounded to, such as bfloat16 with its 8 bits of precision; None for that of z: exact.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype

    def pack(self, z: Tensor) -> tuple[Tensor, ...]:
        """The tokens."""
        return (z.to(self.dtype or z.dtype),)

    def weight_grad(self, packed: tuple[Tensor, ...], rows: Tensor) -> Tensor:
        """One product; where z has fewer bits, a sum over parts, so that few tokens are widened at a time."""
        chunk_tokens = CHUNK_TOKENS if packed[0].dtype != rows.dtype else len(rows)
        parts = zip(packed[0].split(chunk_tokens), rows.split(chunk_tokens), strict=True)
        return sum_in_place(z.to(rows.dtype).T @ some for z, some in parts)


class Int8Storage:
    """In 8-bit integers: a quarter of float32's memory.

        z_nc ~ q_nc t_ng s_c        q: integers, t: scale of a token's group g of channels, s: scale of a channel

    Pre-trained features have a few channels hundreds of times larger than the rest, which a scale for each token alone
    would leave with no bits; s takes them out, as the root mean square of a channel over all tokens, and t follows
    what is left from token to token.
    """

    def pack(self, z: Tensor) -> tuple[Tensor, ...]:
        """Integers (N, C), bfloat16 scales (N, groups) and float32 scales (C,)."""
        parts = z.split(CHUNK_TOKENS)
        channels = (sum_in_place(part.float().square().sum(0) for part in parts) / len(z)).sqrt_().clamp_(min=MIN_SCALE)
        integers = torch.empty_like(z, dtype=torch.int8, memory_format=torch.contiguous_format)
        groups = z.new_empty(group_channels(integers).shape[:2], dtype=torch.bfloat16)
        for part, q, t in zip(parts, integers.split(CHUNK_TOKENS), groups.split(CHUNK_TOKENS), strict=True):
            scaled = group_channels(part / channels)
            # Off by 1/512 at most in bfloat16, so that nothing gets beyond the largest integer.
            t.copy_((scaled.abs().amax(2) / INT8_MAX).clamp_(min=MIN_SCALE))
            q.copy_(scaled.div_(t.unsqueeze(2)).round_().flatten(1))
        return integers, groups, channels

    def weight_grad(self, packed: tuple[Tensor, ...], rows: Tensor) -> Tensor:
        """The channels' scales go to the result."""
        parts = zip(*(tensor.split(CHUNK_TOKENS) for tensor in (*packed[:2], rows)), strict=True)
        total = sum_in_place(
            (group_channels(q) * t.to(some.dtype).unsqueeze(2)).flatten(1).T @ some for q, t, some in parts
        )
        return total * packed[2].unsqueeze(1)


def group_channels(tokens: Tensor) -> Tensor:
    """Tokens (N, C) as groups of channels (N, groups, C / groups); one group where its size does not divide C."""
    width = tokens.shape[1]
    return tokens.unflatten(1, (-1, GROUP_SIZE if width % GROUP_SIZE == 0 else width))


def sum_in_place(products: Iterator[Tensor]) -> Tensor:
    """The sum of tensors as they come, in the first one's storage."""
    total = next(products)
    for weight_grad in products:
        total.add_(weight_grad)
    return total


def build_storage(activations: str, bits: int) -> ActivationStorage:
    """The way that `adapter.activations` and `adapter.compress_bits` name."""
    if activations != "compress":
        return CastStorage()
    return CastStorage(torch.bfloat16) if bits == 16 else Int8Storage()
