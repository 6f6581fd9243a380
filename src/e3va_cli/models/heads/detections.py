"""What a detection head finds in one image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import clip_boxes_to_image

MASK_THRESHOLD = 0.5  # probability above which a pixel belongs to the object


@dataclass
class Detections:
    """Objects found in one image, best score first.

    Attributes:
        boxes: (N, 4), x1 y1 x2 y2 in pixels of an image of `image_size`.
        scores: (N,), 0..1.
        labels: (N,), 1..K.
        masks: (N, 1, M, M) probabilities inside each box, or None for a head without masks.
        image_size: (height, width) that the boxes refer to.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None
    image_size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.boxes)

    def rescaled(self, image_size: tuple[int, int]) -> Detections:
        """The same objects in an image resized to `image_size` (height, width)."""
        height, width = (new / old for new, old in zip(image_size, self.image_size, strict=True))
        boxes = clip_boxes_to_image(self.boxes * self.boxes.new_tensor([width, height, width, height]), image_size)
        return Detections(boxes, self.scores, self.labels, self.masks, image_size)

    def filter_by_score(self, score: float) -> Detections:
        """Those with a score of at least `score`."""
        keep = self.scores >= score
        masks = None if self.masks is None else self.masks[keep]
        return Detections(self.boxes[keep], self.scores[keep], self.labels[keep], masks, self.image_size)

    def cpu(self) -> Detections:
        """The same on the CPU."""
        masks = None if self.masks is None else self.masks.cpu()
        return Detections(self.boxes.cpu(), self.scores.cpu(), self.labels.cpu(), masks, self.image_size)

    def paste_masks(self) -> Iterator[Tensor]:
        """Each object's mask over the whole image, (H, W) bool: one at a time, so only one is ever in memory."""
        assert self.masks is not None
        for mask, box in zip(self.masks, self.boxes, strict=True):
            yield paste_masks_in_image(mask[None], box[None], self.image_size)[0, 0] > MASK_THRESHOLD
