"""Problems of one image file, and notes on it."""

from __future__ import annotations

from pathlib import Path

import torch

from e3va_cli.data.images.intensity import IntensityScaling, is_dark
from e3va_cli.data.images.orientation import STORED, displayed_size
from e3va_cli.data.images.reading import UPPER_BITS_NOTE, RawImage, image_notes

FileIssues = list[tuple[str, str | None]]  # (type, detail)


def pixel_problems(raw: RawImage, annotated: tuple[int, int] | None, scaling: IntensityScaling) -> FileIssues:
    """Return the problems of an image's pixels; `annotated` is the annotated (H, W), if there is one."""
    problems: FileIssues = []
    height, width = raw.displayed(annotated).shape[1:]
    if annotated and (height, width) != annotated:
        sizes = f"the file has {width}x{height}, but {annotated[1]}x{annotated[0]} are annotated"
        problems.append(("size mismatch", sizes))
    if raw.is_16bit_color and is_dark(raw.pixels):
        problems.append(("almost black image", f"16-bit color, {UPPER_BITS_NOTE}; save it with 8 bits"))
    if scaling.leaves_dark(raw.pixels):
        least, most = raw.pixels.min(), raw.pixels.max()
        detail = f"values from {least:g} to {most:g} in dataset.intensity_range={list(scaling.range or ())}"
        problems.append(("almost black image", f"{detail}; set it to the range of the images"))
    return problems


def pixel_notes(raw: RawImage, annotated: tuple[int, int] | None, scaling: IntensityScaling) -> FileIssues:
    """Return notes on an image's pixels: bit depth and EXIF orientation."""
    notes: FileIssues = []
    if raw.pixels.dtype != torch.uint8:
        black, white = scaling.limits(raw.pixels)
        least, most = raw.pixels.min(), raw.pixels.max()
        notes.append(
            ("image of more than 8 bits", f"values {least:g} to {most:g}; {black:g} is black, {white:g} white")
        )
    if raw.is_16bit_color:
        notes.append(("16-bit color image", UPPER_BITS_NOTE))
    if raw.orientation == STORED:
        return notes
    displayed = displayed_size(raw.size, raw.orientation)
    if displayed == raw.size:
        effect = "applied, unless other images are annotated as stored"
    elif annotated == raw.size:
        effect = "not applied, as the annotations have the stored size"
    else:
        effect = "applied, as the annotations have the displayed size"
    notes.append(("image with an EXIF orientation", f"{raw.orientation}; {effect}"))
    return notes


def file_notes(path: Path, folder: Path) -> FileIssues:
    """Return notes on a readable image file in a folder."""
    notes: FileIssues = list(image_notes(path))
    real = path.resolve()
    if folder.resolve() not in real.parents:
        notes.append(("link to a file outside the folder of images", f"to {real}"))
    return notes
