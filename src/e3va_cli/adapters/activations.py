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
    """In 8-bit integers with a scale for each token: a quarter of float32's memory."""

    def pack(self, z: Tensor) -> tuple[Tensor, ...]:
        """Integers (N, C) and scales (N, 1)."""
        scale = z.abs().amax(1, keepdim=True).float().clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
        return (z / scale).round_().to(torch.int8), scale

    def product(self, packed: tuple[Tensor, ...], rows: Tensor) -> Tensor:
        """The scales go to the rows, which are thin."""
        scaled = rows * packed[1].to(rows.dtype)
        parts = zip(packed[0].split(TOKENS_AT_ONCE), scaled.split(TOKENS_AT_ONCE), strict=True)
        return sum_of(z.to(rows.dtype).T @ some for z, some in parts)


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
