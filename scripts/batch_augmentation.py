"""Augmentation of whole batches on their device: a random resized crop, flip and color of its own for each image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate
from torchvision.transforms import v2

ASPECT = 4 / 3  # most of a crop, as torchvision's RandomResizedCrop
GRAY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as torchvision's


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images, with the torch generators' state as their only source.

    Attributes:
        least_area: of a random crop, as a share of the image.
        color: most change of brightness, contrast and saturation, as a factor of 1 +- color.
        mixup: alpha of mixup (arXiv 1710.09412).
        cutmix: alpha of CutMix (arXiv 1905.04899).
        mixing: probability that a batch is mixed, by one of the two, CutMix in four out of five cases.
    """

    least_area: float = 0.25
    color: float = 0.4
    mixup: float = 0.2
    cutmix: float = 1.0
    mixing: float = 0.5

    def __call__(self, images: Tensor, side: int) -> Tensor:
        """(B, 3, H, W), uint8 -> (B, 3, side, side), float32 in 0..1."""
        return self.crop(self.recolor(images / 255), side)

    def recolor(self, images: Tensor) -> Tensor:
        """Brightness, contrast about the mean gray and saturation, in this order, each image by factors of its own."""
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
        """A crop of random area, aspect ratio and place of each image, half of them flipped: (B, 3, side, side)."""
        count = len(images)
        area, ratio, x, y, flip = torch.rand(5, count, device=images.device)
        area = self.least_area + (1 - self.least_area) * area
        stretch = torch.exp(math.log(ASPECT) * (ratio - 0.5))  # the root of the aspect ratio
        width, height = (area.sqrt() * stretch).clamp(max=1), (area.sqrt() / stretch).clamp(max=1)
        theta = torch.zeros(count, 2, 3, device=images.device)  # the image's sides run from -1 to 1
        theta[:, 0, 0] = width * torch.where(flip < 0.5, 1.0, -1.0)
        theta[:, 1, 1] = height
        theta[:, 0, 2] = (1 - width) * (2 * x - 1)
        theta[:, 1, 2] = (1 - height) * (2 * y - 1)
        grid = affine_grid(theta, [count, 3, side, side], align_corners=False)
        return grid_sample(images, grid, padding_mode="border", align_corners=False)

    def mixer(self, classes: int) -> v2.Transform:
        """Mix a batch (images, labels): labels become (B, classes) where it is mixed."""
        mixed = [v2.CutMix(alpha=self.cutmix, num_classes=classes), v2.MixUp(alpha=self.mixup, num_classes=classes)]
        chances = [0.8 * self.mixing, 0.2 * self.mixing, 1 - self.mixing]
        return v2.RandomChoice([*mixed, v2.Identity()], p=chances)


def resized(images: Tensor, side: int) -> Tensor:
    """Whole images: (B, 3, H, W), uint8 -> (B, 3, side, side), float32 in 0..1."""
    return interpolate(images / 255, size=(side, side), mode="bilinear", antialias=side < images.shape[-1])
