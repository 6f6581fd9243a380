"""Whatever holds an image as the pixels that data sets yield."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from e3va_cli.data.targets import read_image
from e3va_cli.errors import UserError

ImageLike = str | Path | Image.Image | np.ndarray | Tensor


def as_image(given: ImageLike) -> Tensor:
    """An image as uint8 (3, H, W), RGB; an orientation in a file's EXIF is not applied, as in training.

    Args:
        given: a file; a PIL image; an array, uint8 (H, W, 3) in RGB or (H, W) in grey; or a tensor, uint8 (3, H, W).

    Raises:
        UserError: the file cannot be read, or the pixels are of another kind.
    """
    if isinstance(given, str | Path):
        return read_image(Path(given)).as_subclass(Tensor)
    if isinstance(given, Image.Image):
        if given.mode.startswith(("I", "F")):
            raise UserError(f"an image of mode {given.mode}: give one of 8 bits a channel, or its file")
        flat = given.convert("RGBA") if given.mode == "P" else given  # Pillow warns of a transparent palette
        given = np.array(flat.convert("RGB"))
    if isinstance(given, np.ndarray):
        if given.dtype != np.uint8 or given.size == 0 or (given.ndim != 2 and given.shape[2:] != (3,)):
            raise UserError(f"an array {given.dtype} {given.shape}: give uint8 (H, W, 3) in RGB, or uint8 (H, W)")
        pixels = torch.from_numpy(np.array(np.broadcast_to(given.reshape(*given.shape[:2], -1), (*given.shape[:2], 3))))
        return pixels.permute(2, 0, 1).contiguous()
    if not isinstance(given, Tensor):
        raise UserError(f"{type(given).__name__} is no image: give a file, a PIL image, an array or a tensor")
    if given.dtype != torch.uint8 or given.dim() != 3 or len(given) != 3 or not given.numel():
        raise UserError(f"a tensor {given.dtype} {tuple(given.shape)}: give uint8 (3, H, W)")
    return given.as_subclass(Tensor)
