"""What a segmentation head finds in one image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

CHUNK_CLASSES = 8  # maps of image size that are in memory together


@dataclass
class Segmentation:
    """A score for every class at every place of one image.

    Attributes:
        scores: (K, h, w) of the padded image, at any resolution; class k of 1..K at index k - 1.
        padded_size: (height, width) that the scores cover.
        image_size: (height, width) of the image in its upper left corner.
    """

    scores: Tensor
    padded_size: tuple[int, int]
    image_size: tuple[int, int]

    def labels(self, size: tuple[int, int]) -> Tensor:
        """The best class, 1..K, of every pixel of the image resized to `size` (height, width): int16 (H, W).

        Scores are brought to the padded size and, without the padding, to `size` (bilinear), a few classes at a time,
        then compared. Of classes with the same score it is the first.
        """
        height, width = self.image_size
        best = torch.full(size, -torch.inf, device=self.scores.device)
        labels = torch.ones(size, dtype=torch.int16, device=self.scores.device)  # also where scores are not a number
        for first in range(0, len(self.scores), CHUNK_CLASSES):
            some = self.scores[None, first : first + CHUNK_CLASSES].float()
            some = interpolate(some, self.padded_size, mode="bilinear")[:, :, :height, :width]
            values, indices = interpolate(some, size, mode="bilinear")[0].max(0)
            better = values > best
            best = torch.where(better, values, best)
            labels = torch.where(better, (indices + first + 1).to(torch.int16), labels)
        return labels

    def cpu(self) -> Segmentation:
        """The same on the CPU."""
        return Segmentation(self.scores.cpu(), self.padded_size, self.image_size)
