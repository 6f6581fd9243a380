"""A feature pyramid from the outputs of a backbone whose stages share one resolution.

Paper: Y. Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", arXiv 2203.16527, section 3.
Its simple feature pyramid makes all levels from the last output (`simple_pyramid.py`); here each level has an output of
its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from e3va_cli.models.necks.fpn import STRIDES


def rescale_layers(channels: int, stride: int, target: int) -> nn.Sequential:
    """Return layers from `stride` to stride `target`, powers of two; doubling the resolution halves the channels."""
    layers: list[nn.Module] = []
    while stride > target:
        layers += [LayerNorm2d(channels), nn.GELU()] if layers else []
        layers.append(nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2))
        channels, stride = channels // 2, stride // 2
    if stride < target:
        layers.append(nn.MaxPool2d(target // stride))
    return nn.Sequential(*layers)


class Rescale(nn.Module):
    """Rescale each feature map (B, C_s, H_s, W_s) to the stride that heads expect of its stage: 4, 8, 16, 32.

    Args:
        channels: channels of each stage's feature map.
        strides: stride of each stage.
        out_indices: stages whose feature maps are passed in.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], out_indices: Sequence[int]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(rescale_layers(channels[i], strides[i], STRIDES[i]) for i in out_indices)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Return one feature map per input."""
        return [layers(feature) for layers, feature in zip(self.levels, features, strict=True)]


def rescaled_channels(channels: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Return the channels of each level of `Rescale`."""
    return [c * target // max(stride, target) for c, stride, target in zip(channels, strides, STRIDES, strict=True)]
