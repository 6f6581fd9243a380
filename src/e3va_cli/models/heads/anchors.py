"""Anchors of the levels of a pyramid, as in mmdetection or in torchvision, and their matching to objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from e3va_cli.models.heads.torchvision_private import Matcher

NUM_LEVELS = 5  # of the pyramids of detectors


class ExactAnchors(AnchorGenerator):
    """Anchors with sides that are not rounded, centered on multiples of a level's stride, in float32.

    Torchvision rounds corners to whole pixels, takes `image side // map side` for the stride (61 instead of 64 where
    800 pixels became 13 cells) and computes in the dtype of the feature maps (steps of 8 pixels in bfloat16).

    Args:
        sizes: sides of the square anchors of each level, in pixels.
        aspect_ratios: height / width.
        strides: pixels from one cell to the next, one for each level.
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
        """Return the anchors (A, 4) of the cell at the origin: all sizes of the first ratio, then of the next."""
        sides = torch.as_tensor(scales, dtype=dtype, device=device)
        roots = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[:, None]
        widths, heights = (sides / roots).flatten(), (sides * roots).flatten()
        return torch.stack([-widths, -heights, widths, heights], 1) / 2

    def forward(self, images: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return for each image the anchors (A, 4) of all levels; it is one tensor, shared."""
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        anchors = torch.cat(self.grid_anchors([m.shape[-2:] for m in feature_maps], [[s, s] for s in self.strides]))
        return [anchors] * len(images.image_sizes)


def anchor_errors(key: str, sizes: Sequence[int] | None) -> Iterator[str]:
    """Yield what is wrong with the sizes of anchors that the option `key` gives to a pyramid's levels."""
    if sizes is not None and (len(sizes) != NUM_LEVELS or min(sizes) < 1):
        yield f"{key}={sizes}: {NUM_LEVELS} sizes in pixels, one for each level of the feature pyramid"


def build_anchors(
    sizes: Sequence[Sequence[float]], aspect_ratios: Sequence[float], strides: Sequence[int], *, exact: bool
) -> AnchorGenerator:
    """Return the anchor generator of a pyramid: `ExactAnchors`, or torchvision's own (whole sides)."""
    if exact:
        return ExactAnchors(sizes, aspect_ratios, strides)
    whole = tuple(tuple(int(size) for size in of_level) for of_level in sizes)
    return AnchorGenerator(whole, (tuple(aspect_ratios),) * len(sizes))


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
