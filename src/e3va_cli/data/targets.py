"""What every data set yields, whichever format it was read from."""

import struct
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors

from e3va_cli.errors import UserError, first_line

Target = dict[str, Any]
"""What is to be found in one image of H x W pixels with N objects. Always:

image_id        int, the data set's own
original_size   (H, W) of the file in pixels; transforms leave it as it is

For detection:

boxes           tv_tensors.BoundingBoxes, XYXY in pixels, float32 [N, 4], inside the image
labels          int64 [N], 1..K without gaps; 0 is left to the heads for the background
masks           tv_tensors.Mask, uint8 [N, H, W], 0 or 1; no such key where the data set has no masks

For semantic segmentation:

semantic        tv_tensors.Mask, int16 [H, W], the class of each pixel, 1..K; 0 where it is not labelled
"""


class DenseDataset(Protocol):
    """A map-style data set of `(image, target)`, the image a tv_tensors.Image, uint8 [3, H, W], RGB."""

    classes: list[str]
    """Name of label k at index k - 1."""

    category_ids: list[int]
    """The data set's own id of label k at index k - 1; results are written with it."""

    dropped: dict[str, int]
    """Annotations left out of training: how many, by reason."""

    offers: frozenset[str]
    """What targets hold: of boxes, masks and semantic."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, Target]: ...


class DetectionDataset(DenseDataset, Protocol):
    """Images with boxes, and perhaps masks."""

    def image_size(self, index: int) -> tuple[int, int]:
        """(H, W) in pixels, without opening the file."""
        ...

    def ground_truth(self) -> dict[str, Any]:
        """`images`, `annotations` and `categories` in COCO's format: what evaluation compares with.

        Also holds what training leaves out (crowds, boxes too small), as far as pycocotools can evaluate it; `iscrowd`
        marks what an evaluation ignores.
        An annotation without a usable mask has no `segmentation`: an evaluation of masks has to leave it out.
        """
        ...


def require_same_classes(train: DenseDataset, val: DenseDataset) -> None:
    """Raises UserError naming the difference, unless both splits number the same classes the same way."""
    ours = Counter(zip(train.category_ids, train.classes, strict=True))
    theirs = Counter(zip(val.category_ids, val.classes, strict=True))
    if ours == theirs:
        return
    difference = [
        f"only in {split}: {', '.join(f'{name} (id {number})' for number, name in sorted(only))}"
        for split, only in (("train", ours - theirs), ("val", theirs - ours))
        if only
    ]
    raise UserError(f"the classes of train and val differ; {'; '.join(difference)}")


def decode_image(path: Path) -> Image.Image:
    """Opens and decodes all of an image file, in the mode that it is stored in.

    Raises:
        UserError: there is no such file, or it is truncated or no image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise UserError(f"no such image: {path}") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise UserError(f"cannot read the image {path}: {_reason(error)}") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"the image {path} is too large: {error}") from error


def read_image(path: Path) -> tv_tensors.Image:
    """Reads an image of any common mode as RGB: uint8 [3, H, W].

    Raises:
        UserError: there is no such file, or it is truncated or no image.
    """
    image = decode_image(path)
    # An EXIF orientation is not applied: boxes and masks refer to the pixels as stored, whose size the
    # annotation file gives; torchvision's CocoDetection reads them the same way.
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns of a transparent palette that goes straight to RGB
    pixels = torch.from_numpy(np.array(image.convert("RGB")))  # H, W, 3
    return tv_tensors.Image(pixels.permute(2, 0, 1).contiguous())


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or of an unknown format"
    return first_line(error)
