"""The region proposal network of two-stage detectors (arXiv 1506.01497), torchvision's."""

from __future__ import annotations

from collections.abc import Sequence

from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RegionProposalNetwork

from e3va_cli.heads.predictors import Float32RPNHead


def build_rpn(
    *,
    channels: int,
    anchor_sizes: Sequence[int],
    aspect_ratios: Sequence[float],
    fg_iou: float,
    bg_iou: float,
    batch_size_per_image: int,
    positive_fraction: float,
    pre_nms_train: int,
    pre_nms_test: int,
    post_nms_train: int,
    post_nms_test: int,
    nms_iou: float,
) -> RegionProposalNetwork:
    """A region proposal network with one anchor size per pyramid level."""
    anchors = AnchorGenerator(tuple((size,) for size in anchor_sizes), (tuple(aspect_ratios),) * len(anchor_sizes))
    return RegionProposalNetwork(
        anchors,
        Float32RPNHead(channels, len(aspect_ratios)),
        fg_iou,
        bg_iou,
        batch_size_per_image,
        positive_fraction,
        {"training": pre_nms_train, "testing": pre_nms_test},
        {"training": post_nms_train, "testing": post_nms_test},
        nms_iou,
    )
