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


class AsItIs:
    """Exact."""

    def pack(self, z: Tensor) -> tuple[Tensor, ...]:
        """The tokens themselves."""
        return (z,)

    def product(self, packed: tuple[Tensor, ...], rows: Tensor) -> Tensor:
        """One product."""
        return packed[0].T @ rows


class BFloat16:
    """In bfloat16: 8 bits of precision, half of float32's memory."""

    def pack(self, z: Tensor) -> tuple[Tensor, ...]:
        """The tokens rounded."""
        return (z.to(torch.bfloat16),)

    def product(self, packed: tuple[Tensor, ...], rows: Tensor) -> Tensor:
        """A sum over parts of the tokens, so that few are in full precision at a time."""
        parts = zip(packed[0].split(TOKENS_AT_ONCE), rows.split(TOKENS_AT_ONCE), strict=True)
        return sum_of(z.to(rows.dtype).T @ some for z, some in parts)


class Int8:
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
        return AsItIs()
    return BFloat16() if bits == 16 else Int8()
