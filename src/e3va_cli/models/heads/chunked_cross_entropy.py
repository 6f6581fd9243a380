"""Cross entropy of labeled pixels, computed in chunks of rows.

Upsampled scores are the largest tensors of a step (150 classes at 512x512: 150 MiB per image, and autograd saves two).
Here a chunk's are freed before the next chunk; only the gradient at the resolution of the scores is saved.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

from e3va_cli.models.heads.eager_backward import eager_backward
from e3va_cli.utils.amp import without_autocast

CHUNK_ELEMENTS = 2**23  # upsampled scores in a chunk


def chunked_cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean cross entropy over the labeled pixels of a batch, with bilinearly upsampled scores.

    Args:
        scores: float32 (B, K, H / s, W / s), for an integer s.
        labels: (B, H, W), 1..K; 0 is unlabeled.

    Returns:
        A scalar; 0 if no pixel is labeled.
    """
    batch, classes, rows, _ = scores.shape
    scale = labels.shape[-2] // rows
    chunk_rows = max(1, CHUNK_ELEMENTS // (batch * classes * scale * labels.shape[-1]))
    num_labeled = (labels > 0).sum().clamp(min=1)

    def row_chunks(inputs: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        for first in range(0, rows, chunk_rows):
            last = min(first + chunk_rows, rows)
            pixels = upsample_rows(inputs["scores"], first, last, scale)
            indices = labels[:, first * scale : last * scale].long() - 1
            # Summed separately: reductions of cross_entropy over maps are not deterministic on GPUs.
            each = cross_entropy(pixels, indices, ignore_index=-1, reduction="none")
            yield {f"rows from {first}": each.sum() / num_labeled}

    with without_autocast(scores):
        return torch.stack(list(eager_backward(row_chunks, {"scores": scores}, ()).values())).sum()


def upsample_rows(x: Tensor, first: int, last: int, scale: int) -> Tensor:
    """Upsample rows `first` to `last` of x by `scale`: (B, C, h, w) to (B, C, (last - first) * s, w * s)."""
    above, below = max(first - 1, 0), min(last + 1, x.shape[-2])  # interpolation reads one row more
    part = x[:, :, above:below]
    size = (part.shape[-2] * scale, part.shape[-1] * scale)
    enlarged = interpolate(part, size, mode="bilinear", align_corners=False)
    return enlarged.narrow(2, (first - above) * scale, (last - first) * scale)
