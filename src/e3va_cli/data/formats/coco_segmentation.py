"""COCO's segmentations, polygons or RLE: what pycocotools must not see, and their encoding for it.

pycocotools reads uninitialized memory beyond a too short RLE, and keeps 80 bytes for each pixel along polygon edges.
"""

from __future__ import annotations

from itertools import pairwise
from math import isfinite
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

MAX_COORDINATE = 1e6
MAX_OUTLINE = 4e6  # pixels


def validate_segmentation(segmentation: Any, height: int, width: int) -> list[str]:
    """Return all errors of a segmentation; an empty one has none, it is no mask."""
    if not segmentation:
        return []
    if isinstance(segmentation, dict):
        error = validate_rle(segmentation, height, width)
        return [error] if error else []
    if not isinstance(segmentation, list):
        return ["segmentation is neither polygons nor RLE"]
    return [error for polygon in segmentation if (error := _validate_polygon(polygon))]


def usable_segmentation(segmentation: Any, height: int, width: int) -> Any:
    """Return the segmentation without its invalid polygons, None if nothing is left."""
    if isinstance(segmentation, list):
        return [polygon for polygon in segmentation if not _validate_polygon(polygon)] or None
    return None if validate_segmentation(segmentation, height, width) else segmentation or None


def to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Return pycocotools' RLE of a valid segmentation: polygons, uncompressed or compressed RLE."""
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return segmentation


def validate_rle(rle: dict[str, Any], height: int, width: int) -> str | None:
    """Return the error of COCO's `{"size": [H, W], "counts": ...}` for an image of that size, or None.

    `counts` holds the lengths of alternating runs of 0 and 1 in column-major order: a list, or COCO's compressed text.
    """
    size = rle.get("size")
    if not isinstance(size, list) or any(type(side) is not int for side in size):
        return "malformed RLE"
    if size != [height, width]:
        return "RLE of another size than the image"
    counts = rle.get("counts")
    try:
        runs = np.array(counts) if isinstance(counts, list) else decode_counts(counts)
    except (ValueError, OverflowError):
        return "malformed RLE"
    if runs.ndim != 1 or runs.dtype.kind != "i":
        return "malformed RLE"
    # Each run is checked, as the sum of huge runs can overflow to the right number.
    if (runs < 0).any() or (runs > height * width).any() or runs.sum() != height * width:
        return "malformed RLE"
    return None


def decode_counts(text: Any) -> np.ndarray:
    """Return the run lengths, int64 [R], of COCO's compressed text.

    Each run is a signed number in groups of five bits, the low ones first, in characters from "0"; a sixth bit marks
    that more follow. From the fourth run on, it is the difference to the run before the last.

    Raises:
        ValueError: the text is no compressed RLE.
    """
    if not isinstance(text, str) or not text.isascii():
        raise ValueError("not a compressed RLE")
    codes = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) - ord("0")
    if len(codes) == 0 or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("not a compressed RLE")
    last = np.flatnonzero(codes & 32 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    digits = last - first + 1
    if digits.max() > 7:
        raise ValueError("not a compressed RLE")
    position = np.arange(len(codes)) - np.repeat(first, digits)
    runs = np.add.reduceat((codes & 31) << (5 * position), first)
    runs -= np.where(codes[last] & 16, 1 << (5 * digits), 0)  # two's complement
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


def _validate_polygon(polygon: object) -> str | None:
    if not isinstance(polygon, list) or len(polygon) % 2:
        return "malformed polygon"
    if not set(map(type, polygon)) <= {int, float}:
        return "malformed polygon"
    if len(polygon) < 6:
        return "polygon with fewer than 3 points"
    # max() can pass over a NaN, the sum cannot. A COCO file has tens of millions of coordinates.
    extent = max(map(abs, polygon))
    valid = extent < MAX_COORDINATE and isfinite(sum(polygon))
    # No edge is longer than twice the extent, so that nearly all polygons need no sum over edges.
    valid = valid and (extent * len(polygon) < MAX_OUTLINE or _outline(polygon) < MAX_OUTLINE)
    return None if valid else "malformed polygon"


def _outline(polygon: list[float]) -> float:
    """Return the number of pixels along the edges."""
    points = list(zip(polygon[::2], polygon[1::2], strict=True))
    return sum(max(abs(x2 - x1), abs(y2 - y1)) for (x1, y1), (x2, y2) in pairwise([*points, points[0]]))
