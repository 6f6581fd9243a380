"""What happens to an image and its target between the file and the batch, with torchvision's transforms."""

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
    """Resize an image, not its target, to a short side of `size` and a long side of at most `max_size` pixels."""

    def __init__(self, size: int, max_size: int) -> None:
        super().__init__()
        self.size, self.max_size = size, max_size

    def forward(self, image: tv_tensors.Image, target: Target) -> tuple[tv_tensors.Image, Target]:
        """Evaluation compares at the original size, so the target stays as it is, masks encoded."""
        height, width = image.shape[-2:]
        return F.resize(image, list(resized_shape((height, width), self.size, self.max_size)), antialias=True), target


def resized_shape(size: tuple[int, int], short: int, longest: int) -> tuple[int, int]:
    """Return height and width scaled to a short side of `short` and a long side of at most `longest` pixels.

    Rounded to the nearest pixel, halves up, as mmdetection and detectron2 do it; torchvision truncates, which makes 799
    pixels of many heights that are to become 800.
    """
    scale = min(short / min(size), longest / max(size))
    height, width = (max(1, int(side * scale + 0.5)) for side in size)
    return height, width


class ResizeFirst(v2.Compose):
    """Steps of which the first resizes: masks may come as `EncodedMasks`, which it draws at the new size."""


class RandomResizeShortestEdge(v2.RandomShortestSize):
    """As torchvision's, but sizes are those of `resized_shape`, and encoded masks are drawn."""

    _transformed_types = (*v2.RandomShortestSize._transformed_types, EncodedMasks)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The new (height, width)."""
        short = self.min_size[int(torch.randint(len(self.min_size), ()))]
        height, width = v2.query_size(flat_inputs)
        return {"size": resized_shape((height, width), short, self.max_size or sys.maxsize)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize one input."""
        return inpt.at(params["size"]) if isinstance(inpt, EncodedMasks) else super().transform(inpt, params)


class RandomCropInRange(v2.Transform):
    """Crop height and width, each drawn evenly from `least` to `most` pixels; a side that is shorter stays whole.

    Boxes are clipped to the crop; those outside of it are left without area. An object may have a box in the crop and
    no pixel of its mask. mmdetection's `RandomCrop(crop_type="absolute_range", allow_negative_crop=True)`.
    """

    def __init__(self, least: int, most: int) -> None:
        super().__init__()
        self.least, self.most = least, most

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The window: `top`, `left`, `height`, `width`."""
        whole = v2.query_size(flat_inputs)
        height, width = (random_int(min(side, self.least), min(side, self.most)) for side in whole)
        top, left = random_int(0, whole[0] - height), random_int(0, whole[1] - width)
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop an image, boxes or masks."""
        return self._call_kernel(F.crop, inpt, **params)


def random_int(least: int, most: int) -> int:
    """A whole number, evenly from `least` to `most`."""
    return int(torch.randint(least, most + 1, ()))


@dataclass(kw_only=True)
class DetectionTransforms(Options):
    """Resizing and augmentation of images with boxes; options of every detection data set.

    A crop comes before the resize to one of `train_short_sides` (DETR, arXiv 2005.12872, section 4; Swin's and
    mmdetection's detection recipes).
    """

    train_short_sides: list[int] = option(help="pixels; one is drawn for each image")
    val_short_side: int = option(help="pixels", above=0)
    max_size: int = option(
        help="pixels of the longest side, which a short side gives way to; memory grows with it", above=0
    )
    flip: float = option(help="probability of a horizontal flip", least=0, most=1)
    crop_probability: float = option(
        0.0,
        help="of resizing to one of crop_short_sides and cropping, before the resize",
        least=0,
        most=1,
        before=0.0,
        of_training=True,
    )
    crop_short_sides: list[int] = option(
        [], help="pixels; one is drawn for each image that is cropped", before=[400, 500, 600], of_training=True
    )
    crop_range: list[int] = option(
        [], help="least and most pixels of height and width of a crop", before=[384, 600], of_training=True
    )

    def errors(self, at: str) -> Iterator[str]:
        """Yield what is wrong with sizes."""
        sides = self.train_short_sides
        if sides is not None and (not sides or min(sides) < 1):
            yield f"{at}.train_short_sides={sides}: at least one size, in pixels"
        if self.crop_probability:
            sides, crop = self.crop_short_sides, self.crop_range
            if not sides or min(sides) < 1:
                yield f"{at}.crop_short_sides={sides}: at least one size, in pixels"
            if not crop or len(crop) != 2 or not 0 < crop[0] <= crop[1]:
                yield f"{at}.crop_range={crop}: [least,most] of the sides of a crop, in pixels"

    @property
    def largest_image(self) -> tuple[int, int]:
        """Height and width of the largest image that training can meet, lying on its side: a crop is resized too."""
        return min(max(self.train_short_sides), self.max_size), self.max_size

    def train_transforms(self) -> Transforms:
        """Crop or none, multi-scale resize and horizontal flip; drops boxes that vanish."""
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
        """Resize to one size."""
        return ResizeFirst([ResizeShortestEdge(self.val_short_side, self.max_size), v2.ToPureTensor()])
