"""Read image files of any common format, bit depth and orientation as pixels."""

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

from e3va_cli.data.images.formats import FORMATS, RAW, UNSUPPORTED_SUFFIXES, conversion_hint, unsupported_format
from e3va_cli.data.images.intensity import IntensityScaling
from e3va_cli.data.images.orientation import (
    STORED,
    apply_orientation,
    displayed_size,
    orientation_of,
    should_apply_orientation,
)
from e3va_cli.errors import UserError, first_line
from e3va_cli.utils.files import check_regular_file
from e3va_cli.utils.text import escape_text

logging.getLogger("PIL").addHandler(logging.NullHandler())  # its exceptions are reported

JPEG2000 = b"\0\0\0\x0cjP  "  # first bytes of a file
HIGH_BIT_DEPTH_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow's grayscale of more than 8 bits
UPPER_BITS_NOTE = "of which the upper 8 bits are read"  # of 16-bit color
DEFAULT_SCALING = IntensityScaling()


def decode_image(path: Path) -> Image.Image:
    """Open and decode an image file in its stored mode; of an animation, the first frame.

    Raises:
        UserError: the file does not exist, or is truncated, too large or no image.
    """
    with _pillow_errors(path), _open(path) as image:
        image.load()
        return image


@dataclass(frozen=True)
class RawImage:
    """An image as stored in its file.

    Attributes:
        pixels: uint8 (3, H, W) in RGB, or float32 (1, H, W) for grayscale of more than 8 bits.
        orientation: EXIF orientation, 1 to 8.
        is_16bit_color: whether the pixels are the upper 8 bits of 16-bit color.
    """

    pixels: Tensor
    orientation: int = STORED
    is_16bit_color: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Return the stored (H, W)."""
        return self.pixels.shape[1], self.pixels.shape[2]

    def displayed(self, annotated: tuple[int, int] | None = None, *, orient_ambiguous: bool = True) -> Tensor:
        """Return the pixels with the EXIF orientation applied, unless the annotated (H, W) is the stored one."""
        rotates = should_apply_orientation(self.size, self.orientation, annotated, orient_ambiguous=orient_ambiguous)
        return apply_orientation(self.pixels, self.orientation) if rotates else self.pixels


def read_raw(path: Path) -> RawImage:
    """Read an image of any common mode.

    Raises:
        UserError: the file does not exist, or is truncated, too large or no image.
    """
    with _pillow_errors(path), _open(path) as image:
        is_16bit_color = _is_16bit_color(image)
        image.load()
        return RawImage(pil_to_pixels(image), orientation_of(image), is_16bit_color)


def pil_to_pixels(image: Image.Image) -> Tensor:
    """Return the pixels of a PIL image of any mode; see `RawImage.pixels`."""
    if image.mode in HIGH_BIT_DEPTH_MODES:
        return torch.from_numpy(np.asarray(image).astype(np.float32))[None]
    if image.mode == "P":
        image = image.convert("RGBA")  # converting a transparent palette to RGB directly warns
    pixels = torch.from_numpy(np.array(image.convert("RGB")))  # H, W, 3
    return pixels.permute(2, 0, 1).contiguous()


def _is_16bit_color(image: Image.Image) -> bool:
    """Return whether an image that is not loaded yet has 16-bit color, of which Pillow reads the upper 8 bits."""
    return image.mode not in HIGH_BIT_DEPTH_MODES and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def read_image(
    path: Path,
    scaling: IntensityScaling = DEFAULT_SCALING,
    annotated: tuple[int, int] | None = None,
    *,
    orient_ambiguous: bool = True,
) -> tv_tensors.Image:
    """Read an image of any common mode as RGB: uint8 [3, H, W].

    Args:
        path: of the file.
        scaling: of an image of more than 8 bits.
        annotated: annotated (H, W); the EXIF orientation is applied unless this is the stored size.
        orient_ambiguous: whether it is applied if both sizes are equal.

    Raises:
        UserError: the file does not exist, or is truncated, too large or no image.
    """
    return tv_tensors.Image(scaling(read_raw(path).displayed(annotated, orient_ambiguous=orient_ambiguous)))


class ImageHeader(NamedTuple):
    """Header of an image file: stored (H, W), EXIF orientation, grayscale of more than 8 bits, 16-bit color."""

    size: tuple[int, int]
    orientation: int
    is_high_bit_depth: bool
    is_16bit_color: bool


def read_header(path: Path) -> ImageHeader:
    """Read the header of an image file; without the orientation of a PNG, which would require reading all of it.

    Raises:
        UserError: the file does not exist, or is too large or no image.
    """
    with _pillow_errors(path), _open(path) as image:
        orientation = STORED if image.format == "PNG" else orientation_of(image)
        return ImageHeader(
            (image.height, image.width), orientation, image.mode in HIGH_BIT_DEPTH_MODES, _is_16bit_color(image)
        )


def read_image_size(path: Path) -> tuple[int, int]:
    """Read the displayed (H, W) from the header of an image file.

    Raises:
        UserError: the file does not exist, or is too large or no image.
    """
    with _pillow_errors(path), _open(path) as image:
        return displayed_size((image.height, image.width), orientation_of(image))


def image_notes(path: Path) -> Iterator[tuple[str, str]]:
    """Yield notes on a readable image file as (issue type, detail)."""
    try:
        with _pillow_errors(path), _open(path) as image:
            is_animated = getattr(image, "is_animated", False) and image.format != "MPO"  # phones add previews to JPEGs
    except UserError:
        yield "corrupt image metadata", "the pixels are read"
        return
    if is_animated:
        yield "animated image", "the first frame is read"


def _open(path: Path) -> Image.Image:
    check_regular_file(path)
    if UNSUPPORTED_SUFFIXES.get(path.suffix.lower()) == RAW and unsupported_format(path) == RAW:
        raise SyntaxError(f"{RAW} files are not supported; {conversion_hint(RAW)}")
    try:
        return Image.open(path, formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        if (name := unsupported_format(path)) is None:
            raise
        raise SyntaxError(f"{name} files are not supported; {conversion_hint(name)}") from error
    except MemoryError as error:
        with path.open("rb") as file:
            if not file.read(len(JPEG2000)).startswith(JPEG2000):
                raise
        raise SyntaxError("its header claims a size beyond any memory") from error


@contextmanager
def _pillow_errors(path: Path) -> Iterator[None]:
    """Turn Pillow's exceptions into a UserError; a corrupt file can make its decoders raise anything."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"no such image: {escape_text(path)}") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"the image {escape_text(path)} is too large: {first_line(error)}") from error
    except MemoryError:  # not the file's fault
        raise
    except Exception as error:
        raise UserError(f"cannot read the image {escape_text(path)}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not an image, or of an unsupported format; supported are {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return escape_text(first_line(error))
