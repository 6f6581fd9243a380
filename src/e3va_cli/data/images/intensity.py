"""Grayscale images of more than 8 bits, as microscopes, satellites and scanners write them, brought to 8 bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from e3va_cli.components.options import Condition, Options, option

DARK = 1 / 8  # of the range: an image that stays below it is taken for one that the range does not suit
USUAL_PERCENTILES = (0.1, 99.9)


@dataclass(frozen=True)
class IntensityScaling:
    """What becomes black and white: a fixed range, or percentiles of each image's own values.

    Attributes:
        range: least and most of all images; None for the percentiles.
        percentiles: of the values of one image.
    """

    range: tuple[float, float] | None = None
    percentiles: tuple[float, float] = USUAL_PERCENTILES

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels of any kind, (1, H, W) or (3, H, W), as uint8 (3, H, W); those of 8 bits stay as they are."""
        if pixels.dtype == torch.uint8:
            return pixels
        black, white = self.limits(pixels)
        scaled = (pixels.double() - black) * (255 / (white - black))
        gray = scaled.nan_to_num(0).round().clamp(0, 255).to(torch.uint8)
        return gray.expand(3, -1, -1).contiguous()

    def limits(self, pixels: Tensor) -> tuple[float, float]:
        """What becomes black and white in an image."""
        black, white = self.range or _percentiles(pixels.numpy(), self.percentiles)
        return black, white if white > black else black + 1

    def leaves_dark(self, pixels: Tensor) -> bool:
        """Whether a fixed range leaves an image almost black."""
        return self.range is not None and pixels.dtype != torch.uint8 and is_dark(pixels, *self.range)


def is_dark(pixels: Tensor, low: float = 0, high: float = 255) -> bool:
    """Whether all values lie in the lowest eighth of a range."""
    return float(pixels.float().nan_to_num(low).max()) < low + DARK * (high - low)


def _percentiles(values: np.ndarray, percentiles: Sequence[float]) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = percentiles
    # Values that occur: of a small image, the least and the most of all.
    return float(np.percentile(finite, low, method="lower")), float(np.percentile(finite, high, method="higher"))


@dataclass(kw_only=True)
class ImageFileOptions(Options):
    """Options of all data sets whose images are files."""

    intensity_range: list[float] | None = option(
        None,
        help="of images of more than 8 bits: what is black and white in all, as [0,4095]; null: as below",
        before=[0.0, 65535.0],
    )
    intensity_percentiles: list[float] = option(
        list(USUAL_PERCENTILES),
        help="what is black and white, of each image's own values",
        before=list(USUAL_PERCENTILES),
        under=(Condition("intensity_range", lambda value: value is None, "set it to null"),),
    )

    def errors(self, at: str) -> Iterator[str]:
        """Yield what is wrong with ranges."""
        limits = self.intensity_range
        if limits is not None and (len(limits) != 2 or not limits[0] < limits[1]):
            yield f"{at}.intensity_range={limits}: [least,most], what becomes black and white, such as [0,4095]"
        percentiles = self.intensity_percentiles
        if percentiles is not None and (len(percentiles) != 2 or not 0 <= percentiles[0] < percentiles[1] <= 100):
            yield f"{at}.intensity_percentiles={percentiles}: [least,most], from 0 to 100"

    @property
    def scaling(self) -> IntensityScaling:
        """How images of more than 8 bits are read."""
        low, high = self.intensity_percentiles
        given = self.intensity_range
        return IntensityScaling(
            None if given is None else (float(given[0]), float(given[1])), (float(low), float(high))
        )
