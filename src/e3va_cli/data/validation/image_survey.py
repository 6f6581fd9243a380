"""The heads of some image files, before a run: which size annotations have, and whether there are more than 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from e3va_cli.data.images.intensity import IntensityScaling
from e3va_cli.data.images.orientation import displayed_size
from e3va_cli.data.images.reading import UPPER_BITS_NOTE, read_header
from e3va_cli.errors import UserError

SAMPLE = 256  # heads that are read


@dataclass(frozen=True)
class ImageSurvey:
    """What the heads of some images tell.

    Attributes:
        deep: how many are gray of more than 8 bits.
        cut: how many are of 16 bits in color.
        displayed, stored: of images that EXIF lays on their side, how many are annotated as displayed, and as stored.
    """

    deep: int = 0
    cut: int = 0
    displayed: int = 0
    stored: int = 0

    @property
    def orient_ambiguous(self) -> bool:
        """Whether an image whose size fits both is turned: unless the others are annotated as stored."""
        return self.stored <= self.displayed

    def notes(self, name: str, scaling: IntensityScaling) -> list[str]:
        """What a user may not expect of the images that `name` tells of."""
        found = [f"{name}: color images of 16 bits, {UPPER_BITS_NOTE}"] if self.cut else []
        if not self.deep or scaling.range is not None:
            return found
        low, high = scaling.percentiles
        return [
            *found,
            f"{name}: images of more than 8 bits: what is black and white in each are the percentiles {low:g} and "
            f"{high:g} of its own values; one scale for all is, for 12 bits, dataset.intensity_range=[0,4095]",
        ]


def survey_images(length: int, file_of: Callable[[int], tuple[Path, tuple[int, int]]]) -> ImageSurvey:
    """Read the heads of some of so many files, evenly spread.

    Files that cannot be used are passed over: what reads them later says why.

    Args:
        length: how many there are.
        file_of: the path of one, and the (H, W) that its annotations have.
    """
    deep = cut = displayed = stored = 0
    chosen = np.linspace(0, length - 1, min(SAMPLE, length)).round().astype(int)
    for index in sorted(set(chosen.tolist())):
        try:
            path, annotated = file_of(index)
            head = read_header(path)
        except UserError:
            continue
        deep += head.is_high_bit_depth
        cut += head.is_16bit_color
        as_displayed = displayed_size(head.size, head.orientation)
        if as_displayed != head.size:
            displayed += annotated == as_displayed
            stored += annotated == head.size
    return ImageSurvey(deep, cut, displayed, stored)
