"""Mean intersection over union of semantic segmentation, as mmsegmentation's IoUMetric computes it.

All pixels of the data set are counted in one confusion matrix; a class's IoU is that of its pixels in all images
together, not a mean over images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from e3va_cli.data import DenseDataset, Target
from e3va_cli.evaluation.base import Results, register
from e3va_cli.models.heads import Segmentation
from e3va_cli.runs.folder import CONFUSION_MATRIX_PLOT
from e3va_cli.visualization.confusion_matrix import draw_confusion

LOGGED = ("mIoU", "pixel_accuracy")


class MeanIoU:
    """Counts pixels image by image, at the images' original sizes; pixels that are not labelled do not count.

    Args:
        classes: name of class k at index k - 1.

    Attributes:
        matrix: int64 (K, K), pixels of class row + 1 that were taken for class column + 1.
        images: that were counted.
    """

    monitor = "mIoU"

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = list(classes)
        self.reset()

    def reset(self) -> None:
        """Forget all counts."""
        self.matrix = torch.zeros(len(self.classes), len(self.classes), dtype=torch.int64)
        self.images = 0

    def update(self, found: Segmentation, target: Target) -> None:
        """Count the pixels of one image."""
        # Counted on the CPU: on a GPU bincount is not deterministic, and torchmetrics' way round it takes a row of
        # K * K numbers for each pixel.
        predicted = found.labels(target["original_size"]).cpu().long()  # H, W
        annotated = target["semantic"].cpu().long()  # H, W
        labelled = annotated > 0
        count = len(self.classes)
        cells = (annotated[labelled] - 1) * count + predicted[labelled] - 1
        self.matrix += torch.bincount(cells, minlength=count * count).view(count, count)
        self.images += 1

    def share(self) -> tuple[Tensor, int]:
        """The confusion matrix and the number of images."""
        return self.matrix, self.images

    def gather(self, shares: Sequence[tuple[Tensor, int]]) -> None:
        """Take the sums over all processes."""
        matrices, images = zip(*shares, strict=True)
        self.matrix, self.images = torch.stack(matrices).sum(0), sum(images)

    def compute(self) -> Results:
        """`{"mIoU": .., "pixel_accuracy": .., "mean_accuracy": .., "per_class": {name: IoU}}`, 0..1.

        mIoU is the mean over classes that occur in annotations or predictions (a class only predicted counts as 0),
        mean_accuracy over those that occur in annotations. None where nothing is to be measured.
        """
        hits = self.matrix.diagonal()
        annotated, predicted = self.matrix.sum(1), self.matrix.sum(0)
        ious = _ratios(hits, annotated + predicted - hits)
        (pixel_accuracy,) = _ratios(hits.sum()[None], self.matrix.sum()[None])
        return {
            "mIoU": _mean(ious),
            "pixel_accuracy": pixel_accuracy,
            "mean_accuracy": _mean(_ratios(hits, annotated)),
            "per_class": dict(zip(self.classes, ious, strict=True)),
        }

    def scores(self, results: Results) -> dict[str, float]:
        """mIoU and pixel accuracy."""
        return {name: results[name] for name in LOGGED if results[name] is not None}

    def leave(self, folder: Path) -> dict[str, str]:
        """The picture of the confusion matrix."""
        draw_confusion(self.matrix.numpy(), self.classes, folder / CONFUSION_MATRIX_PLOT)
        return {CONFUSION_MATRIX_PLOT: "which class is taken for which"}


@register("miou", needs="semantic")
def miou(dataset: DenseDataset, kinds: Sequence[str]) -> MeanIoU:
    """Mean IoU over a data set's classes."""
    return MeanIoU(dataset.classes)


def _ratios(parts: Tensor, wholes: Tensor) -> list[float | None]:
    """Part by whole, None where the whole is 0."""
    return [part / whole if whole else None for part, whole in zip(parts.tolist(), wholes.tolist(), strict=True)]


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean of what is not None."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None
