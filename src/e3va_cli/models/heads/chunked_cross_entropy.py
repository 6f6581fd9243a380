"""The loss of a segmentation: cross entropy of every labelled pixel, some rows of the images at a time.

At the images' size, scores are the largest tensors of a step (150 classes at 512x512: 150 MiB an image, and autograd
keeps two of them). A strip's are gone before the next strip's; kept is the gradient at the scores' own size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

from e3va_cli.models.heads.eager_backward import eager_backward
from e3va_cli.utils.amp import without_autocast

CHUNK_ELEMENTS = 2**23  # scores of pixels, in a strip


def chunked_cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over the labelled pixels of a batch, with scores brought to every pixel bilinearly.

    Args:
        scores: float32 (B, K, H / s, W / s), for a whole s.
        labels: (B, H, W), 1..K; 0 is not labelled.

    Returns:
        One number; 0 where no pixel is labelled.
    """
    batch, classes, rows, _ = scores.shape
    scale = labels.shape[-2] // rows
    chunk_rows = max(1, CHUNK_ELEMENTS // (batch * classes * scale * labels.shape[-1]))
    labelled = (labels > 0).sum().clamp(min=1)

    def row_chunks(inputs: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        for first in range(0, rows, chunk_rows):
            last = min(first + chunk_rows, rows)
            pixels = upsample_rows(inputs["scores"], first, last, scale)
            indices = labels[:, first * scale : last * scale].long() - 1
            # Summed outside: the reductions of cross_entropy over a map are not deterministic on a GPU.
            each = cross_entropy(pixels, indices, ignore_index=-1, reduction="none")
            yield {f"rows from {first}": each.sum() / labelled}

    with without_autocast(scores):
        return torch.stack(list(eager_backward(row_chunks, {"scores": scores}, ()).values())).sum()


def upsample_rows(x: Tensor, first: int, last: int, scale: int) -> Tensor:
    """Rows `first` to `last` of x, made `scale` times larger: (B, C, h, w) to (B, C, (last - first) * s, w * s)."""
    above, below = max(first - 1, 0), min(last + 1, x.shape[-2])  # a pixel lies between two rows
    part = x[:, :, above:below]
    size = (part.shape[-2] * scale, part.shape[-1] * scale)
    enlarged = interpolate(part, size, mode="bilinear", align_corners=False)
    return enlarged.narrow(2, (first - above) * scale, (last - first) * scale)
