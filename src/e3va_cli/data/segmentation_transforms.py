"""Transforms of images with semantic masks.

The usual recipe on ADE20K (https://github.com/open-mmlab/mmsegmentation): random scale, random crop, flip, photometric
distortion.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F  # noqa: N812 (torchvision's own alias)

from e3va_cli.components.options import Options, option
from e3va_cli.data.dataset import Target
from e3va_cli.data.transforms import ResizeShortestEdge, Transforms

CROP_TRIES = 10
HUE_SHIFT = 0.1  # of the hue circle; brightness, contrast and saturation as in torchvision's default


class RandomScale(v2.Transform):
    """Resize to fit into `short_side` by `max_size` pixels, both multiplied by a factor drawn uniformly from `scales`.

    Unlike in torchvision's ScaleJitter, `short_side` applies to the shorter side of portrait and landscape images.
    Images are interpolated, semantic masks use the nearest pixel.
    """

    def __init__(self, short_side: int, max_size: int, scales: Sequence[float]) -> None:
        super().__init__()
        self.short_side, self.max_size, self.scales = short_side, max_size, scales

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the new (height, width)."""
        sides = v2.query_size(flat_inputs)
        scale = torch.empty(()).uniform_(*self.scales).item()
        scale *= min(self.short_side / min(sides), self.max_size / max(sides))
        return {"size": [max(1, round(side * scale)) for side in sides]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize an image or semantic mask."""
        return self._call_kernel(F.resize, inpt, size=params["size"], antialias=True)


class RandomCrop(torch.nn.Module):
    """Crop to `size` by `size` pixels; shorter sides are kept.

    A crop in which one class covers more than `cat_max_ratio` of the labeled pixels, or without labeled pixels, is
    drawn again, up to ten times in total, as in mmsegmentation's RandomCrop.
    """

    def __init__(self, size: int, cat_max_ratio: float) -> None:
        super().__init__()
        self.size, self.cat_max_ratio = size, cat_max_ratio

    def forward(self, image: tv_tensors.Image, target: Target) -> tuple[tv_tensors.Image, Target]:
        """Crop image and semantic mask at the same position."""
        labels = target["semantic"]
        height, width = (min(self.size, side) for side in labels.shape)
        for _ in range(CROP_TRIES):
            top, left = (
                int(torch.randint(whole - part + 1, ()))
                for whole, part in zip(labels.shape, (height, width), strict=True)
            )
            if self._is_varied(labels[top : top + height, left : left + width]):
                break
        window = (top, left, height, width)
        return F.crop(image, *window), {**target, "semantic": F.crop(labels, *window)}

    def _is_varied(self, labels: Tensor) -> bool:
        pixels = torch.bincount(labels.flatten().int())[1:]
        return bool(pixels.any()) and int(pixels.max()) <= self.cat_max_ratio * int(pixels.sum())


class PhotometricDistortion(v2.RandomPhotometricDistort):
    """Brightness, contrast, saturation and hue, each with probability 0.5; channels are never permuted."""

    def __init__(self) -> None:
        super().__init__(hue=(-HUE_SHIFT, HUE_SHIFT))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw torchvision's parameters without the permutation."""
        return {**super().make_params(flat_inputs), "channel_permutation": None}


@dataclass(kw_only=True)
class SegmentationTransforms(Options):
    """Resizing and augmentation options of segmentation data sets.

    Crops smaller than `crop_size` are padded by `collate`, so that the model can set the padding to the mean color, and
    heads ignore it.
    """

    short_side: int = option(help="pixels of the short side", gt=0)
    max_size: int = option(help="maximum pixels of the long side", gt=0)
    scales: list[float] = option(help="[least,most] random factor of both sides in training")
    crop_size: int = option(help="maximum height and width of training crops in pixels; affects memory", gt=0)
    cat_max_ratio: float = option(
        former_name="crop_one_class", help="maximum ratio of a crop's labeled pixels in one class", ge=0, le=1
    )
    flip: float = option(help="probability of a horizontal flip", ge=0, le=1)
    photometric_distortion: bool = option(
        former_name="distort", help="distort brightness, contrast, saturation and hue in training"
    )

    def errors(self, at: str) -> Iterator[str]:
        """Yield the errors of the factors."""
        if self.scales is not None and (len(self.scales) != 2 or not 0 < self.scales[0] <= self.scales[1]):
            yield f"{at}.scales={self.scales}: set it to [least,most] above 0"

    @property
    def largest_image(self) -> tuple[int, int]:
        """Return height and width of the largest training image."""
        return self.crop_size, self.crop_size

    def train_transforms(self) -> Transforms:
        """Return random scale, crop, flip and photometric distortion."""
        steps = [
            RandomScale(self.short_side, self.max_size, self.scales),
            RandomCrop(self.crop_size, self.cat_max_ratio),
            v2.RandomHorizontalFlip(self.flip),
            *([PhotometricDistortion()] if self.photometric_distortion else []),
            v2.ToPureTensor(),
        ]
        return v2.Compose(steps)

    def val_transforms(self) -> Transforms:
        """Return resizing of the image; the semantic mask is unchanged."""
        return v2.Compose([ResizeShortestEdge(self.short_side, self.max_size), v2.ToPureTensor()])
