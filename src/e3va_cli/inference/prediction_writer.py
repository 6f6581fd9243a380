"""Write the outputs of `e3va predict`: drawn images, semantic masks and `predictions.json`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from e3va_cli.data.images.orientation import STORED
from e3va_cli.errors import UserError
from e3va_cli.inference.loaded_adapter import LoadedAdapter, unique_names
from e3va_cli.inference.prediction import Detection, ImagePrediction
from e3va_cli.utils.files import write_json
from e3va_cli.visualization.drawing import save_png

DISPLAYED = "as displayed, with the EXIF orientation applied"
PREDICTIONS = "predictions.json"
MASKS_FOLDER = "labels"  # of semantic masks, whose file names are those of the drawn images


class PredictionWriter:
    """Writes predictions to a folder, or to a subfolder per adapter if there are several.

    Args:
        folder: for the outputs; created if needed.
        files: the images.
        adapters: whose predictions will be added.
        score_threshold: minimum score of the detections that will be added.
        save_images: save images with drawn predictions.

    Raises:
        UserError: the folder cannot be created, or an output file exists already.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[Path],
        adapters: Sequence[LoadedAdapter],
        *,
        score_threshold: float,
        save_images: bool,
    ) -> None:
        self.folder, self.files, self.adapters = folder, files, adapters
        self.score_threshold, self.save_images = score_threshold, save_images
        self.stems = unique_names(file.stem for file in files)
        self.images: list[dict[str, Any]] = []
        self.skipped: list[dict[str, str]] = []
        self.mask_values = {adapter.name: mask_values(adapter.category_ids) for adapter in adapters}
        try:
            for adapter in adapters:
                path = self._adapter_folder(adapter.name)
                (path / MASKS_FOLDER if adapter.task == "segmentation" else path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output={folder}: cannot create the folder ({error.strerror})") from None
        existing = next((path for path in self._output_paths() if path.exists()), None)
        if existing is not None:
            raise UserError(f"output={folder}: {existing.relative_to(folder)} exists already; use another folder")

    def _output_paths(self) -> Iterator[Path]:
        yield self.folder / PREDICTIONS
        for adapter in self.adapters:
            for stem in self.stems:
                if self.save_images:
                    yield self._adapter_folder(adapter.name) / f"{stem}.png"
                if adapter.task == "segmentation":
                    yield self._adapter_folder(adapter.name) / MASKS_FOLDER / f"{stem}.png"

    def _adapter_folder(self, adapter: str) -> Path:
        return self.folder if len(self.adapters) == 1 else self.folder / adapter

    def skip(self, index: int, error: UserError) -> None:
        """Print and record that a file cannot be read."""
        print(f"e3va: skipped: {error}", file=sys.stderr)
        self.skipped.append({"file": str(self.files[index]), "reason": str(error)})

    def add(self, index: int, predictions: dict[str, ImagePrediction], *, orientation: int = STORED) -> None:
        """Draw and record the predictions for one image by adapter name; `orientation` is that of its EXIF."""
        entries: dict[str, Any] = {}
        for name, prediction in predictions.items():
            subfolder, file = self._adapter_folder(name), f"{self.stems[index]}.png"
            if self.save_images:
                save_png(prediction.draw(), subfolder / file)
            if prediction.labels is None:
                entries[name] = {"detections": [detection_to_dict(one) for one in prediction.detections]}
                continue
            values = self.mask_values[name]
            save_png(Image.fromarray(values[prediction.labels]), subfolder / MASKS_FOLDER / file)
            shares = [
                {"label": label, "value": int(values[label]), "class": prediction.classes[label - 1], "share": share}
                for label, share in prediction.shares.items()
            ]
            labels = str((subfolder / MASKS_FOLDER / file).relative_to(self.folder))
            entries[name] = {"segmentation": {"labels": labels, "shares": shares}}
        first = next(iter(predictions.values()))
        entry: dict[str, Any] = {"file": str(self.files[index]), "width": first.width, "height": first.height}
        if orientation != STORED:
            entry |= {"exif_orientation": orientation, "pixels": DISPLAYED}
        self.images.append({**entry, "adapters": entries})

    def finish(self) -> None:
        """Write `predictions.json`."""
        adapters = {
            adapter.name: {
                "checkpoint": str(adapter.path),
                "task": adapter.task,
                "classes": adapter.classes,
                "category_ids": adapter.category_ids,
            }
            for adapter in self.adapters
        }
        content = {
            "adapters": adapters,
            "score": self.score_threshold,
            "images": self.images,
            "skipped": self.skipped,
        }
        write_json(self.folder / PREDICTIONS, content)


def mask_values(category_ids: Sequence[int]) -> np.ndarray:
    """Return the category ids as pixel values of semantic masks, by label: (K + 1,), uint8, uint16 or int32."""
    largest = max(category_ids)
    dtype = next((dtype for dtype in (np.uint8, np.uint16) if largest <= np.iinfo(dtype).max), np.int32)
    return np.array([0, *category_ids]).astype(dtype)


def detection_to_dict(detection: Detection) -> dict[str, Any]:
    """Return the entry of `predictions.json`."""
    entry: dict[str, Any] = {
        "label": detection.label,
        "class": detection.name,
        "category_id": detection.category_id,
        "score": detection.score,
        "box": list(detection.box),
    }
    return entry if detection.rle is None else {**entry, "mask": detection.rle}
