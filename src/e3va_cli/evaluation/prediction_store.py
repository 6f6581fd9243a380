"""What a detector found in each image: collected, shared between processes, and left as files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from e3va_cli.evaluation.base import Results
from e3va_cli.evaluation.coco_results import write_detections
from e3va_cli.runs.folder import DETECTIONS, PRECISION_RECALL_PLOT
from e3va_cli.visualization.precision_recall import Curves, draw_curves

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

    def share(self) -> dict[int, Found]:
        """The findings, by image."""
        return self.found

    def gather(self, shares: Sequence[dict[int, Found]]) -> None:
        """Take the findings of all processes."""
        self.found = {image: found for share in shares for image, found in share.items()}


def save_predictions(results: Iterable[Results], curves: dict[str, Curves], folder: Path) -> dict[str, str]:
    """Write findings in COCO's results format and the curves of each kind: what each file holds, by its name."""
    write_detections(results, folder / DETECTIONS)
    draw_curves(curves, folder / PRECISION_RECALL_PLOT)
    return {
        DETECTIONS: "all findings, in COCO's results format",
        PRECISION_RECALL_PLOT: "precision and recall at IoU 0.5",
    }
