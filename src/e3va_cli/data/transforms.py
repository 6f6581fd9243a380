"""Transforms of images with boxes and masks, on torchvision's v2 transforms."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F  # noqa: N812 (torchvision's own alias)

from e3va_cli.components.options import Options, option
from e3va_cli.data.dataset import Target
from e3va_cli.data.encoded_masks import EncodedMasks

Transforms = Callable[..., tuple[Any, Target]]


class ResizeShortestEdge(torch.nn.Module):
    """Resize an image, but not its target, to a short side of `size` and a long side of at most `max_size` pixels."""

    def __init__(self, size: int, max_size: int) -> None:
        super().__init__()
        self.size, self.max_size = size, max_size

    def forward(self, image: tv_tensors.Image, target: Target) -> tuple[tv_tensors.Image, Target]:
        """Resize the image; evaluation uses targets at the original size."""
        height, width = image.shape[-2:]
        return F.resize(image, list(resized_shape((height, width), self.size, self.max_size)), antialias=True), target


def resized_shape(size: tuple[int, int], short: int, longest: int) -> tuple[int, int]:
    """Return height and width scaled to a short side of `short` and a long side of at most `longest` pixels.

    Rounds half up, as in mmdetection and detectron2; torchvision truncates, which turns 800 into 799 for many heights.
    """
    scale = min(short / min(size), longest / max(size))
    height, width = (max(1, int(side * scale + 0.5)) for side in size)
    return height, width


class ResizeFirst(v2.Compose):
    """A composition whose first transform resizes and decodes `EncodedMasks` at the new size."""


class RandomResizeShortestEdge(v2.RandomShortestSize):
    """torchvision's RandomShortestSize with the sizes of `resized_shape`, decoding `EncodedMasks`."""

    _transformed_types = (*v2.RandomShortestSize._transformed_types, EncodedMasks)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the new (height, width)."""
        short = self.min_size[int(torch.randint(len(self.min_size), ()))]
        height, width = v2.query_size(flat_inputs)
        return {"size": resized_shape((height, width), short, self.max_size or sys.maxsize)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize one input."""
        return inpt.at(params["size"]) if isinstance(inpt, EncodedMasks) else super().transform(inpt, params)


class RandomCropInRange(v2.Transform):
    """Crop to height and width drawn uniformly from `least` to `most` pixels; shorter sides are kept.

    Boxes are clipped to the crop; those outside of it have no area. A box may be inside the crop and its mask outside.
    mmdetection's `RandomCrop(crop_type="absolute_range", allow_negative_crop=True)`.
    """

    def __init__(self, least: int, most: int) -> None:
        super().__init__()
        self.least, self.most = least, most

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw `top`, `left`, `height` and `width` of the crop."""
        whole = v2.query_size(flat_inputs)
        height, width = (random_int(min(side, self.least), min(side, self.most)) for side in whole)
        top, left = random_int(0, whole[0] - height), random_int(0, whole[1] - width)
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop an image, boxes or masks."""
        return self._call_kernel(F.crop, inpt, **params)


def random_int(least: int, most: int) -> int:
    """Draw an integer uniformly from `least` to `most`, both included."""
    return int(torch.randint(least, most + 1, ()))


@dataclass(kw_only=True)
class DetectionTransforms(Options):
    """Resizing and augmentation options of detection data sets.

    The optional crop precedes the resize to one of `train_short_sides` (DETR, arXiv 2005.12872, section 4; Swin's and
    mmdetection's detection recipes).
    """

    train_short_sides: list[int] = option(help="pixels of the short side; one is drawn per image")
    val_short_side: int = option(help="pixels of the short side in evaluation", gt=0)
    max_size: int = option(help="maximum pixels of the long side; affects memory", gt=0)
    flip: float = option(help="probability of a horizontal flip", ge=0, le=1)
    crop_probability: float = option(
        0.0,
        help="probability of resizing to crop_short_sides and cropping before the resize",
        ge=0,
        le=1,
        legacy_value=0.0,
        training_only=True,
    )
    crop_short_sides: list[int] = option(
        [],
        help="short sides before a crop, in pixels; one is drawn per image",
        legacy_value=[400, 500, 600],
        training_only=True,
    )
    crop_range: list[int] = option(
        [], help="[least,most] pixels of a crop's height and width", legacy_value=[384, 600], training_only=True
    )

    def errors(self, at: str) -> Iterator[str]:
        """Yield the errors of sizes."""
        sides = self.train_short_sides
        if sides is not None and (not sides or min(sides) < 1):
            yield f"{at}.train_short_sides={sides}: set it to at least one size in pixels"
        if self.crop_probability:
            sides, crop = self.crop_short_sides, self.crop_range
            if not sides or min(sides) < 1:
                yield f"{at}.crop_short_sides={sides}: set it to at least one size in pixels"
            if not crop or len(crop) != 2 or not 0 < crop[0] <= crop[1]:
                yield f"{at}.crop_range={crop}: set it to [least,most] pixels of a crop's sides"

    @property
    def largest_image(self) -> tuple[int, int]:
        """Return height and width of the largest training image, in landscape orientation; crops are resized too."""
        return min(max(self.train_short_sides), self.max_size), self.max_size

    def train_transforms(self) -> Transforms:
        """Return optional crop, multi-scale resize and horizontal flip; boxes below 1 pixel are removed."""
        return ResizeFirst(
            [
                self._resize(),
                v2.RandomHorizontalFlip(self.flip),
                v2.ClampBoundingBoxes(),
                v2.SanitizeBoundingBoxes(min_size=1),
                v2.ToPureTensor(),
            ]
        )

    def _resize(self) -> v2.Transform:
        whole = RandomResizeShortestEdge(list(self.train_short_sides), max_size=self.max_size, antialias=True)
        if not self.crop_probability:
            return whole
        before = RandomResizeShortestEdge(list(self.crop_short_sides), max_size=self.max_size, antialias=True)
        part = v2.Compose([before, RandomCropInRange(*self.crop_range), whole])
        return v2.RandomChoice([whole, part], p=[1 - self.crop_probability, self.crop_probability])

    def val_transforms(self) -> Transforms:
        """Return resizing of the image."""
        return ResizeFirst([ResizeShortestEdge(self.val_short_side, self.max_size), v2.ToPureTensor()])
