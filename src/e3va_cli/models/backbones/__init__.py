"""Pre-trained backbones as stems and stages of residual branches, and their weights."""

from e3va_cli.models.backbones.base import BACKBONES, BackboneOptions, Branch, ResidualBackbone, Stage
from e3va_cli.models.backbones.build import BackboneFingerprint, build_backbone, build_meta_backbone

__all__ = [
    "BACKBONES",
    "BackboneFingerprint",
    "BackboneOptions",
    "Branch",
    "ResidualBackbone",
    "Stage",
    "build_backbone",
    "build_meta_backbone",
]
