"""Sliding-window inference: class scores of large images from overlapping windows."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import interpolate


def window_starts(side: int, window: int, stride: int) -> list[int]:
    """Return where windows start along a side, in pixels; the last one ends with the side."""
    last = max(side - window, 0)
    return [*range(0, last, stride), last]


def sliding_scores(score: Callable[[Tensor], Tensor], images: Tensor, *, window: int, stride: int) -> Tensor:
    """Average each pixel's scores over its windows: float32 (B, K, H, W).

    Only one window's scores and the result are in memory.

    Args:
        score: images (B, 3, h, w) to scores (B, K, .., ..) of any resolution; called once per window.
        images: (B, 3, H, W).
        window: side of the square windows in pixels; clipped to the image size.
        stride: pixels from one window to the next, at most `window`.
    """
    batch, _, height, width = images.shape
    h, w = min(window, height), min(window, width)
    total: Tensor | None = None
    cover = images.new_zeros(height, width)
    for top in window_starts(height, h, stride):
        for left in window_starts(width, w, stride):
            scores = score(images[:, :, top : top + h, left : left + w]).float()
            if total is None:
                total = scores.new_zeros(batch, scores.shape[1], height, width)
            total[:, :, top : top + h, left : left + w] += interpolate(scores, (h, w), mode="bilinear")
            cover[top : top + h, left : left + w] += 1
    assert total is not None
    return total.div_(cover)
