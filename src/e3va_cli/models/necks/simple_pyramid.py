"""A feature pyramid from the last output of a backbone of one resolution.

Paper: Y. Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", arXiv 2203.16527, section 3.

ViTDet ends each level with a 1x1 and a 3x3 convolution, each with a norm, and has no connections between levels. Here
the heads' own necks follow: 1x1 lateral and 3x3 output convolutions, without norms in torchvision's FPN, and with sums
of coarser and finer levels between them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from e3va_cli.models.necks.fpn import STRIDES
from e3va_cli.models.necks.rescale import rescale_layers


class SimplePyramid(nn.Module):
    """Rescale the last feature map (B, C, H, W) to each stride that the head reads, of 4, 8, 16, 32.

    From stride 16: two transposed convolutions with a norm and GELU between them, one, the identity, max pooling.

    Args:
        channels: channels of the last feature map.
        stride: its stride.
        out_indices: levels that the head reads, from 0 (stride 4) to 3 (stride 32).
    """

    def __init__(self, channels: int, stride: int, out_indices: Sequence[int]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(rescale_layers(channels, stride, STRIDES[i]) for i in out_indices)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Return one feature map per level from the only one in `features`."""
        (last,) = features
        return [layers(last) for layers in self.levels]
