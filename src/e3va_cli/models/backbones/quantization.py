"""Weight-only quantization of linear layers to 8 or 4 bits.

    w_oi ~ q_oi s_og        q: integers, s: a bfloat16 scale per output channel o and group g of `GROUP_SIZE` inputs i

Symmetric: no zero points. The value of largest magnitude in a group becomes the smallest integer, -128 or -8, so all
integers are used; its scale may be negative. A matrix is dequantized where it is used, in the dtype of the product.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from e3va_cli.utils.amp import autocast_dtype

BITS = {"int8": 8, "int4": 4}  # by `backbone.dtype`
GROUP_SIZE = {8: 32, 4: 16}  # inputs per scale, by bits: half a bit and one bit more per weight


class QuantizedLinear(nn.Module):
    """`y = x W^T + b` with W in integers, as `nn.Linear`.

    Args:
        layer: whose weights are quantized.
        bits: 8, or 4, which are packed two to a byte.

    Attributes:
        weight: int8 (out, groups, group size), or uint8 (out, groups, group size / 2).
        scale: bfloat16 (out, groups, 1).
    """

    def __init__(self, layer: nn.Linear, bits: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = layer.in_features, layer.out_features, bits
        weight, scale = quantize(layer.weight.detach(), bits)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = layer.bias

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight matrix (out, in)."""
        integers = unpack(self.weight) if self.bits == 4 else self.weight
        return (integers * self.scale.to(dtype)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out), in the dtype of autocast or of x."""
        return linear(x, self.dequantize(autocast_dtype(x) or x.dtype), self.bias)

    def extra_repr(self) -> str:
        """Return what distinguishes the layer when it is printed."""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}"


def is_quantizable(layer: nn.Linear) -> bool:
    """Return whether the number of inputs is even, as two are packed to a byte."""
    return layer.in_features % 2 == 0


def quantize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the integers and scales of a matrix (out, in), in the formats of `QuantizedLinear`."""
    grouped = weight.float().unflatten(1, (-1, math.gcd(weight.shape[1], GROUP_SIZE[bits])))
    lowest, highest = grouped.aminmax(dim=2, keepdim=True)
    smallest = -(2 ** (bits - 1))
    scale = (torch.where(highest > -lowest, highest, lowest) / smallest).bfloat16()
    scale = torch.where(scale == 0, 1, scale)
    integers = (grouped / scale.float()).round_().clamp_(smallest, -smallest - 1).to(torch.int8)
    return (pack(integers) if bits == 4 else integers), scale


def pack(integers: Tensor) -> Tensor:
    """Pack integers from -8 to 7, int8 (..., N), two to a byte: uint8 (..., N / 2), the first half in the low bits."""
    low, high = (integers + 8).to(torch.uint8).chunk(2, dim=-1)
    return low | (high << 4)


def unpack(packed: Tensor) -> Tensor:
    """Unpack the result of `pack`: uint8 (..., N / 2) to int8 (..., N)."""
    # Each half is cast, as ONNX's exporter gives the two different types.
    return torch.cat([half.to(torch.int8) for half in (packed & 15, packed >> 4)], dim=-1) - 8
