"""Convert files, PIL images, arrays and tensors to image tensors."""

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
HIGH_BIT_DTYPES = (np.uint16, np.int32, np.float32)


def to_image(image: ImageLike, scaling: IntensityScaling = DEFAULT_SCALING) -> Tensor:
    """Return an image as uint8 RGB (3, H, W), with the EXIF orientation of a file or PIL image applied.

    Args:
        image: a path; a PIL image; an array, (H, W, 3) in RGB or (H, W) in grayscale, of uint8, or of uint16, int32 or
            float32 for more than 8 bits; or a tensor, uint8 (3, H, W).
        scaling: conversion of an image with more than 8 bits.

    Raises:
        UserError: the file cannot be read, or the image has an unsupported type, dtype or shape.
    """
    if isinstance(image, str | Path):
        image = read_raw(Path(image))
    if isinstance(image, Image.Image):
        image = RawImage(pil_to_pixels(image), orientation_of(image))
    if isinstance(image, RawImage):
        return scaling(image.displayed())
    if isinstance(image, np.ndarray):
        return scaling(_from_array(image))
    if not isinstance(image, Tensor):
        raise UserError(f"{type(image).__name__} is not an image; use a path, a PIL image, an array or a tensor")
    if image.dtype != torch.uint8 or image.dim() != 3 or len(image) != 3 or not image.numel():
        raise UserError(f"unsupported tensor: {image.dtype} {tuple(image.shape)}; use uint8 (3, H, W)")
    return image.as_subclass(Tensor)


def _from_array(array: np.ndarray) -> Tensor:
    """Return an array (H, W) or (H, W, 3) as (3, H, W), uint8 or float32."""
    is_high_bit = array.dtype in HIGH_BIT_DTYPES
    if not (is_high_bit or array.dtype == np.uint8) or array.size == 0 or (array.ndim != 2 and array.shape[2:] != (3,)):
        raise UserError(
            f"unsupported array: {array.dtype} {array.shape}; use (H, W, 3) in RGB or (H, W), of uint8, uint16, int32 "
            "or float32"
        )
    pixels = np.array(np.broadcast_to(array.reshape(*array.shape[:2], -1), (*array.shape[:2], 3)))
    return torch.from_numpy(pixels.astype(np.float32) if is_high_bit else pixels).permute(2, 0, 1).contiguous()
