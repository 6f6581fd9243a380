"""Mask R-CNN (arXiv 1703.06870) on an FPN (arXiv 1612.03144), of torchvision's modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from e3va_cli.components.options import option
from e3va_cli.models.heads.base import HEADS, ClassRows, Extract, Head, HeadOptions, Target
from e3va_cli.models.heads.layers import Float32BoxPredictor, Float32MaskPredictor
from e3va_cli.models.heads.predictions import Detections
from e3va_cli.models.heads.rpn import RPNOptions, build_rpn
from e3va_cli.models.heads.two_stage import BoxOptions, MaskOptions, is_box_weights
from e3va_cli.models.necks.fpn import LEVEL_NAMES, build_pyramid


@dataclass
class MaskRCNNBoxOptions(BoxOptions):
    """Options of the box branch of Mask R-CNN."""

    fg_iou: float = option(help="IoU from which a RoI is positive", ge=0, le=1)
    bg_iou: float = option(help="IoU below which a RoI is negative", ge=0, le=1)
    regression_weights: list[float] = option(help="factors of (x, y, width, height) deltas")

    def errors(self, at: str) -> Iterator[str]:
        """Yield errors in the factors."""
        if self.regression_weights is not None and not is_box_weights(self.regression_weights):
            yield f"{at}.regression_weights={self.regression_weights}: must be four numbers above 0"


@dataclass
class MaskRCNNOptions(HeadOptions):
    """Options of Mask R-CNN."""

    fpn_channels: int = option(help="width of every pyramid level", gt=0)
    rpn: RPNOptions = option(RPNOptions)
    box: MaskRCNNBoxOptions = option(MaskRCNNBoxOptions)
    mask: MaskOptions = option(MaskOptions)


@HEADS.register("mask_rcnn", MaskRCNNOptions)
class MaskRCNN(Head):
    """Mask R-CNN.

    Args:
        options: see `MaskRCNNOptions`.
        channels: of the feature maps with strides 4, 8, 16, 32.
        num_classes: classes without background.
    """

    target_types = frozenset({"boxes", "masks"})

    def __init__(self, options: MaskRCNNOptions, *, channels: Sequence[int], num_classes: int) -> None:
        super().__init__(options, channels=channels, num_classes=num_classes)
        box, mask, width = options.box, options.mask, options.fpn_channels
        self.neck = FeaturePyramidNetwork(list(channels), width, LastLevelMaxPool())
        self.rpn = build_rpn(options.rpn, channels=width)
        self.roi_heads = RoIHeads(
            MultiScaleRoIAlign(LEVEL_NAMES, box.roi_size, box.sampling_ratio),
            TwoMLPHead(width * box.roi_size**2, box.hidden),
            Float32BoxPredictor(box.hidden, num_classes + 1),
            box.fg_iou,
            box.bg_iou,
            box.batch_size_per_image,
            box.positive_fraction,
            box.regression_weights,
            box.score_threshold,
            box.nms_iou,
            box.detections_per_image,
            mask_roi_pool=MultiScaleRoIAlign(LEVEL_NAMES, mask.roi_size, mask.sampling_ratio),
            mask_head=MaskRCNNHeads(width, mask.channels, dilation=1),
            mask_predictor=Float32MaskPredictor(mask.channels[-1], mask.predictor_channels, num_classes + 1),
        )

    def class_rows(self) -> dict[str, ClassRows]:
        """Return the last layers of the box and mask branches."""
        return {
            "roi_heads.box_predictor.cls_score": ClassRows(background=True),
            "roi_heads.box_predictor.bbox_pred": ClassRows(rows=4, background=True),
            "roi_heads.mask_predictor.mask_fcn_logits": ClassRows(background=True),
        }

    def losses(self, features: list[Tensor], images: ImageList, targets: list[Target]) -> dict[str, Tensor]:
        """Return torchvision's five losses: objectness, proposal box, class, box and mask."""
        pyramid = build_pyramid(self.neck, features)
        proposals, proposal_losses = self.rpn(images, pyramid, targets)
        _, detection_losses = self.roi_heads(pyramid, proposals, images.image_sizes, targets)
        return proposal_losses | detection_losses

    def predict(self, extract: Extract, images: ImageList) -> list[Detections]:
        """Return the detections above the score threshold after NMS, with masks inside their boxes."""
        pyramid = build_pyramid(self.neck, extract(images.tensors))
        proposals, _ = self.rpn(images, pyramid)
        results, _ = self.roi_heads(pyramid, proposals, images.image_sizes)
        return [
            Detections(result["boxes"], result["scores"], result["labels"], result["masks"], size)
            for result, size in zip(results, images.image_sizes, strict=True)
        ]
