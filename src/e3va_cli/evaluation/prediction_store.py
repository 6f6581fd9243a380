"""Detections by image: collected, merged across ranks, and saved in COCO's results format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from e3va_cli.evaluation.base import Results
from e3va_cli.runs.folder import DETECTIONS, PRECISION_RECALL_PLOT
from e3va_cli.utils.files import atomic_write
from e3va_cli.visualization.precision_recall import PrecisionRecall, plot_precision_recall

Prediction = TypeVar("Prediction")


class PredictionStore(Generic[Prediction]):
    """Predictions by image id. Only images in the store are evaluated, so a subset of a data set can be."""

    def __init__(self) -> None:
        self.predictions: dict[int, Prediction] = {}

    @property
    def num_images(self) -> int:
        """Images since the last reset."""
        return len(self.predictions)

    def reset(self) -> None:
        """Discard all predictions."""
        self.predictions = {}

    def state(self) -> dict[int, Prediction]:
        """Return the predictions by image id."""
        return self.predictions

    def merge(self, states: Sequence[dict[int, Prediction]]) -> None:
        """Take the predictions of all ranks."""
        self.predictions = {image_id: prediction for state in states for image_id, prediction in state.items()}


def save_predictions(results: Iterable[Results], curves: dict[str, PrecisionRecall], folder: Path) -> dict[str, str]:
    """Write detections and precision-recall curves; return a description of each file by its name."""
    write_detections(results, folder / DETECTIONS)
    plot_precision_recall(curves, folder / PRECISION_RECALL_PLOT)
    return {
        DETECTIONS: "all detections in COCO's results format",
        PRECISION_RECALL_PLOT: "precision-recall curves at IoU 0.5",
    }


def write_detections(results: Iterable[dict[str, Any]], path: Path) -> None:
    """Write detections in COCO's results format (https://cocodataset.org/#format-results), one at a time.

    Args:
        results: `image_id`, `category_id`, `bbox` (x, y, width, height in pixels), `score` and, for masks,
            `segmentation`, as pycocotools encodes it.
        path: of the JSON file.
    """
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write("[")
        for index, result in enumerate(results):
            mask = result.get("segmentation")
            if mask is not None:
                size, counts = mask["size"], mask["counts"]
                text = counts.decode("ascii") if isinstance(counts, bytes) else counts
                result = {**result, "segmentation": {"size": size, "counts": text}}
            file.write(f"{',' if index else ''}\n{json.dumps(result, allow_nan=False)}")
        file.write("\n]\n")
