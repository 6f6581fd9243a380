"""Grids of drawn images: what a data set says, and what a model finds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from e3va_cli.data import DetectionDataset, collate
from e3va_cli.data.drawing import draw_sample, grid, save_png
from e3va_cli.errors import UserError
from e3va_cli.model import DenseModel

COLUMNS = 4
LEAST_SCORE = 0.5  # of the findings that are drawn


def draw_annotations(dataset: DetectionDataset, count: int, path: Path) -> bool:
    """Draw up to `count` images with their annotations, evenly spread over the data set; False if none is readable."""
    drawn = []
    for index in _spread(len(dataset), count):
        try:
            image, target = dataset[index]
        except UserError:
            continue  # reported by the check already
        masks = target.get("masks")
        drawn.append(draw_sample(image, target["boxes"], target["labels"], dataset.classes, masks=masks))
    return _save(drawn, path)


@torch.no_grad()
def draw_predictions(model: DenseModel, dataset: DetectionDataset, evaluated: int, count: int, path: Path) -> bool:
    """Draw up to `count` of the first `evaluated` images with what `model` finds in them."""
    model.eval()
    device = next(model.parameters()).device
    drawn = []
    for index in _spread(evaluated, count):
        image, target = dataset[index]
        batch = collate([(image, target)]).to(device)
        found = model.predict(batch.images, batch.image_sizes)[0].cpu().above(LEAST_SCORE)
        masks = torch.stack(list(found.full_masks())) if found.masks is not None and len(found) else None
        drawn.append(draw_sample(image, found.boxes, found.labels, dataset.classes, masks=masks, scores=found.scores))
    return _save(drawn, path)


def _spread(length: int, count: int) -> Iterator[int]:
    yield from range(0, length, max(1, length // max(1, count)))[:count]


def _save(drawn: list[Tensor], path: Path) -> bool:
    if drawn:
        save_png(grid(drawn, COLUMNS), path)
    return bool(drawn)
