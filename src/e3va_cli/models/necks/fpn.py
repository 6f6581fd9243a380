"""Feature pyramids (arXiv 1612.03144) in torchvision's format, dictionaries of levels."""

from __future__ import annotations

from torch import Tensor
from torchvision.ops import FeaturePyramidNetwork

LEVEL_NAMES = ("0", "1", "2", "3")  # torchvision's names of the levels that RoIs are pooled from, finest first
STRIDES = (4, 8, 16, 32)  # of these levels, in pixels


def build_pyramid(neck: FeaturePyramidNetwork, features: list[Tensor]) -> dict[str, Tensor]:
    """Apply an FPN to `features`; return all levels by name, finest first."""
    return neck(dict(zip(LEVEL_NAMES, features, strict=False)))
