"""Full fine-tuning: train every parameter of the backbone."""

from __future__ import annotations

from e3va_cli.models.adapters.base import METHODS, AdapterOptions, FeatureExtractor
from e3va_cli.models.backbones.base import ResidualBackbone


@METHODS.register("full", AdapterOptions)
class Full(FeatureExtractor):
    """Full fine-tuning, the baseline of every other method.

    Paper: R. Girshick et al., "Rich feature hierarchies for accurate object detection and semantic segmentation",
    arXiv 1311.2524 (CVPR 2014), which established pre-training and fine-tuning for detection.

        x = x + drop_path(branch(x))     all of it trained

    Args:
        backbone: any residual backbone.
    """

    def __init__(self, backbone: ResidualBackbone, options: AdapterOptions | None = None) -> None:
        super().__init__(backbone, options)
        backbone.requires_grad_(True)
