"""Which anchors are trained on which object, as mmdetection's MaxIoUAssigner decides it."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou


class MaxIoUMatcher(Matcher):
    """Torchvision's matcher, but each object gets the anchors that overlap it most.

    Torchvision leaves such an anchor to the object that overlaps the anchor most, so that another may be left without
    any, and takes an overlap of 0 for a best one too.

    Args:
        fg_iou, bg_iou: overlap from which on an anchor holds an object, and below which it holds none.
        least_iou: overlap that an object's best anchors need (`min_pos_iou`); more than 0 in any case.
    """

    def __init__(self, fg_iou: float, bg_iou: float, least_iou: float) -> None:
        super().__init__(fg_iou, bg_iou, allow_low_quality_matches=True)
        self.least_iou = least_iou

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor) -> None:
        """Write into `matches` (A,), from overlaps (G, A); of several objects, an anchor gets the last."""
        best = match_quality_matrix.max(1, keepdim=True).values
        chosen = (match_quality_matrix == best) & (best >= self.least_iou) & (best > 0)
        indices = torch.arange(len(chosen), dtype=torch.int32, device=chosen.device)[:, None]
        objects = torch.where(chosen, indices, -1).amax(0)  # no list of pairs: sizes depend on no values
        matches.copy_(torch.where(objects >= 0, objects, matches))


def match_anchors(anchors: Tensor, boxes: Tensor, usable: Tensor, matcher: Matcher) -> Tensor:
    """Return for each anchor the index of its object (A,), or one of the matcher's negative codes.

    Args:
        anchors: (A, 4).
        boxes: (G, 4), annotated.
        usable: (A,) bool; the other anchors are left out of training: they match nothing and count for nothing.
    """
    if len(boxes):
        matches = matcher(box_iou(boxes, anchors).masked_fill_(~usable, -1))
    else:
        matches = torch.full_like(usable, matcher.BELOW_LOW_THRESHOLD, dtype=torch.int64)
    return matches.masked_fill_(~usable, matcher.BETWEEN_THRESHOLDS)
