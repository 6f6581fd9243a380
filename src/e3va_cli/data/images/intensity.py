"""Scaling of grayscale images of more than 8 bits (microscopes, satellites, scanners) to 8 bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from e3va_cli.components.options import Condition, Options, option

DARK = 1 / 8  # of the range; images below it are reported
DEFAULT_PERCENTILES = (0.1, 99.9)


@dataclass(frozen=True)
class IntensityScaling:
    """Linear scaling of a fixed range, or of percentiles of each image, to 0..255.

    Attributes:
        range: (black, white) of all images; None for percentiles.
        percentiles: (black, white) of each image.
    """

    range: tuple[float, float] | None = None
    percentiles: tuple[float, float] = DEFAULT_PERCENTILES

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return pixels (1, H, W) or (3, H, W) as uint8 (3, H, W); uint8 pixels are unchanged."""
        if pixels.dtype == torch.uint8:
            return pixels
        black, white = self.limits(pixels)
        scaled = (pixels.double() - black) * (255 / (white - black))
        gray = scaled.nan_to_num(0).round().clamp(0, 255).to(torch.uint8)
        return gray.expand(3, -1, -1).contiguous()

    def limits(self, pixels: Tensor) -> tuple[float, float]:
        """Return the values that become black and white in an image."""
        black, white = self.range or _percentiles(pixels.numpy(), self.percentiles)
        return black, white if white > black else black + 1

    def leaves_dark(self, pixels: Tensor) -> bool:
        """Return whether a fixed range makes an image almost black."""
        return self.range is not None and pixels.dtype != torch.uint8 and is_dark(pixels, *self.range)


def is_dark(pixels: Tensor, low: float = 0, high: float = 255) -> bool:
    """Return whether all values are in the lowest eighth of a range."""
    return float(pixels.float().nan_to_num(low).max()) < low + DARK * (high - low)


def _percentiles(values: np.ndarray, percentiles: Sequence[float]) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = percentiles
    # Values that occur: for a small image, its minimum and maximum.
    return float(np.percentile(finite, low, method="lower")), float(np.percentile(finite, high, method="higher"))


@dataclass(kw_only=True)
class ImageFileOptions(Options):
    """Options of data sets whose images are files."""

    intensity_range: list[float] | None = option(
        None,
        help="[black,white] of images of more than 8 bits, for example [0,4095]; null: intensity_percentiles",
        legacy_value=[0.0, 65535.0],
    )
    intensity_percentiles: list[float] = option(
        list(DEFAULT_PERCENTILES),
        help="[black,white] as percentiles of each image of more than 8 bits",
        legacy_value=list(DEFAULT_PERCENTILES),
        conditions=(Condition("intensity_range", lambda value: value is None, "set it to null"),),
    )

    def errors(self, at: str) -> Iterator[str]:
        """Yield the errors of ranges."""
        limits = self.intensity_range
        if limits is not None and (len(limits) != 2 or not limits[0] < limits[1]):
            yield f"{at}.intensity_range={limits}: set it to [black,white], for example [0,4095]"
        percentiles = self.intensity_percentiles
        if percentiles is not None and (len(percentiles) != 2 or not 0 <= percentiles[0] < percentiles[1] <= 100):
            yield f"{at}.intensity_percentiles={percentiles}: set it to [black,white], from 0 to 100"

    @property
    def scaling(self) -> IntensityScaling:
        """Return the scaling of images of more than 8 bits."""
        low, high = self.intensity_percentiles
        given = self.intensity_range
        return IntensityScaling(
            None if given is None else (float(given[0]), float(given[1])), (float(low), float(high))
        )
