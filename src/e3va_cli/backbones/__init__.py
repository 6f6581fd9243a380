"""Pre-trained networks as stems and stages of residual branches, and their weights."""

from e3va_cli.backbones.build import BackboneIdentity, build_backbone, outline_backbone
from e3va_cli.backbones.residual import Branch, ResidualBackbone, Stage

__all__ = ["BackboneIdentity", "Branch", "ResidualBackbone", "Stage", "build_backbone", "outline_backbone"]
