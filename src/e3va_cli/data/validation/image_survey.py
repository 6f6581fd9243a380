"""Headers of a sample of image files, read before a run: bit depth, and whether EXIF orientations apply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from e3va_cli.data.images.intensity import IntensityScaling
from e3va_cli.data.images.orientation import displayed_size
from e3va_cli.data.images.reading import UPPER_BITS_NOTE, read_header
from e3va_cli.data.sampling import evenly_spaced
from e3va_cli.errors import UserError

SAMPLE = 256  # headers that are read


@dataclass(frozen=True)
class ImageSurvey:
    """Numbers of images in the sample.

    Attributes:
        high_bit_depth: grayscale of more than 8 bits.
        color_16bit: color of 16 bits.
        displayed, stored: with an EXIF rotation by 90 degrees, and annotated in the displayed or the stored size.
    """

    high_bit_depth: int = 0
    color_16bit: int = 0
    displayed: int = 0
    stored: int = 0

    @property
    def orient_ambiguous(self) -> bool:
        """Return whether to apply the orientation where both sizes fit, by how others are annotated."""
        return self.stored <= self.displayed

    def notes(self, name: str, scaling: IntensityScaling) -> list[str]:
        """Return warnings about bit depth; `name` is that of the data."""
        warnings = [f"{name}: 16-bit color images, {UPPER_BITS_NOTE}"] if self.color_16bit else []
        if not self.high_bit_depth or scaling.range is not None:
            return warnings
        low, high = scaling.percentiles
        return [
            *warnings,
            f"{name}: images of more than 8 bits are scaled by the percentiles {low:g} and {high:g} of each image; for "
            "one scale, set for example dataset.intensity_range=[0,4095] (12 bits)",
        ]


def survey_images(length: int, file_of: Callable[[int], tuple[Path, tuple[int, int]]]) -> ImageSurvey:
    """Read the headers of evenly spaced images; unreadable ones are skipped.

    Args:
        length: number of images.
        file_of: returns the path of an image, and its annotated (H, W).
    """
    high_bit_depth = color_16bit = displayed = stored = 0
    for index in evenly_spaced(length, SAMPLE):
        try:
            path, annotated = file_of(index)
            header = read_header(path)
        except UserError:
            continue
        high_bit_depth += header.is_high_bit_depth
        color_16bit += header.is_16bit_color
        as_displayed = displayed_size(header.size, header.orientation)
        if as_displayed != header.size:
            displayed += annotated == as_displayed
            stored += annotated == header.size
    return ImageSurvey(high_bit_depth, color_16bit, displayed, stored)
