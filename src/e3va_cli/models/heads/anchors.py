"""Anchors of the levels of a pyramid, placed as mmdetection does it or as torchvision does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

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
