"""Grids of drawn images: what a data set says, and what a model finds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from e3va_cli.data import DenseDataset, collate
from e3va_cli.data.drawing import draw_sample, grid, save_png
from e3va_cli.data.segmentation_drawing import draw_segments
from e3va_cli.errors import UserError
from e3va_cli.heads import Detections, Segmentation
from e3va_cli.model import DenseModel

COLUMNS = 4
LEAST_SCORE = 0.5  # of the findings that are drawn


def draw_annotations(dataset: DenseDataset, count: int, path: Path) -> bool:
    """Draw up to `count` images with their annotations, evenly spread over the data set; False if none is readable."""
    drawn = []
    for index in _spread(len(dataset), count):
        try:
            image, target = dataset[index]
        except UserError:
            continue  # reported by the check already
        if "semantic" in target:
            drawn.append(draw_segments(image, target["semantic"], dataset.classes))
        else:
            masks = target.get("masks")
            drawn.append(draw_sample(image, target["boxes"], target["labels"], dataset.classes, masks=masks))
    return _save(drawn, path)


@torch.no_grad()
def draw_predictions(model: DenseModel, dataset: DenseDataset, evaluated: int, count: int, path: Path) -> bool:
    """Draw up to `count` of the first `evaluated` images with what `model` finds in them."""
    model.eval()
    device = next(model.parameters()).device
    drawn = []
    for index in _spread(evaluated, count):
        image, target = dataset[index]
        batch = collate([(image, target)]).to(device)
        found = model.predict(batch.images, batch.image_sizes)[0].cpu()
        drawn.append(draw_found(image, found, dataset.classes))
    return _save(drawn, path)


def draw_found(image: Tensor, found: Detections | Segmentation, classes: list[str]) -> Tensor:
    """Draw what a head found in an image, uint8 (3, H, W)."""
    if isinstance(found, Segmentation):
        return draw_segments(image, found.labels((image.shape[1], image.shape[2])), classes)
    found = found.above(LEAST_SCORE)
    masks = torch.stack(list(found.full_masks())) if found.masks is not None and len(found) else None
    return draw_sample(image, found.boxes, found.labels, classes, masks=masks, scores=found.scores)


def _spread(length: int, count: int) -> Iterator[int]:
    yield from range(0, length, max(1, length // max(1, count)))[:count]


def _save(drawn: list[Tensor], path: Path) -> bool:
    if drawn:
        save_png(grid(drawn, COLUMNS), path)
    return bool(drawn)
