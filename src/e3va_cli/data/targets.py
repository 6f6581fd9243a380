"""What every data set yields, whichever format it was read from."""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors

from e3va_cli.errors import UserError, first_line
from e3va_cli.files import require_regular
from e3va_cli.text import printable

logging.getLogger("PIL").addHandler(logging.NullHandler())  # what is wrong with a file, its exceptions say

# Of all that Pillow knows: it would start Ghostscript for a file of another kind, whatever its suffix is.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
IMAGE_SUFFIXES = {
    *(".bmp", ".gif", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    *(".png", ".apng", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff", ".webp"),
}
ORIENTATION = 0x0112  # in EXIF; 1 means as stored

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

    left_out_images: int
    """Images without anything to train on that were left out."""

    offers: frozenset[str]
    """What targets hold: of boxes, masks and semantic."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, Target]: ...


class DetectionDataset(DenseDataset, Protocol):
    """Images with boxes, and perhaps masks."""

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
    """Opens and decodes all of an image file, in the mode that it is stored in; of an animated one, the first picture.

    Raises:
        UserError: there is no such file, or it is truncated, too large or no image.
    """
    with _faults_told(path), _opened(path) as image:
        image.load()
        return image


def read_image(path: Path) -> tv_tensors.Image:
    """Reads an image of any common mode as RGB: uint8 [3, H, W].

    Raises:
        UserError: there is no such file, or it is truncated, too large or no image.
    """
    image = decode_image(path)
    # An EXIF orientation is not applied: boxes and masks refer to the pixels as stored, whose size the
    # annotation file gives; torchvision's CocoDetection reads them the same way.
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns of a transparent palette that goes straight to RGB
    if image.mode == "F":
        raise UserError(f"cannot read the image {printable(path)}: it is of mode F (fractions); save it with 8 bits")
    with _faults_told(path):
        pixels = torch.from_numpy(np.array(image.convert("RGB")))  # H, W, 3
    return tv_tensors.Image(pixels.permute(2, 0, 1).contiguous())


def size_in_file(path: Path) -> tuple[int, int]:
    """(H, W) from the head of an image file.

    Raises:
        UserError: there is no such file, or it is too large or no image.
    """
    with _faults_told(path), _opened(path) as image:
        return image.height, image.width


def image_notes(path: Path) -> Iterator[tuple[str, str]]:
    """What a user may expect to be read in another way, of an image that can be read: kinds, and what is done."""
    try:
        with _faults_told(path), _opened(path) as image:
            orientation = image.getexif().get(ORIENTATION, 1)
            several = getattr(image, "is_animated", False) and image.format != "MPO"  # phones add previews to JPEGs
    except UserError:
        yield "image with damage beside its pixels", "which are read all the same"
        return
    if orientation != 1:
        yield "image with an EXIF orientation", f"{orientation}; not applied, annotations must fit the pixels as stored"
    if several:
        yield "animated image", "the first picture is read"


def _opened(path: Path) -> Image.Image:
    require_regular(path)
    return Image.open(path, formats=FORMATS)


@contextmanager
def _faults_told(path: Path) -> Iterator[None]:
    """What Pillow raises as one line; a broken file can make its decoders raise anything."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"no such image: {printable(path)}") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"the image {printable(path)} is too large: {first_line(error)}") from error
    except Exception as error:
        raise UserError(f"cannot read the image {printable(path)}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not an image, or of an unknown format; known are {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return printable(first_line(error))
