"""The files that `e3va predict` leaves: pictures, label maps, and `predictions.json`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from e3va_cli.data.images.orientation import STORED
from e3va_cli.errors import UserError
from e3va_cli.inference.prediction import Detection, ImagePrediction
from e3va_cli.inference.shared_passes import Adapter, unique_names
from e3va_cli.utils.files import write_json
from e3va_cli.visualization.drawing import save_png

DISPLAYED = "as displayed, with the EXIF orientation applied"
PREDICTIONS = "predictions.json"
LABELS = "labels"  # folder of label maps, apart from the pictures so that no name can meet another


class PredictionFiles:
    """The folder of results: pictures, label maps, and `predictions.json`.

    With one adapter, pictures lie in the folder itself, with several in a folder for each adapter.

    Args:
        folder: that is made.
        files: the images.
        adapters: whose findings will be added.
        score_threshold: least one of the objects that will be added.
        save_images: whether to draw.

    Raises:
        UserError: the folder cannot be made, or holds a file of a name that will be written.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[Path],
        adapters: Sequence[Adapter],
        *,
        score_threshold: float,
        save_images: bool,
    ) -> None:
        self.folder, self.files, self.adapters = folder, files, adapters
        self.score_threshold, self.save_images = score_threshold, save_images
        self.stems = unique_names(file.stem for file in files)
        self.images: list[dict[str, Any]] = []
        self.skipped: list[dict[str, str]] = []
        self.values = {adapter.name: mask_values(adapter.category_ids) for adapter in adapters}
        try:
            for adapter in adapters:
                place = self._place(adapter.name)
                (place / LABELS if adapter.task == "segmentation" else place).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output={folder}: the folder cannot be made ({error.strerror})") from None
        taken = [path for path in self._planned() if path.exists()]
        if taken:
            raise UserError(f"output={folder}: {taken[0].relative_to(folder)} is there already; give another folder")

    def _planned(self) -> Iterator[Path]:
        yield self.folder / PREDICTIONS
        for adapter in self.adapters:
            for stem in self.stems:
                if self.save_images:
                    yield self._place(adapter.name) / f"{stem}.png"
                if adapter.task == "segmentation":
                    yield self._place(adapter.name) / LABELS / f"{stem}.png"

    def _place(self, adapter: str) -> Path:
        return self.folder if len(self.adapters) == 1 else self.folder / adapter

    def skip(self, index: int, error: UserError) -> None:
        """Say and note that a file cannot be read."""
        print(f"e3va: skipped: {error}", file=sys.stderr)
        self.skipped.append({"file": str(self.files[index]), "reason": str(error)})

    def add(self, index: int, found: dict[str, ImagePrediction], *, orientation: int = STORED) -> None:
        """Draw and note what the adapters found in an image, which its EXIF's orientation has turned."""
        entries: dict[str, Any] = {}
        for name, prediction in found.items():
            place, file = self._place(name), f"{self.stems[index]}.png"
            if self.save_images:
                save_png(prediction.draw(), place / file)
            if prediction.labels is None:
                entries[name] = {"detections": [as_json(one) for one in prediction.detections]}
                continue
            values = self.values[name]
            save_png(Image.fromarray(values[prediction.labels]), place / LABELS / file)
            shares = [
                {"label": label, "value": int(values[label]), "class": prediction.classes[label - 1], "share": share}
                for label, share in prediction.shares.items()
            ]
            labels = str((place / LABELS / file).relative_to(self.folder))
            entries[name] = {"segmentation": {"labels": labels, "shares": shares}}
        one = next(iter(found.values()))
        entry: dict[str, Any] = {"file": str(self.files[index]), "width": one.width, "height": one.height}
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
    """What the masks that were trained on call label k, at index k; uint8 or uint16 where the numbers allow it."""
    largest = max(category_ids)
    kind = next((kind for kind in (np.uint8, np.uint16) if largest <= np.iinfo(kind).max), np.int32)
    return np.array([0, *category_ids]).astype(kind)


def as_json(found: Detection) -> dict[str, Any]:
    """An object as `predictions.json` has it."""
    entry: dict[str, Any] = {
        "label": found.label,
        "class": found.name,
        "category_id": found.category_id,
        "score": found.score,
        "box": list(found.box),
    }
    return entry if found.rle is None else {**entry, "mask": found.rle}
