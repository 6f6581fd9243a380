"""What happens to an image and its label map between the file and the batch.

The recipe that results on ADE20K are compared under (https://github.com/open-mmlab/mmsegmentation): random scale,
random crop, flip, distortion of colours.
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
HUE_SHIFT = 0.1  # of a turn; brightness, contrast and saturation are distorted as much as torchvision does by default


class RandomScale(v2.Transform):
    """Resize to fit into `short_side` by `max_size` pixels, both times one factor drawn evenly from `scales`.

    The shorter side of an image is held against `short_side` whichever way the image lies, unlike in
    torchvision's ScaleJitter. Images are interpolated, label maps take the nearest pixel.
    """

    def __init__(self, short_side: int, max_size: int, scales: Sequence[float]) -> None:
        super().__init__()
        self.short_side, self.max_size, self.scales = short_side, max_size, scales

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The new (height, width)."""
        sides = v2.query_size(flat_inputs)
        scale = torch.empty(()).uniform_(*self.scales).item()
        scale *= min(self.short_side / min(sides), self.max_size / max(sides))
        return {"size": [max(1, round(side * scale)) for side in sides]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize one image or label map."""
        return self._call_kernel(F.resize, inpt, size=params["size"], antialias=True)


class RandomCrop(torch.nn.Module):
    """Cut out `size` by `size` pixels, or the whole of a side that is shorter.

    A place where one class covers more than `one_class` of the labelled pixels, or where nothing is labelled, is drawn
    again, up to ten times in all.
    """

    def __init__(self, size: int, one_class: float) -> None:
        super().__init__()
        self.size, self.one_class = size, one_class

    def forward(self, image: tv_tensors.Image, target: Target) -> tuple[tv_tensors.Image, Target]:
        """Crop image and label map at the same place."""
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
        return bool(pixels.any()) and int(pixels.max()) <= self.one_class * int(pixels.sum())


class PhotometricDistortion(v2.RandomPhotometricDistort):
    """Brightness, contrast, saturation and hue, each half of the time; channels are never permuted, as colour tells."""

    def __init__(self) -> None:
        super().__init__(hue=(-HUE_SHIFT, HUE_SHIFT))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """As torchvision draws them, but for the permutation."""
        return {**super().make_params(flat_inputs), "channel_permutation": None}


@dataclass(kw_only=True)
class SegmentationTransforms(Options):
    """Resizing and augmentation of images with label maps; options of every segmentation data set.

    Nothing is padded here: `collate` pads what is smaller than the others of its batch, so that the model knows the
    padding and makes it the mean colour, and heads count it as not labelled.
    """

    short_side: int = option(help="pixels", above=0)
    max_size: int = option(help="pixels of the longest side, which the short side gives way to", above=0)
    scales: list[float] = option(help="least and most of the random factor of both in training")
    crop_size: int = option(
        help="pixels, height and width of what training sees, at most; memory grows with it", above=0
    )
    cat_max_ratio: float = option(
        formerly="crop_one_class", help="part of a crop's labelled pixels that one class may cover", least=0, most=1
    )
    flip: float = option(help="probability of a horizontal flip", least=0, most=1)
    photometric_distortion: bool = option(
        formerly="distort", help="randomly change brightness, contrast, saturation and hue in training"
    )

    def errors(self, at: str) -> Iterator[str]:
        """Yield what is wrong with the factors."""
        if self.scales is not None and (len(self.scales) != 2 or not 0 < self.scales[0] <= self.scales[1]):
            yield f"{at}.scales={self.scales}: [least,most], factors of the size above 0"

    @property
    def largest_image(self) -> tuple[int, int]:
        """Height and width of the largest image that training can meet."""
        return self.crop_size, self.crop_size

    def train_transforms(self) -> Transforms:
        """Random scale, crop and flip of image and label map; random colours."""
        steps = [
            RandomScale(self.short_side, self.max_size, self.scales),
            RandomCrop(self.crop_size, self.cat_max_ratio),
            v2.RandomHorizontalFlip(self.flip),
            *([PhotometricDistortion()] if self.photometric_distortion else []),
            v2.ToPureTensor(),
        ]
        return v2.Compose(steps)

    def val_transforms(self) -> Transforms:
        """Resize the image to one size; the label map stays as it is."""
        return v2.Compose([ResizeShortestEdge(self.short_side, self.max_size), v2.ToPureTensor()])
