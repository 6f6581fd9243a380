"""Mean intersection over union of semantic segmentation, as in mmsegmentation's IoUMetric.

All pixels of the data set enter one confusion matrix; the IoU of a class is over all images together, not a mean over
images.
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
from e3va_cli.visualization.confusion_matrix import plot_confusion_matrix

LOGGED = ("mIoU", "pixel_accuracy")


class MeanIoU:
    """Confusion matrix of all pixels at the images' original sizes; unlabeled pixels are ignored.

    Args:
        classes: name of class k at index k - 1.

    Attributes:
        matrix: int64 (K, K), pixels annotated as class row + 1 and predicted as class column + 1.
        num_images: images since the last reset.
    """

    monitor = "mIoU"

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = list(classes)
        self.reset()

    def reset(self) -> None:
        """Discard all counts."""
        self.matrix = torch.zeros(len(self.classes), len(self.classes), dtype=torch.int64)
        self.num_images = 0

    def update(self, prediction: Segmentation, target: Target) -> None:
        """Count the pixels of one image."""
        # On the CPU: bincount is nondeterministic on a GPU, and torchmetrics' deterministic alternative allocates
        # K * K numbers for each pixel.
        predicted = prediction.labels(target["original_size"]).cpu().long()  # H, W
        annotated = target["semantic"].cpu().long()  # H, W
        labeled = annotated > 0
        count = len(self.classes)
        cells = (annotated[labeled] - 1) * count + predicted[labeled] - 1
        self.matrix += torch.bincount(cells, minlength=count * count).view(count, count)
        self.num_images += 1

    def state(self) -> tuple[Tensor, int]:
        """Return the confusion matrix and the number of images."""
        return self.matrix, self.num_images

    def merge(self, states: Sequence[tuple[Tensor, int]]) -> None:
        """Sum the counts of all ranks."""
        matrices, num_images = zip(*states, strict=True)
        self.matrix, self.num_images = torch.stack(matrices).sum(0), sum(num_images)

    def compute(self) -> Results:
        """Return `{"mIoU": .., "pixel_accuracy": .., "mean_accuracy": .., "per_class": {name: IoU}}`, 0..1.

        mIoU averages over classes that occur in annotations or predictions (a class that is only predicted has IoU 0),
        mean_accuracy over classes that occur in annotations. None where there is nothing to evaluate.
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

    def log_dict(self, results: Results) -> dict[str, float]:
        """Return mIoU and pixel accuracy."""
        return {name: results[name] for name in LOGGED if results[name] is not None}

    def save(self, folder: Path) -> dict[str, str]:
        """Plot the confusion matrix."""
        plot_confusion_matrix(self.matrix.numpy(), self.classes, folder / CONFUSION_MATRIX_PLOT)
        return {CONFUSION_MATRIX_PLOT: "confusion matrix"}


@register("miou", target_type="semantic")
def miou(dataset: DenseDataset, target_types: Sequence[str]) -> MeanIoU:
    """Build mean IoU over the classes of a data set."""
    return MeanIoU(dataset.classes)


def _ratios(parts: Tensor, wholes: Tensor) -> list[float | None]:
    """Return part / whole, None where the whole is 0."""
    return [part / whole if whole else None for part, whole in zip(parts.tolist(), wholes.tolist(), strict=True)]


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are not None."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None
