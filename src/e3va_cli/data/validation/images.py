"""What is wrong with the file of one image, and what is good to know of it."""

from __future__ import annotations

from pathlib import Path

import torch

from e3va_cli.data.images.intensity import IntensityScaling, is_dark
from e3va_cli.data.images.orientation import STORED, displayed_size
from e3va_cli.data.images.reading import UPPER_BITS_NOTE, RawImage, image_notes

Found = list[tuple[str, str | None]]  # kinds, and details


def pixel_problems(raw: RawImage, annotated: tuple[int, int] | None, scaling: IntensityScaling) -> Found:
    """What is wrong with the pixels of an image whose annotations have a size (H, W), if they have one."""
    problems: Found = []
    height, width = raw.displayed(annotated).shape[1:]
    if annotated and (height, width) != annotated:
        found = f"the file has {width}x{height}, the annotations say {annotated[1]}x{annotated[0]}"
        problems.append(("size mismatch", found))
    if raw.is_16bit_color and is_dark(raw.pixels):
        problems.append(("image that is almost black", f"of 16 bits in color, {UPPER_BITS_NOTE}; save it with 8 bits"))
    if scaling.leaves_dark(raw.pixels):
        least, most = raw.pixels.min(), raw.pixels.max()
        detail = f"values from {least:g} to {most:g} in dataset.intensity_range={list(scaling.range or ())}"
        problems.append(("image that is almost black", f"{detail}; give the range that the images have"))
    return problems


def pixel_notes(raw: RawImage, annotated: tuple[int, int] | None, scaling: IntensityScaling) -> Found:
    """What is good to know of the pixels of an image."""
    notes: Found = []
    if raw.pixels.dtype != torch.uint8:
        black, white = scaling.limits(raw.pixels)
        least, most = raw.pixels.min(), raw.pixels.max()
        notes.append(
            ("image of more than 8 bits", f"values {least:g} to {most:g}; {black:g} is black, {white:g} white")
        )
    if raw.is_16bit_color:
        notes.append(("color image of 16 bits", UPPER_BITS_NOTE))
    if raw.orientation == STORED:
        return notes
    displayed = displayed_size(raw.size, raw.orientation)
    if displayed == raw.size:
        told = "turned as a viewer shows it, unless other images are annotated as stored"
    elif annotated == raw.size:
        told = "not turned, as the annotations have the size of the pixels as stored"
    else:
        told = "turned, as the annotations have the size of the displayed image"
    notes.append(("image with an EXIF orientation", f"{raw.orientation}; {told}"))
    return notes


def notes_on(path: Path, folder: Path) -> Found:
    """What is good to know of a sound image file in a folder."""
    notes: Found = list(image_notes(path))
    real = path.resolve()
    if folder.resolve() not in real.parents:
        notes.append(("link that leads out of the folder of images", f"to {real}"))
    return notes
