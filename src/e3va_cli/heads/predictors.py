"""Torchvision's last layers with their results in float32.

Under 16-bit autocast torchvision decodes boxes in the dtype of the regression: bfloat16 has 8 bits for coordinates up
to 1333, and NMS has no bfloat16 kernel. From here on detection is arithmetic on boxes, so it is done in float32.
"""

from __future__ import annotations

from torch import Tensor
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead


class Float32RPNHead(RPNHead):
    """Torchvision's RPN head, results in float32."""

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Objectness (B, A, H, W) and box deltas (B, 4A, H, W) per level."""
        objectness, deltas = super().forward(features)
        return [o.float() for o in objectness], [d.float() for d in deltas]


class Float32BoxPredictor(FastRCNNPredictor):
    """Torchvision's box predictor, results in float32."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (N, K + 1) and box deltas (N, 4 (K + 1))."""
        scores, deltas = super().forward(x)
        return scores.float(), deltas.float()


class Float32MaskPredictor(MaskRCNNPredictor):
    """Torchvision's mask predictor, results in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Mask logits (N, K + 1, M, M)."""
        return super().forward(x).float()
