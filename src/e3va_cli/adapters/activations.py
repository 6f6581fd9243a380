"""How an adapter's input z is kept for the backward pass, which asks for one thing of it: the product z^T rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

TOKENS_AT_ONCE = 8192  # that are brought back to full precision together
LARGEST = 127  # of a signed 8-bit integer


class Keeping(Protocol):
    """A way to keep z."""

    def pack(self, z: Tensor) -> tuple[Tensor, ...]:
        """What is kept of the tokens z (N, C)."""
        ...

    def product(self, packed: tuple[Tensor, ...], rows: Tensor) -> Tensor:
        """`z^T rows`, (C, r), of what was kept and rows (N, r), in the rows' dtype."""
        ...


class AsFloats:
    """As floating-point numbers.

    Args:
        dtype: that they are rounded to, such as bfloat16 with its 8 bits of precision; None for that of z: exact.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype

    def pack(self, z: Tensor) -> tuple[Tensor, ...]:
        """The tokens."""
        return (z.to(self.dtype or z.dtype),)

    def product(self, packed: tuple[Tensor, ...], rows: Tensor) -> Tensor:
        """One product; where z has fewer bits, a sum over parts, so that few tokens are widened at a time."""
        tokens_at_once = TOKENS_AT_ONCE if packed[0].dtype != rows.dtype else len(rows)
        parts = zip(packed[0].split(tokens_at_once), rows.split(tokens_at_once), strict=True)
        return sum_of(z.to(rows.dtype).T @ some for z, some in parts)


class AsIntegers:
    """In 8-bit integers with a scale for each token and one for each channel: a quarter of float32's memory.

    Pre-trained features have channels that are a hundred times as large as others. Their own scales, the root mean
    square over the tokens, keep them from taking the bits of all others (as SmoothQuant does it, arXiv 2211.10438).
    """

    def pack(self, z: Tensor) -> tuple[Tensor, ...]:
        """Integers (N, C), scales of tokens (N, 1) and of channels (C,)."""
        tiny = torch.finfo(torch.float32).tiny
        of_channels = torch.linalg.vector_norm(z, dim=0, dtype=torch.float32).div_(len(z) ** 0.5).clamp_(min=tiny)
        integers = torch.empty_like(z, dtype=torch.int8)
        of_tokens = torch.empty(len(z), 1, dtype=torch.float32, device=z.device)
        every = (part.split(TOKENS_AT_ONCE) for part in (z, integers, of_tokens))
        for some, as_integers, scale in zip(*every, strict=True):
            even = some / of_channels
            torch.amax(even.abs(), 1, keepdim=True, out=scale)
            scale.div_(LARGEST).clamp_(min=tiny)
            as_integers.copy_(even.div_(scale).round_())
        return integers, of_tokens, of_channels

    def product(self, packed: tuple[Tensor, ...], rows: Tensor) -> Tensor:
        """The tokens' scales go to the rows, which are thin, and the channels' to the product."""
        integers, of_tokens, of_channels = packed
        scaled = rows * of_tokens.to(rows.dtype)
        parts = zip(integers.split(TOKENS_AT_ONCE), scaled.split(TOKENS_AT_ONCE), strict=True)
        return sum_of(z.to(rows.dtype).T @ some for z, some in parts) * of_channels.to(rows.dtype)[:, None]


def sum_of(products: Iterator[Tensor]) -> Tensor:
    """The sum of tensors as they come, in the first one's storage."""
    total = next(products)
    for product in products:
        total.add_(product)
    return total


def keeping(activations: str, bits: int) -> Keeping:
    """The way that `adapter.activations` and `adapter.compress_bits` name."""
    if activations != "compress":
        return AsFloats()
    return AsFloats(torch.bfloat16) if bits == 16 else AsIntegers()
