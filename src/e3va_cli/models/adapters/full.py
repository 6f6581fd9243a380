"""Full fine-tuning: every parameter of the backbone is trained."""

from __future__ import annotations

from e3va_cli.models.adapters.base import METHODS, AdapterOptions, FeatureExtractor
from e3va_cli.models.backbones.base import ResidualBackbone


@METHODS.register("full", AdapterOptions)
class Full(FeatureExtractor):
    """Full fine-tuning, what every other method is measured against.

    Paper: R. Girshick et al., "Rich feature hierarchies for accurate object detection and semantic segmentation",
    arXiv 1311.2524 (CVPR 2014), which made pre-training and then fine-tuning the rule for detection.

        x = x + drop_path(branch(x))     all of it trained

    Args:
        backbone: any residual backbone.
    """

    def __init__(self, backbone: ResidualBackbone, options: AdapterOptions | None = None) -> None:
        super().__init__(backbone, options)
        backbone.requires_grad_(True)
