"""The mask branch of Mask R-CNN (arXiv 1703.06870), of torchvision's parts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.roi_heads import maskrcnn_inference, maskrcnn_loss
from torchvision.ops import MultiScaleRoIAlign

from e3va_cli.heads.head import Target
from e3va_cli.heads.predictors import Float32MaskPredictor
from e3va_cli.heads.pyramid import LEVELS
from e3va_cli.heads.region_sampling import Regions


class MaskBranch(nn.Module):
    """A mask for every class in each region.

    Args:
        in_channels: of every pyramid level.
        num_classes: background counted.
        roi_size: height and width that regions are cut out at.
        sampling_ratio: of RoIAlign.
        channels: of the convolutions.
        predictor_channels: of the transposed convolution that doubles the resolution.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        roi_size: int,
        sampling_ratio: int,
        channels: Sequence[int],
        predictor_channels: int,
    ) -> None:
        super().__init__()
        self.pool = MultiScaleRoIAlign(LEVELS, roi_size, sampling_ratio)
        self.head = MaskRCNNHeads(in_channels, channels, dilation=1)
        self.predictor = Float32MaskPredictor(channels[-1], predictor_channels, num_classes)

    def forward(self, pyramid: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        """Mask logits (N, K + 1, M, M) of all regions."""
        return self.predictor(self.head(self.pool(pyramid, boxes, sizes)))

    def loss(
        self, pyramid: dict[str, Tensor], sizes: list[tuple[int, int]], regions: Regions, targets: list[Target]
    ) -> Tensor:
        """Binary cross entropy of the masks of the regions that hold an object."""
        positives = regions.positives()
        boxes = [of_image[chosen] for of_image, chosen in zip(regions.boxes, positives, strict=True)]
        matched = [of_image[chosen] for of_image, chosen in zip(regions.matched, positives, strict=True)]
        masks, labels = [t["masks"] for t in targets], [t["labels"] for t in targets]
        return maskrcnn_loss(self(pyramid, boxes, sizes), boxes, masks, labels, matched)

    def probabilities(
        self, pyramid: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]], labels: list[Tensor]
    ) -> list[Tensor]:
        """The mask of each box's class, (N, 1, M, M) per image."""
        return maskrcnn_inference(self(pyramid, boxes, sizes), labels)
