"""Grids of drawn images: what a data set says, and what a model finds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from e3va_cli.data import DenseDataset, collate
from e3va_cli.errors import UserError
from e3va_cli.inference.images import to_image
from e3va_cli.inference.prediction import build_image_prediction
from e3va_cli.inference.predictor import SCORE_THRESHOLD
from e3va_cli.models.model import DenseModel
from e3va_cli.visualization.drawing import draw_detections, grid, save_png, to_pil
from e3va_cli.visualization.segmentation import draw_segmentation

COLUMNS = 4


def draw_annotations(dataset: DenseDataset, count: int, path: Path) -> bool:
    """Draw up to `count` images with their annotations, evenly spread over the data set; False if none is readable."""
    drawn = []
    for index in _spread(len(dataset), count):
        try:
            image, target = dataset[index]
        except UserError:
            continue  # reported by the check already
        if "semantic" in target:
            drawn.append(draw_segmentation(image, target["semantic"], dataset.classes))
        else:
            masks = target.get("masks")
            drawn.append(draw_detections(image, target["boxes"], target["labels"], dataset.classes, masks=masks))
    return _save(drawn, path)


@torch.no_grad()
def draw_predictions(model: DenseModel, dataset: DenseDataset, evaluated: int, count: int, path: Path) -> bool:
    """Draw up to `count` of the first `evaluated` images with what `model` finds in them."""
    model.eval()
    device = next(model.parameters()).device
    drawn = []
    for index in _spread(evaluated, count):
        image, target = dataset[index]
        size = (image.shape[1], image.shape[2])
        batch = collate([(image, target)]).to(device)
        (found,) = model.predict(batch.images, batch.image_sizes)
        prediction = build_image_prediction(
            found,
            image,
            size,
            classes=dataset.classes,
            category_ids=dataset.category_ids,
            score_threshold=SCORE_THRESHOLD,
        )
        drawn.append(to_image(prediction.draw()))
    return _save(drawn, path)


def _spread(length: int, count: int) -> Iterator[int]:
    yield from range(0, length, max(1, length // max(1, count)))[:count]


def _save(drawn: list[Tensor], path: Path) -> bool:
    if drawn:
        save_png(to_pil(grid(drawn, COLUMNS)), path)
    return bool(drawn)
