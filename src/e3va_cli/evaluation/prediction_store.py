"""What a detector found in each image: collected, shared between processes, and left as files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from e3va_cli.evaluation.base import Results
from e3va_cli.evaluation.coco_results import write_detections
from e3va_cli.runs.folder import CURVES, DETECTIONS
from e3va_cli.visualization.precision_recall import PrecisionRecall, plot_precision_recall

Found = TypeVar("Found")


class PredictionStore(Generic[Found]):
    """The findings by image; only images that were given count, so that a part of a data set can be measured."""

    def __init__(self) -> None:
        self.found: dict[int, Found] = {}

    @property
    def images(self) -> int:
        """Images that findings were given for."""
        return len(self.found)

    def reset(self) -> None:
        """Forget all findings."""
        self.found = {}

    def state(self) -> dict[int, Found]:
        """The findings, by image."""
        return self.found

    def merge(self, states: Sequence[dict[int, Found]]) -> None:
        """Take the findings of all processes."""
        self.found = {image: found for state in states for image, found in state.items()}


def save_predictions(results: Iterable[Results], curves: dict[str, PrecisionRecall], folder: Path) -> dict[str, str]:
    """Write findings in COCO's results format and the curves of each kind: what each file holds, by its name."""
    write_detections(results, folder / DETECTIONS)
    plot_precision_recall(curves, folder / CURVES)
    return {DETECTIONS: "all findings, in COCO's results format", CURVES: "precision and recall at IoU 0.5"}
