"""Predictions of heads for one image: `Detections` or a `Segmentation`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import clip_boxes_to_image

MASK_THRESHOLD = 0.5  # probability above which a pixel belongs to the object
CHUNK_CLASSES = 8  # upsampled at a time


@dataclass
class Detections:
    """Detections in one image, by descending score.

    Attributes:
        boxes: (N, 4), x1 y1 x2 y2 in pixels.
        scores: (N,), 0..1.
        labels: (N,), 1..K.
        masks: (N, 1, M, M) probabilities inside each box, or None for a head without masks.
        image_size: (height, width) of the image that boxes refer to.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None
    image_size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.boxes)

    def rescaled(self, image_size: tuple[int, int]) -> Detections:
        """Return the detections in an image resized to `image_size` (height, width)."""
        height, width = (new / old for new, old in zip(image_size, self.image_size, strict=True))
        boxes = clip_boxes_to_image(self.boxes * self.boxes.new_tensor([width, height, width, height]), image_size)
        return Detections(boxes, self.scores, self.labels, self.masks, image_size)

    def filter_by_score(self, score: float) -> Detections:
        """Return the detections with a score of `score` or more."""
        keep = self.scores >= score
        masks = None if self.masks is None else self.masks[keep]
        return Detections(self.boxes[keep], self.scores[keep], self.labels[keep], masks, self.image_size)

    def cpu(self) -> Detections:
        """Return a copy on the CPU."""
        masks = None if self.masks is None else self.masks.cpu()
        return Detections(self.boxes.cpu(), self.scores.cpu(), self.labels.cpu(), masks, self.image_size)

    def paste_masks(self) -> Iterator[Tensor]:
        """Yield each detection's mask in the whole image, (H, W) bool, one at a time to save memory."""
        assert self.masks is not None
        for mask, box in zip(self.masks, self.boxes, strict=True):
            yield paste_masks_in_image(mask[None], box[None], self.image_size)[0, 0] > MASK_THRESHOLD


@dataclass
class Segmentation:
    """Class scores of one image.

    Attributes:
        scores: (K, h, w) of the padded image, at any resolution; class k of 1..K at index k - 1.
        padded_size: (height, width) of the padded image.
        image_size: (height, width) of the image, in the upper left corner.
    """

    scores: Tensor
    padded_size: tuple[int, int]
    image_size: tuple[int, int]

    def labels(self, size: tuple[int, int]) -> Tensor:
        """Return the best class, 1..K, of every pixel of the image resized to `size` (height, width): int16 (H, W).

        Scores are upsampled to the padded size, cropped, resized to `size` (bilinear) and compared, in chunks of
        classes. Ties go to the first class.
        """
        height, width = self.image_size
        best = torch.full(size, -torch.inf, device=self.scores.device)
        labels = torch.ones(size, dtype=torch.int16, device=self.scores.device)  # also for NaN scores
        for first in range(0, len(self.scores), CHUNK_CLASSES):
            chunk = self.scores[None, first : first + CHUNK_CLASSES].float()
            chunk = interpolate(chunk, self.padded_size, mode="bilinear")[:, :, :height, :width]
            values, indices = interpolate(chunk, size, mode="bilinear")[0].max(0)
            better = values > best
            best = torch.where(better, values, best)
            labels = torch.where(better, (indices + first + 1).to(torch.int16), labels)
        return labels

    def cpu(self) -> Segmentation:
        """Return a copy on the CPU."""
        return Segmentation(self.scores.cpu(), self.padded_size, self.image_size)
