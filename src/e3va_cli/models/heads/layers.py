"""Layers that several heads share: group norm, and torchvision's last layers with outputs in float32.

Under 16-bit autocast torchvision decodes boxes in the dtype of the regression: bfloat16 has 8 bits for coordinates up
to 1333, and NMS has no bfloat16 kernel. So these layers return float32, and boxes are decoded in it.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

MAX_GROUPS = 32
MIN_CHANNELS_PER_GROUP = 8  # with two, a 1x1 map would keep no more than their order


def group_norm(channels: int) -> nn.GroupNorm:
    """Build a group norm (arXiv 1803.08494), which unlike batch norm suits batches of one or two images."""
    return nn.GroupNorm(num_groups(channels), channels)


def num_groups(channels: int) -> int:
    """Return the largest divisor of `channels` up to 32 that leaves 8 channels or more to each group, else 1."""
    most = max(1, min(MAX_GROUPS, channels // MIN_CHANNELS_PER_GROUP))
    return next(groups for groups in range(most, 0, -1) if channels % groups == 0)


class Float32RPNHead(RPNHead):
    """Torchvision's RPN head with outputs in float32."""

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return objectness (B, A, H, W) and box deltas (B, 4A, H, W) per level."""
        objectness, deltas = super().forward(features)
        return [o.float() for o in objectness], [d.float() for d in deltas]


class Float32BoxPredictor(FastRCNNPredictor):
    """Torchvision's box predictor with outputs in float32."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return class logits (N, K + 1) and box deltas (N, 4 (K + 1))."""
        scores, deltas = super().forward(x)
        return scores.float(), deltas.float()


class Float32MaskPredictor(MaskRCNNPredictor):
    """Torchvision's mask predictor with outputs in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Return mask logits (N, K + 1, M, M)."""
        return super().forward(x).float()


class CascadeBoxPredictor(nn.Module):
    """Class scores and box deltas of a box stage, initialized to small scores and deltas (arXiv 1504.08083).

    Args:
        in_channels: channels of RoI features.
        num_classes: classes with background, which has no box.
        class_agnostic: one box for all classes, instead of one per class.
    """

    def __init__(self, in_channels: int, num_classes: int, *, class_agnostic: bool) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_channels, num_classes)
        self.bbox_pred = nn.Linear(in_channels, 4 if class_agnostic else 4 * (num_classes - 1))
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):  # section 4.1
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return class logits (N, K + 1) and box deltas (N, 4 K), or (N, 4), in float32."""
        return self.cls_score(x).float(), self.bbox_pred(x).float()
