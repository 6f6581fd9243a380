"""Feature pyramids (arXiv 1612.03144) as torchvision's parts know them: ordered dictionaries of levels."""

from __future__ import annotations

from torch import Tensor
from torchvision.ops import FeaturePyramidNetwork

LEVEL_NAMES = ("0", "1", "2", "3")  # torchvision's names for the feature maps that regions are cut out of, finest first
STRIDES = (4, 8, 16, 32)  # of theirs, in pixels


def build_pyramid(neck: FeaturePyramidNetwork, features: list[Tensor]) -> dict[str, Tensor]:
    """All levels of a pyramid on `features`, finest first, by torchvision's names for them."""
    return neck(dict(zip(LEVEL_NAMES, features, strict=False)))
