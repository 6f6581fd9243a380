"""Whether a run-length encoded mask is sound.

pycocotools fills what a too short encoding leaves open with whatever lay in memory, so it must not see one.
"""

from typing import Any

import numpy as np


def validate_rle(rle: dict[str, Any], height: int, width: int) -> str | None:
    """What is wrong with COCO's `{"size": [H, W], "counts": ...}` for an image of that size, or None.

    `counts` holds the lengths of the runs of 0 and 1 in turn, down the columns: a list, or COCO's short text.
    """
    size = rle.get("size")
    if not isinstance(size, list) or any(type(side) is not int for side in size):
        return "malformed RLE"
    if size != [height, width]:
        return "RLE of another size"
    counts = rle.get("counts")
    try:
        runs = np.array(counts) if isinstance(counts, list) else decode_counts(counts)
    except (ValueError, OverflowError):
        return "malformed RLE"
    if runs.ndim != 1 or runs.dtype.kind != "i":
        return "malformed RLE"
    # Looked at one by one, as a sum of huge runs can overflow to the right number.
    if (runs < 0).any() or (runs > height * width).any() or runs.sum() != height * width:
        return "malformed RLE"
    return None


def decode_counts(text: Any) -> np.ndarray:
    """The run lengths, int64 [R], in COCO's compressed text.

    Each run is a signed number in groups of five bits, the low ones first, in characters from "0"; a sixth
    bit says that more follow. From the fourth run on, it is the difference to the run before the last.

    Raises:
        ValueError: the text is none of that kind.
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
