"""Whatever holds an image as the pixels that data sets yield."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from e3va_cli.data.images.intensity import IntensityScaling
from e3va_cli.data.images.orientation import orientation_of
from e3va_cli.data.images.reading import DEFAULT_SCALING, RawImage, pil_to_pixels, read_raw
from e3va_cli.errors import UserError

ImageLike = str | Path | Image.Image | np.ndarray | Tensor | RawImage
DEEP_ARRAYS = (np.uint16, np.int32, np.float32)


def as_image(given: ImageLike, scaling: IntensityScaling = DEFAULT_SCALING) -> Tensor:
    """An image as a viewer shows it, uint8 (3, H, W) in RGB: an orientation in its EXIF is applied.

    Args:
        given: a file; a PIL image; an array, (H, W, 3) in RGB or (H, W) in gray, of uint8, or of uint16, int32 or
            float32 for more than 8 bits; or a tensor, uint8 (3, H, W).
        scaling: of an image of more than 8 bits.

    Raises:
        UserError: the file cannot be read, or the pixels are of another kind.
    """
    if isinstance(given, str | Path):
        given = read_raw(Path(given))
    if isinstance(given, Image.Image):
        given = RawImage(pil_to_pixels(given), orientation_of(given))
    if isinstance(given, RawImage):
        return scaling(given.displayed())
    if isinstance(given, np.ndarray):
        return scaling(_from_array(given))
    if not isinstance(given, Tensor):
        raise UserError(f"{type(given).__name__} is no image: give a file, a PIL image, an array or a tensor")
    if given.dtype != torch.uint8 or given.dim() != 3 or len(given) != 3 or not given.numel():
        raise UserError(f"a tensor {given.dtype} {tuple(given.shape)}: give uint8 (3, H, W)")
    return given.as_subclass(Tensor)


def _from_array(given: np.ndarray) -> Tensor:
    is_deep = given.dtype in DEEP_ARRAYS
    if not (is_deep or given.dtype == np.uint8) or given.size == 0 or (given.ndim != 2 and given.shape[2:] != (3,)):
        raise UserError(
            f"an array {given.dtype} {given.shape}: give (H, W, 3) in RGB or (H, W), of uint8, or of uint16, int32 or "
            "float32"
        )
    pixels = np.array(np.broadcast_to(given.reshape(*given.shape[:2], -1), (*given.shape[:2], 3)))
    return torch.from_numpy(pixels.astype(np.float32) if is_deep else pixels).permute(2, 0, 1).contiguous()
