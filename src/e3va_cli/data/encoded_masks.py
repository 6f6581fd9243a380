"""Masks kept as polygons or RLE until the image is resized, and rasterized at the new size.

Full-size masks of a large image take gigabytes: 6.7 GiB for 300 objects in 6000 x 4000 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torchvision import tv_tensors

from e3va_cli.data.formats.coco_segmentation import decode_counts, to_rle

Size = tuple[int, int]


class EncodedMasks:
    """N masks, each polygons or RLE in COCO's format, of an image of `size` (H, W)."""

    def __init__(self, segmentations: Sequence[Any], size: Size) -> None:
        self.segmentations, self.size = list(segmentations), size

    def __len__(self) -> int:
        return len(self.segmentations)

    def at(self, size: Size) -> tv_tensors.Mask:
        """Return the masks of the image resized to (h, w): uint8 [N, h, w].

        Polygons are scaled before rasterization; RLE is sampled at the nearest pixel, as in torchvision's resize.
        """
        masks = np.zeros((len(self), *size), dtype=np.uint8)
        for mask, segmentation in zip(masks, self.segmentations, strict=True):
            if isinstance(segmentation, list):
                mask[:] = coco_mask.decode(to_rle(self._scaled(segmentation, size), *size))
            else:
                self._draw_runs(mask, segmentation)
        return tv_tensors.Mask(torch.from_numpy(masks))

    def _scaled(self, polygons: list[list[float]], size: Size) -> list[list[float]]:
        if size == self.size:
            return polygons
        height, width = (new / old for new, old in zip(size, self.size, strict=True))
        return [(np.array(polygon).reshape(-1, 2) * (width, height)).ravel().tolist() for polygon in polygons]

    def _draw_runs(self, mask: np.ndarray, rle: dict[str, Any]) -> None:
        """Fill the bounding box of a resized mask [h, w] by looking its pixels up in the run lengths."""
        counts = rle["counts"]
        if isinstance(counts, bytes):
            counts = counts.decode("ascii")
        ends = np.cumsum(np.array(counts, dtype=np.int64) if isinstance(counts, list) else decode_counts(counts))
        x, y, w, h = coco_mask.toBbox(to_rle(rle, *self.size)).tolist()
        height, width = self.size
        rows, columns = (
            np.arange(mask.shape[0]) * height // mask.shape[0],
            np.arange(mask.shape[1]) * width // mask.shape[1],
        )
        top, bottom = np.searchsorted(rows, [y, y + h])
        left, right = np.searchsorted(columns, [x, x + w])
        indices = columns[left:right] * height + rows[top:bottom, None]  # column-major
        mask[top:bottom, left:right] = np.searchsorted(ends, indices, side="right") % 2
