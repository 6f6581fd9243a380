"""Predictions for one image, in its pixels."""

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
from e3va_cli.inference.images import ImageLike, to_image
from e3va_cli.models.heads import Detections, Segmentation
from e3va_cli.visualization.drawing import draw_detections, to_pil
from e3va_cli.visualization.segmentation import draw_segmentation

MAX_DRAWN_SIDE = 1600  # pixels; all masks of an image are drawn at once, as floats


@dataclass(frozen=True)
class Detection:
    """A detected object.

    Attributes:
        label: 1..K.
        name: name of the class.
        category_id: of the class in the training data.
        score: 0..1.
        box: x1, y1, x2, y2 in pixels.
        rle: mask in COCO's run-length encoding, `{"size": [H, W], "counts": str}`; None for a head without masks.
    """

    label: int
    name: str
    category_id: int
    score: float
    box: tuple[float, float, float, float]
    rle: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def mask(self) -> np.ndarray | None:
        """Decode the mask of the whole image, bool (H, W); it is not cached, to save memory."""
        return None if self.rle is None else coco_mask.decode(self.rle).astype(bool)


@dataclass(frozen=True, eq=False)
class ImagePrediction:
    """The predictions of one adapter for one image.

    Attributes:
        image: the input.
        width, height: of the image in pixels, with its EXIF orientation applied.
        classes: name of label k at index k - 1.
        detections: sorted by descending score; empty for a segmenter.
        labels: class of each pixel, 1..K, int16 (H, W); None for a detector.
        scaling: conversion of an image with more than 8 bits.
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
        """Return the fraction of pixels, in 0..1, of each label that occurs in `labels`."""
        if self.labels is None:
            return {}
        labels, pixels = np.unique(self.labels, return_counts=True)
        return {int(label): int(count) / self.labels.size for label, count in zip(labels, pixels, strict=True)}

    def draw(self) -> Image.Image:
        """Draw the predictions on the image, downscaled to at most 1600 pixels on its longer side."""
        pixels = to_image(self.image, self.scaling)
        scale = min(1.0, MAX_DRAWN_SIDE / max(self.width, self.height))
        size = (max(1, round(self.height * scale)), max(1, round(self.width * scale)))
        if scale < 1:
            pixels = interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]
        if self.labels is not None:
            drawn = draw_segmentation(pixels, _resize_nearest(self.labels, size), self.classes)
        else:
            drawn = self._draw_detections(pixels, size)
        return to_pil(drawn)

    def _draw_detections(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        height, width = size[0] / self.height, size[1] / self.width
        boxes = torch.tensor([one.box for one in self.detections]).reshape(-1, 4)
        masks = [_resize_nearest(one.mask, size) for one in self.detections if one.mask is not None]
        return draw_detections(
            pixels,
            boxes * boxes.new_tensor([width, height, width, height]),
            torch.tensor([one.label for one in self.detections]),
            self.classes,
            masks=torch.stack(masks) if masks else None,
            scores=torch.tensor([one.score for one in self.detections]),
        )


def build_image_prediction(
    prediction: Detections | Segmentation,
    image: ImageLike,
    size: tuple[int, int],
    *,
    classes: Sequence[str],
    category_ids: Sequence[int],
    score_threshold: float,
    scaling: IntensityScaling = DEFAULT_SCALING,
) -> ImagePrediction:
    """Rescale the prediction of a head to the image and drop detections below `score_threshold`.

    Args:
        prediction: for the resized image.
        image: the input.
        size: (height, width) of the image in pixels.
        classes, category_ids: of label k at index k - 1.
        score_threshold: minimum score of detections.
        scaling: conversion of an image with more than 8 bits.
    """
    height, width = size
    if isinstance(prediction, Segmentation):
        labels = prediction.labels(size).cpu().numpy()
        return ImagePrediction(image, width, height, tuple(classes), labels=labels, scaling=scaling)
    objects = prediction.filter_by_score(score_threshold).cpu().rescaled(size)
    rles = (
        [_encode_mask(mask) for mask in objects.paste_masks()] if objects.masks is not None else [None] * len(objects)
    )
    values = zip(objects.labels.tolist(), objects.scores.tolist(), objects.boxes.tolist(), rles, strict=True)
    detections = tuple(
        Detection(label, classes[label - 1], category_ids[label - 1], score, (x1, y1, x2, y2), rle)
        for label, score, (x1, y1, x2, y2), rle in values
    )
    return ImagePrediction(image, width, height, tuple(classes), detections, scaling=scaling)


def _encode_mask(mask: Tensor) -> dict[str, Any]:
    """Encode a mask (H, W) in COCO's run-length encoding."""
    rle = coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}


def _resize_nearest(labels: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Resize integers or booleans (H, W) to `size` by the nearest pixel; return int16."""
    values = torch.from_numpy(labels.astype(np.int16))
    if values.shape == size:
        return values
    rows, columns = ((torch.arange(new) * old // new) for new, old in zip(size, values.shape, strict=True))
    return values[rows][:, columns]
