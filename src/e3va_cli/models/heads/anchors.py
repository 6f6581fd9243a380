"""Anchors of the levels of a pyramid, as in mmdetection or in torchvision, and their matching to objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from e3va_cli.models.heads.torchvision_private import Matcher

NUM_LEVELS = 5  # of detectors' feature pyramids


class ExactAnchors(AnchorGenerator):
    """Unrounded float32 anchors, centered on multiples of a level's stride.

    Torchvision rounds corners to whole pixels, uses `image side // map side` as stride (61 instead of 64 for 13 cells
    on 800 pixels) and computes in the dtype of the feature maps (steps of 8 pixels in bfloat16).

    Args:
        sizes: sides of square anchors, in pixels, for each level.
        aspect_ratios: height / width.
        strides: pixels per cell, for each level.
    """

    def __init__(
        self, sizes: Sequence[Sequence[float]], aspect_ratios: Sequence[float], strides: Sequence[int]
    ) -> None:
        super().__init__(tuple(map(tuple, sizes)), (tuple(aspect_ratios),) * len(sizes))
        self.strides = list(strides)

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> Tensor:
        """Return the anchors (A, 4) of the cell at the origin, ratio by ratio, each with all sizes."""
        sides = torch.as_tensor(scales, dtype=dtype, device=device)
        roots = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[:, None]
        widths, heights = (sides / roots).flatten(), (sides * roots).flatten()
        return torch.stack([-widths, -heights, widths, heights], 1) / 2

    def forward(self, images: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return the anchors (A, 4) of all levels for each image, as one shared tensor."""
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        anchors = torch.cat(self.grid_anchors([m.shape[-2:] for m in feature_maps], [[s, s] for s in self.strides]))
        return [anchors] * len(images.image_sizes)


def anchor_errors(key: str, sizes: Sequence[int] | None) -> Iterator[str]:
    """Yield errors in the anchor sizes of the option `key`."""
    if sizes is not None and (len(sizes) != NUM_LEVELS or min(sizes) < 1):
        yield f"{key}={sizes}: must be {NUM_LEVELS} sizes in pixels, one per pyramid level"


def build_anchors(
    sizes: Sequence[Sequence[float]], aspect_ratios: Sequence[float], strides: Sequence[int], *, exact: bool
) -> AnchorGenerator:
    """Build the anchor generator of a pyramid: `ExactAnchors`, or torchvision's with integer sizes."""
    if exact:
        return ExactAnchors(sizes, aspect_ratios, strides)
    integer_sizes = tuple(tuple(map(int, level_sizes)) for level_sizes in sizes)
    return AnchorGenerator(integer_sizes, (tuple(aspect_ratios),) * len(sizes))


class MaxIoUMatcher(Matcher):
    """Torchvision's matcher with the low-quality matches of mmdetection's MaxIoUAssigner.

    Each object gets the anchors with the highest IoU with it. Torchvision assigns such an anchor to the object with
    the highest IoU with the anchor, so that an object may get none, and accepts an IoU of 0.

    Args:
        fg_iou, bg_iou: IoU from which an anchor is positive, and below which it is negative.
        min_pos_iou: minimum IoU of an object's best anchors, which must also be above 0.
    """

    def __init__(self, fg_iou: float, bg_iou: float, min_pos_iou: float) -> None:
        super().__init__(fg_iou, bg_iou, allow_low_quality_matches=True)
        self.min_pos_iou = min_pos_iou

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor) -> None:
        """Update `matches` (A,) from IoUs (G, A); an anchor of several objects gets the last."""
        best = match_quality_matrix.max(1, keepdim=True).values
        chosen = (match_quality_matrix == best) & (best >= self.min_pos_iou) & (best > 0)
        indices = torch.arange(len(chosen), dtype=torch.int32, device=chosen.device)[:, None]
        objects = torch.where(chosen, indices, -1).amax(0)  # shapes do not depend on values
        matches.copy_(torch.where(objects >= 0, objects, matches))


def match_anchors(anchors: Tensor, boxes: Tensor, usable: Tensor, matcher: Matcher) -> Tensor:
    """Return the index of each anchor's object (A,), or one of the matcher's negative codes.

    Args:
        anchors: (A, 4).
        boxes: ground-truth boxes (G, 4).
        usable: (A,) bool; the others are ignored in training.
    """
    if len(boxes):
        matches = matcher(box_iou(boxes, anchors).masked_fill_(~usable, -1))
    else:
        matches = torch.full_like(usable, matcher.BELOW_LOW_THRESHOLD, dtype=torch.int64)
    return matches.masked_fill_(~usable, matcher.BETWEEN_THRESHOLDS)
