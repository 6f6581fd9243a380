"""Mask R-CNN (arXiv 1703.06870) on an FPN (arXiv 1612.03144), of torchvision's parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from e3va_cli.heads.detections import Detections
from e3va_cli.heads.head import Extract, Head, Target, register
from e3va_cli.heads.predictors import Float32BoxPredictor, Float32MaskPredictor
from e3va_cli.heads.pyramid import LEVELS, pyramid_of
from e3va_cli.heads.rpn import build_rpn


@register("mask_rcnn")
class MaskRCNN(Head):
    """Boxes and masks in two stages.

    Args:
        channels: of the four feature maps, strides 4 to 32.
        num_classes: kinds of objects, background not counted.
        fpn_channels: width of every pyramid level.
        rpn: options of `build_rpn`; one anchor size for each of the five levels (the last is pooled from the fourth).
        box: options of the box branch.
        mask: options of the mask branch.
    """

    needs = frozenset({"boxes", "masks"})

    def __init__(
        self,
        *,
        channels: Sequence[int],
        num_classes: int,
        fpn_channels: int,
        rpn: dict[str, Any],
        box: dict[str, Any],
        mask: dict[str, Any],
    ) -> None:
        super().__init__()
        self.neck = FeaturePyramidNetwork(list(channels), fpn_channels, LastLevelMaxPool())
        self.rpn = build_rpn(channels=fpn_channels, **rpn)
        mask_head = MaskRCNNHeads(fpn_channels, mask["channels"], dilation=1)
        self.roi_heads = RoIHeads(
            MultiScaleRoIAlign(LEVELS, box["roi_size"], box["sampling_ratio"]),
            TwoMLPHead(fpn_channels * box["roi_size"] ** 2, box["hidden"]),
            Float32BoxPredictor(box["hidden"], num_classes + 1),
            box["fg_iou"],
            box["bg_iou"],
            box["batch_size_per_image"],
            box["positive_fraction"],
            box["regression_weights"],
            box["score_threshold"],
            box["nms_iou"],
            box["detections_per_image"],
            mask_roi_pool=MultiScaleRoIAlign(LEVELS, mask["roi_size"], mask["sampling_ratio"]),
            mask_head=mask_head,
            mask_predictor=Float32MaskPredictor(mask["channels"][-1], mask["predictor_channels"], num_classes + 1),
        )

    def losses(self, features: list[Tensor], images: ImageList, targets: list[Target]) -> dict[str, Tensor]:
        """Torchvision's five losses: objectness, proposal box, class, box and mask."""
        pyramid = pyramid_of(self.neck, features)
        proposals, proposal_losses = self.rpn(images, pyramid, targets)
        _, detection_losses = self.roi_heads(pyramid, proposals, images.image_sizes, targets)
        return proposal_losses | detection_losses

    def predict(self, extract: Extract, images: ImageList) -> list[Detections]:
        """Objects above the score threshold after NMS, with masks inside their boxes."""
        pyramid = pyramid_of(self.neck, extract(images.tensors))
        proposals, _ = self.rpn(images, pyramid)
        found, _ = self.roi_heads(pyramid, proposals, images.image_sizes)
        return [
            Detections(one["boxes"], one["scores"], one["labels"], one["masks"], size)
            for one, size in zip(found, images.image_sizes, strict=True)
        ]
