"""What trained adapters find in one image, as plain values in pixels of that image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from e3va_cli.data.images.intensity import IntensityScaling
from e3va_cli.data.images.reading import DEFAULT_SCALING
from e3va_cli.inference.images import ImageLike, as_image
from e3va_cli.models.heads import Detections, Segmentation
from e3va_cli.visualization.drawing import draw_detections, to_pil
from e3va_cli.visualization.segmentation import draw_segmentation

PICTURE_SIDE = 1600  # pixels of a drawn picture's longer side at most: masks are drawn all at once, as floats


@dataclass(frozen=True)
class Detection:
    """One object.

    Attributes:
        label: 1..K.
        name: of its class.
        category_id: the class's id in the data set that was trained on.
        score: 0..1.
        box: x1, y1, x2, y2 in pixels.
        rle: its mask in COCO's run-length encoding, `{"size": [H, W], "counts": text}`; None for a head without masks.
    """

    label: int
    name: str
    category_id: int
    score: float
    box: tuple[float, float, float, float]
    rle: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def mask(self) -> np.ndarray | None:
        """The mask over the whole image, bool (H, W); decoded at each use, so that many objects take little memory."""
        return None if self.rle is None else coco_mask.decode(self.rle).astype(bool)


@dataclass(frozen=True, eq=False)
class ImagePrediction:
    """What one adapter finds in one image.

    Attributes:
        image: as it was given.
        width, height: of it as a viewer shows it, in pixels.
        classes: name of label k at index k - 1.
        detections: objects, best score first; none from a segmenter.
        labels: the class of every pixel, 1..K, int16 (H, W); None from a detector.
        scaling: of an image of more than 8 bits.
    """

    image: ImageLike = field(repr=False)
    width: int
    height: int
    classes: tuple[str, ...] = field(repr=False)
    detections: tuple[Detection, ...] = ()
    labels: np.ndarray | None = field(default=None, repr=False)
    scaling: IntensityScaling = field(default=DEFAULT_SCALING, repr=False)

    @property
    def shares(self) -> dict[int, float]:
        """The part of the pixels, 0..1, that each label of a segmentation covers, if it covers any."""
        if self.labels is None:
            return {}
        labels, pixels = np.unique(self.labels, return_counts=True)
        return {int(label): int(count) / self.labels.size for label, count in zip(labels, pixels, strict=True)}

    def draw(self) -> Image.Image:
        """The image with what was found in it; large images are drawn at most 1600 pixels wide or high."""
        pixels = as_image(self.image, self.scaling)
        scale = min(1.0, PICTURE_SIDE / max(self.width, self.height))
        size = (max(1, round(self.height * scale)), max(1, round(self.width * scale)))
        if scale < 1:
            pixels = interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]
        if self.labels is not None:
            drawn = draw_segmentation(pixels, _nearest(self.labels, size), self.classes)
        else:
            drawn = self._draw_objects(pixels, size)
        return to_pil(drawn)

    def _draw_objects(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        height, width = size[0] / self.height, size[1] / self.width
        boxes = torch.tensor([found.box for found in self.detections]).reshape(-1, 4)
        masks = [_nearest(found.mask, size) for found in self.detections if found.mask is not None]
        return draw_detections(
            pixels,
            boxes * boxes.new_tensor([width, height, width, height]),
            torch.tensor([found.label for found in self.detections]),
            self.classes,
            masks=torch.stack(masks) if masks else None,
            scores=torch.tensor([found.score for found in self.detections]),
        )


def prediction_of(
    found: Detections | Segmentation,
    image: ImageLike,
    size: tuple[int, int],
    *,
    classes: Sequence[str],
    category_ids: Sequence[int],
    score_threshold: float,
    scaling: IntensityScaling = DEFAULT_SCALING,
) -> ImagePrediction:
    """What a head found, brought to the image's own pixels.

    Args:
        found: in the resized image.
        image: as it was given.
        size: (height, width) of it, in pixels.
        classes, category_ids: of label k at index k - 1.
        score_threshold: least one of the objects that are kept.
        scaling: of an image of more than 8 bits.
    """
    height, width = size
    if isinstance(found, Segmentation):
        labels = found.labels(size).cpu().numpy()
        return ImagePrediction(image, width, height, tuple(classes), labels=labels, scaling=scaling)
    found = found.filter_by_score(score_threshold).cpu().rescaled(size)
    encoded = [_encoded(mask) for mask in found.paste_masks()] if found.masks is not None else [None] * len(found)
    values = zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), encoded, strict=True)
    detections = tuple(
        Detection(label, classes[label - 1], category_ids[label - 1], value, (x1, y1, x2, y2), mask)
        for label, value, (x1, y1, x2, y2), mask in values
    )
    return ImagePrediction(image, width, height, tuple(classes), detections, scaling=scaling)


def _encoded(mask: Tensor) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}


def _nearest(labels: np.ndarray, size: tuple[int, int]) -> Tensor:
    """A map of whole numbers or truths (H, W) at another size, by the nearest pixel."""
    values = torch.from_numpy(labels.astype(np.int16))
    if values.shape == size:
        return values
    rows, columns = ((torch.arange(new) * old // new) for new, old in zip(size, values.shape, strict=True))
    return values[rows][:, columns]
