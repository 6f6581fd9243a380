"""Class scores of large images from windows that overlap, as networks trained on crops are evaluated."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import interpolate


def window_starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side, in pixels; the last one is moved back to end with the side."""
    last = max(side - window, 0)
    return [*range(0, last, stride), last]


def sliding_scores(score: Callable[[Tensor], Tensor], images: Tensor, *, window: int, stride: int) -> Tensor:
    """The scores of every pixel, averaged over the windows that it lies in: float32 (B, K, H, W).

    Beside the result, only one window's scores are in memory.

    Args:
        score: images (B, 3, h, w) to scores (B, K, .., ..) of any resolution; called with one window at a time.
        images: (B, 3, H, W).
        window: side of the square windows in pixels; a window is cut to a side of the images that is shorter.
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
