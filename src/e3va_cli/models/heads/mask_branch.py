"""The mask branch of Mask R-CNN (arXiv 1703.06870), of torchvision's modules."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.roi_heads import maskrcnn_inference
from torchvision.ops import roi_align

from e3va_cli.components.options import option
from e3va_cli.models.heads.base import Target
from e3va_cli.models.heads.layers import Float32MaskPredictor
from e3va_cli.models.heads.predictions import MASK_THRESHOLD
from e3va_cli.models.heads.roi_align import PyramidRoIAlign
from e3va_cli.models.heads.roi_sampling import SampledRoIs
from e3va_cli.models.heads.two_stage import MaskOptions


@dataclass
class MaskBranchOptions(MaskOptions):
    """Options of a mask branch."""

    aligned: bool = option(
        help="aligned RoIAlign; false: offset by half a feature cell, as in torchvision", legacy_value=False
    )


class MaskBranch(nn.Module):
    """Masks of every class in each RoI.

    Args:
        options: see `MaskBranchOptions`.
        in_channels: channels of every pyramid level.
        num_classes: classes with background.
    """

    def __init__(self, options: MaskBranchOptions, in_channels: int, num_classes: int) -> None:
        super().__init__()
        channels = options.channels
        self.pool = PyramidRoIAlign(options.roi_size, options.sampling_ratio, aligned=options.aligned)
        self.head = MaskRCNNHeads(in_channels, channels, dilation=1)
        self.predictor = Float32MaskPredictor(channels[-1], options.predictor_channels, num_classes)

    def forward(self, pyramid: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        """Return mask logits (N, K + 1, M, M) of all RoIs."""
        return self.predictor(self.head(self.pool(pyramid, boxes, sizes)))

    def loss(
        self, pyramid: dict[str, Tensor], sizes: list[tuple[int, int]], rois: SampledRoIs, targets: list[Target]
    ) -> Tensor:
        """Return the binary cross entropy of positive RoIs' masks, each of its object's class."""
        positives = rois.positives()
        boxes = [b[p] for b, p in zip(rois.boxes, positives, strict=True)]
        matched = [m[p] for m, p in zip(rois.matched, positives, strict=True)]
        logits = self(pyramid, boxes, sizes)
        labels = torch.cat([t["labels"][m] for t, m in zip(targets, matched, strict=True)])
        if not len(labels):
            return logits.sum() * 0
        side = logits.shape[-1]
        mask_targets = [
            self.crop_masks(t["masks"], b, m, side) for t, b, m in zip(targets, boxes, matched, strict=True)
        ]
        class_logits = logits[torch.arange(len(labels), device=labels.device), labels]
        return binary_cross_entropy_with_logits(class_logits, torch.cat(mask_targets))

    def crop_masks(self, masks: Tensor, boxes: Tensor, matched: Tensor, side: int) -> Tensor:
        """Crop ground-truth masks (G, H, W) of the objects `matched` to `boxes`: (N, side, side), 0 or 1."""
        rois = torch.cat([matched[:, None].to(boxes), boxes], 1)
        covered = roi_align(masks[:, None].to(boxes), rois, side, aligned=self.pool.aligned)[:, 0]
        return (covered >= MASK_THRESHOLD).to(boxes)

    def probabilities(
        self, pyramid: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]], labels: list[Tensor]
    ) -> list[Tensor]:
        """Return the mask probabilities of each box's class, (N, 1, M, M) per image."""
        return maskrcnn_inference(self(pyramid, boxes, sizes), labels)
