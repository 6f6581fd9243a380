"""Read image files as the pixels that data sets yield, and say what is wrong with those that cannot be read."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from e3va_cli.data.images.formats import FORMATS, RAW, UNREAD, remedy, unread_format
from e3va_cli.data.images.intensity import IntensityScaling
from e3va_cli.data.images.orientation import STORED, displayed_size, is_turned, orientation_of, turned
from e3va_cli.errors import UserError, first_line
from e3va_cli.utils.files import check_regular_file
from e3va_cli.utils.text import escape_text

logging.getLogger("PIL").addHandler(logging.NullHandler())  # what is wrong with a file, its exceptions say

JPEG2000 = b"\0\0\0\x0cjP  "  # that such a file begins with
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # of Pillow: gray of more than 8 bits
READ_OF_COLOR = "of which the upper 8 bits are read"  # of 16 in color
USUAL_SCALING = IntensityScaling()


def decode_image(path: Path) -> Image.Image:
    """Opens and decodes all of an image file, in the mode that it is stored in; of an animated one, the first picture.

    Raises:
        UserError: there is no such file, or it is truncated, too large or no image.
    """
    with _faults_told(path), _opened(path) as image:
        image.load()
        return image


@dataclass(frozen=True)
class RawImage:
    """An image as its file has it.

    Attributes:
        pixels: uint8 (3, H, W) in RGB, or float32 (1, H, W) in gray of more than 8 bits, as stored.
        orientation: EXIF's, 1 to 8.
        is_cut: whether they are the upper 8 bits of 16 in color.
    """

    pixels: Tensor
    orientation: int = STORED
    is_cut: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the pixels as stored."""
        return self.pixels.shape[1], self.pixels.shape[2]

    def displayed(self, annotated: tuple[int, int] | None = None, *, unsure: bool = True) -> Tensor:
        """The pixels as a viewer shows them, unless annotations of that size are of the stored ones."""
        is_lying = is_turned(self.size, self.orientation, annotated, unsure=unsure)
        return turned(self.pixels, self.orientation) if is_lying else self.pixels


def read_raw(path: Path) -> RawImage:
    """Reads an image of any common mode.

    Raises:
        UserError: there is no such file, or it is truncated, too large or no image.
    """
    with _faults_told(path), _opened(path) as image:
        is_cut = _is_cut(image)
        image.load()
        return RawImage(pixels_of(image), orientation_of(image), is_cut)


def pixels_of(image: Image.Image) -> Tensor:
    """The pixels of a PIL image of any mode, as `RawImage` has them."""
    if image.mode in DEEP_MODES:
        return torch.from_numpy(np.asarray(image).astype(np.float32))[None]
    if image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns of a transparent palette that goes straight to RGB
    pixels = torch.from_numpy(np.array(image.convert("RGB")))  # H, W, 3
    return pixels.permute(2, 0, 1).contiguous()


def _is_cut(image: Image.Image) -> bool:
    """Whether an image that is not yet loaded has 16 bits a channel of which Pillow reads the upper eight."""
    return image.mode not in DEEP_MODES and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def read_image(
    path: Path,
    scaling: IntensityScaling = USUAL_SCALING,
    annotated: tuple[int, int] | None = None,
    *,
    unsure: bool = True,
) -> tv_tensors.Image:
    """Reads an image of any common mode as RGB: uint8 [3, H, W].

    Args:
        path: of the file.
        scaling: of an image of more than 8 bits a channel.
        annotated: (H, W) that the annotations have; an EXIF orientation is applied unless that is the size as stored.
        unsure: whether it is applied where the size fits both.

    Raises:
        UserError: there is no such file, or it is truncated, too large or no image.
    """
    return tv_tensors.Image(scaling(read_raw(path).displayed(annotated, unsure=unsure)))


class ImageHead(NamedTuple):
    """What the head of an image file tells: (H, W) as stored, EXIF's orientation, gray or color of more than 8 bits."""

    size: tuple[int, int]
    orientation: int
    is_deep: bool
    is_cut: bool


def head_of(path: Path) -> ImageHead:
    """The head of an image file; of a PNG no orientation, which would take all of it to read.

    Raises:
        UserError: there is no such file, or it is too large or no image.
    """
    with _faults_told(path), _opened(path) as image:
        orientation = STORED if image.format == "PNG" else orientation_of(image)
        return ImageHead((image.height, image.width), orientation, image.mode in DEEP_MODES, _is_cut(image))


def size_in_file(path: Path) -> tuple[int, int]:
    """(H, W) from the head of an image file, as the image is displayed.

    Raises:
        UserError: there is no such file, or it is too large or no image.
    """
    with _faults_told(path), _opened(path) as image:
        return displayed_size((image.height, image.width), orientation_of(image))


def image_notes(path: Path) -> Iterator[tuple[str, str]]:
    """What a user may expect to be read in another way, of an image that can be read: kinds, and what is done."""
    try:
        with _faults_told(path), _opened(path) as image:
            several = getattr(image, "is_animated", False) and image.format != "MPO"  # phones add previews to JPEGs
    except UserError:
        yield "image with damage beside its pixels", "which are read all the same"
        return
    if several:
        yield "animated image", "the first picture is read"


def _opened(path: Path) -> Image.Image:
    check_regular_file(path)
    if UNREAD.get(path.suffix.lower()) == RAW and unread_format(path) == RAW:
        raise SyntaxError(f"{RAW} files cannot be read here; {remedy(RAW)}")
    try:
        return Image.open(path, formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        if (kind := unread_format(path)) is None:
            raise
        raise SyntaxError(f"{kind} files cannot be read here; {remedy(kind)}") from error
    except MemoryError as error:
        with path.open("rb") as file:
            if not file.read(len(JPEG2000)).startswith(JPEG2000):
                raise
        raise SyntaxError("its header claims to be larger than any memory") from error  # which Pillow believes


@contextmanager
def _faults_told(path: Path) -> Iterator[None]:
    """What Pillow raises as one line; a broken file can make its decoders raise anything."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"no such image: {escape_text(path)}") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"the image {escape_text(path)} is too large: {first_line(error)}") from error
    except MemoryError:  # no fault of the file's
        raise
    except Exception as error:
        raise UserError(f"cannot read the image {escape_text(path)}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not an image, or of an unknown format; known are {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return escape_text(first_line(error))
