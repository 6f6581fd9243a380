"""Augment batches on their device: random resized crop, flip and color per image (torchvision's are per batch)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate
from torchvision.transforms import v2

ASPECT = 4 / 3  # maximum of a crop, as in torchvision's RandomResizedCrop
GRAY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as torchvision's


@dataclass(frozen=True)
class Augmentation:
    """Random augmentation of training images, from torch's global generators.

    Attributes:
        least_area: minimum area of a random crop, as a fraction of the image.
        color: brightness, contrast and saturation change by a factor of 1 +- color.
        mixup: alpha of mixup (arXiv 1710.09412).
        cutmix: alpha of CutMix (arXiv 1905.04899).
        mixing: probability of CutMix (80 %) or mixup (20 %) for a batch.
    """

    least_area: float = 0.25
    color: float = 0.4
    mixup: float = 0.2
    cutmix: float = 1.0
    mixing: float = 0.5

    def __call__(self, images: Tensor, side: int) -> Tensor:
        """Augment images (B, 3, H, W), uint8, to (B, 3, side, side), float32 in 0..1."""
        return self.crop(self.recolor(images / 255), side)

    def recolor(self, images: Tensor) -> Tensor:
        """Change brightness, contrast and saturation, in this order, by random factors per image."""
        brightness, contrast, saturation = (
            1 + self.color * (2 * torch.rand(3, len(images), 1, 1, 1, device=images.device) - 1)
        ).unbind()
        weights = images.new_tensor(GRAY).view(3, 1, 1)
        images = brightness * images
        mean = (images * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
        images = torch.lerp(mean, images, contrast)
        gray = (images * weights).sum(1, keepdim=True)
        return torch.lerp(gray, images, saturation).clamp(0, 1)

    def crop(self, images: Tensor, side: int) -> Tensor:
        """Crop each image with random area, aspect ratio and position, and flip half of them: (B, 3, side, side)."""
        count = len(images)
        area, ratio, x, y, flip = torch.rand(5, count, device=images.device)
        area = self.least_area + (1 - self.least_area) * area
        stretch = torch.exp(math.log(ASPECT) * (ratio - 0.5))  # square root of the aspect ratio
        width, height = (area.sqrt() * stretch).clamp(max=1), (area.sqrt() / stretch).clamp(max=1)
        theta = torch.zeros(count, 2, 3, device=images.device)  # image coordinates are -1 to 1
        theta[:, 0, 0] = width * torch.where(flip < 0.5, 1.0, -1.0)
        theta[:, 1, 1] = height
        theta[:, 0, 2] = (1 - width) * (2 * x - 1)
        theta[:, 1, 2] = (1 - height) * (2 * y - 1)
        grid = affine_grid(theta, [count, 3, side, side], align_corners=False)
        return grid_sample(images, grid, padding_mode="border", align_corners=False)

    def mixer(self, classes: int) -> v2.Transform:
        """Return a transform that mixes a batch (images, labels); labels of a mixed batch are (B, classes)."""
        mixed = [v2.CutMix(alpha=self.cutmix, num_classes=classes), v2.MixUp(alpha=self.mixup, num_classes=classes)]
        chances = [0.8 * self.mixing, 0.2 * self.mixing, 1 - self.mixing]
        return v2.RandomChoice([*mixed, v2.Identity()], p=chances)


def resize(images: Tensor, side: int) -> Tensor:
    """Resize images (B, 3, H, W), uint8, to (B, 3, side, side), float32 in 0..1."""
    return interpolate(images / 255, size=(side, side), mode="bilinear", antialias=side < images.shape[-1])
