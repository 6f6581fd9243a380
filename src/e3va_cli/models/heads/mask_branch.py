"""The mask branch of Mask R-CNN (arXiv 1703.06870), of torchvision's parts."""

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
        help="false, as torchvision has it: regions are half a cell of the feature map off", before=False
    )


class MaskBranch(nn.Module):
    """A mask for every class in each region.

    Args:
        options: of the branch.
        in_channels: of every pyramid level.
        num_classes: background counted.
    """

    def __init__(self, options: MaskBranchOptions, in_channels: int, num_classes: int) -> None:
        super().__init__()
        channels = options.channels
        self.pool = PyramidRoIAlign(options.roi_size, options.sampling_ratio, aligned=options.aligned)
        self.head = MaskRCNNHeads(in_channels, channels, dilation=1)
        self.predictor = Float32MaskPredictor(channels[-1], options.predictor_channels, num_classes)

    def forward(self, pyramid: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        """Mask logits (N, K + 1, M, M) of all regions."""
        return self.predictor(self.head(self.pool(pyramid, boxes, sizes)))

    def loss(
        self, pyramid: dict[str, Tensor], sizes: list[tuple[int, int]], regions: SampledRoIs, targets: list[Target]
    ) -> Tensor:
        """Return the binary cross entropy of the masks of the regions that hold an object, each of its class."""
        positives = regions.positives()
        boxes = [of_image[chosen] for of_image, chosen in zip(regions.boxes, positives, strict=True)]
        matched = [of_image[chosen] for of_image, chosen in zip(regions.matched, positives, strict=True)]
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
        """Return the annotated masks (G, H, W) of the objects `matched` within `boxes`, 0 or 1: (N, side, side)."""
        rois = torch.cat([matched[:, None].to(boxes), boxes], 1)
        covered = roi_align(masks[:, None].to(boxes), rois, side, aligned=self.pool.aligned)[:, 0]
        return (covered >= MASK_THRESHOLD).to(boxes)

    def probabilities(
        self, pyramid: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]], labels: list[Tensor]
    ) -> list[Tensor]:
        """The mask of each box's class, (N, 1, M, M) per image."""
        return maskrcnn_inference(self(pyramid, boxes, sizes), labels)
