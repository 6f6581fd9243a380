"""Photos that are stored lying on their side and turned when they are shown: EXIF's orientation.

Where annotations have the size of the displayed image, the image is turned; where they have that of the stored pixels,
it is not.
"""

from __future__ import annotations

from PIL import Image
from torch import Tensor

TAG = 0x0112  # of EXIF
STORED = 1  # displayed as stored
SIDES = frozenset({5, 6, 7, 8})  # height and width change places


def orientation_of(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none, or the EXIF is broken."""
    try:
        found = image.getexif().get(TAG, STORED)
    except Exception:  # what Pillow's parser raises of broken EXIF is of any kind
        return STORED
    return found if isinstance(found, int) and 1 <= found <= 8 else STORED


def apply_orientation(pixels: Tensor, orientation: int) -> Tensor:
    """Pixels (C, H, W) as stored, as they are displayed."""
    if orientation in SIDES:
        pixels = pixels.transpose(-1, -2)
    axes = {2: [-1], 3: [-1, -2], 4: [-2], 6: [-1], 7: [-1, -2], 8: [-2]}.get(orientation, [])
    return pixels.flip(axes).contiguous() if orientation != STORED else pixels


def displayed_size(stored: tuple[int, int], orientation: int) -> tuple[int, int]:
    """(H, W) of the displayed image."""
    return (stored[1], stored[0]) if orientation in SIDES else stored


def should_apply_orientation(
    stored: tuple[int, int], orientation: int, annotated: tuple[int, int] | None, *, orient_ambiguous: bool
) -> bool:
    """Whether an image is to be turned.

    Args:
        stored: (H, W) of the pixels in the file.
        orientation: EXIF's.
        annotated: (H, W) that the annotations have; None for an image without any, which is displayed.
        unsure: the answer where the size fits both, as after half a turn.
    """
    displayed = displayed_size(stored, orientation)
    if annotated is None or stored == displayed:
        return annotated is None or orient_ambiguous
    return annotated != stored
