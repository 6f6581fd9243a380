"""The protocol of tuning methods, and the registry behind the `adapter=` option.

A tuning method turns a backbone into a feature extractor and sets `requires_grad` of its parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from e3va_cli.components.options import Options, option
from e3va_cli.components.registry import Registry
from e3va_cli.models.backbones.base import ResidualBackbone


@dataclass
class AdapterOptions(Options):
    """Options common to all tuning methods."""

    name: str = option()


class FeatureExtractor(nn.Module):
    """A backbone under a tuning method: images (B, 3, H, W) to one feature map per stage, (B, C_s, H_s, W_s).

    Attributes:
        backbone: the network to tune.
        norms: one trainable LayerNorm per stage, the same for every method.
        out_indices: stages whose feature maps `forward` returns; all by default.
        shares_backbone: whether the method leaves the backbone's activations unchanged, so that several can share its
            forward pass.
    """

    shares_backbone = False

    def __init__(self, backbone: ResidualBackbone, options: Any = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in backbone.out_channels)
        self.out_indices = tuple(range(len(backbone.out_channels)))

    def set_out_indices(self, out_indices: Sequence[int]) -> None:
        """Return the feature maps of these stages only, and freeze the other stages' norms, which are then unused."""
        self.out_indices = tuple(out_indices)
        for stage, norm in enumerate(self.norms):
            norm.requires_grad_(stage in self.out_indices)

    def output(self, stage: int, stream: Tensor) -> Tensor:
        """Normalize the stream at the end of a stage and move channels first: (B, H, W, C) -> (B, C, H, W)."""
        return self.norms[stage](stream).permute(0, 3, 1, 2)

    def regularization(self) -> dict[str, Tensor]:
        """Return named scalar losses of the trainable parameters themselves, to be added to the head's."""
        return {}

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the backbone's features (B, C_s, H_s, W_s) of the stages in `out_indices`."""
        streams = self.backbone(images)
        return [self.output(stage, streams[stage]) for stage in self.out_indices]


class FrozenBackbone(FeatureExtractor):
    """A feature extractor whose backbone has no trainable parameter and stays in eval mode (no drop path)."""

    def __init__(self, backbone: ResidualBackbone, options: Any = None) -> None:
        super().__init__(backbone, options)
        backbone.requires_grad_(False)
        backbone.eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the backbone's features, computed without gradients."""
        with torch.no_grad():
            streams = self.backbone(images)
        return [self.output(stage, streams[stage]) for stage in self.out_indices]

    def train(self, mode: bool = True) -> FrozenBackbone:
        """Set the mode of all modules but the backbone, which stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self


METHODS: Registry[type[FeatureExtractor]] = Registry("adapter")
"""Tuning methods, called with a backbone and their options."""
