"""Pre-trained networks as stems and stages of residual branches, and their weights."""

from e3va_cli.backbones.build import BackboneIdentity, build_backbone, outline_backbone
from e3va_cli.backbones.residual import BACKBONES, BackboneOptions, Branch, ResidualBackbone, Stage

__all__ = [
    "BACKBONES",
    "BackboneIdentity",
    "BackboneOptions",
    "Branch",
    "ResidualBackbone",
    "Stage",
    "build_backbone",
    "outline_backbone",
]
