"""EXIF orientation: applied if the annotated size is that of the displayed image, not if it is the stored size."""

from __future__ import annotations

from PIL import Image
from torch import Tensor

TAG = 0x0112  # of EXIF
STORED = 1  # displayed as stored
TRANSPOSED = frozenset({5, 6, 7, 8})  # height and width are swapped


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if there is none, or the EXIF is corrupt."""
    try:
        orientation = image.getexif().get(TAG, STORED)
    except Exception:  # Pillow's parser raises anything on corrupt EXIF
        return STORED
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else STORED


def apply_orientation(pixels: Tensor, orientation: int) -> Tensor:
    """Return stored pixels (C, H, W) as displayed."""
    if orientation in TRANSPOSED:
        pixels = pixels.transpose(-1, -2)
    axes = {2: [-1], 3: [-1, -2], 4: [-2], 6: [-1], 7: [-1, -2], 8: [-2]}.get(orientation, [])
    return pixels.flip(axes).contiguous() if orientation != STORED else pixels


def displayed_size(stored: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Return (H, W) of the displayed image."""
    return (stored[1], stored[0]) if orientation in TRANSPOSED else stored


def should_apply_orientation(
    stored: tuple[int, int], orientation: int, annotated: tuple[int, int] | None, *, orient_ambiguous: bool
) -> bool:
    """Return whether to apply the EXIF orientation of an image.

    Args:
        stored: (H, W) of the pixels in the file.
        orientation: EXIF orientation.
        annotated: annotated (H, W); None for an image without annotations, to which it is applied.
        orient_ambiguous: the result if both sizes are equal, as for a rotation by 180 degrees.
    """
    displayed = displayed_size(stored, orientation)
    if annotated is None or stored == displayed:
        return annotated is None or orient_ambiguous
    return annotated != stored
