"""Images and their label maps in two folders: which belong together, and what can be wrong with a label map.

A label map holds one number for each pixel of its image, as ADE20K's do (https://doi.org/10.1109/CVPR.2017.544):
0 = not labelled, classes from 1.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from e3va_cli.errors import UserError

LABEL_SUFFIXES = {".png"}
LABEL_MODES = ("L", "P", "I", "I;16", "I;16B")  # of Pillow: 8 bits, a palette's indices, 16 bits
IN_COLOURS = "label map in colours"
OFTEN_VOID = 255  # what many data sets write for pixels that are not labelled


def files_by_stem(folder: Path, suffixes: Collection[str]) -> dict[str, list[str]]:
    """The names of the files with one of these suffixes, by what stands before it; both sorted, no hidden files.

    Raises:
        UserError: the folder cannot be listed.
    """
    found: dict[str, list[str]] = defaultdict(list)
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                stem, suffix = os.path.splitext(entry.name)  # noqa: PTH122 (a Path for each of many costs seconds)
                if suffix.lower() in suffixes and not stem.startswith(".") and _is_file(entry):
                    found[stem].append(entry.name)
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}") from None
    return {stem: sorted(found[stem]) for stem in sorted(found)}


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself
        return False


def label_map_faults(labels: Image.Image, size: tuple[int, int], num_classes: int) -> Iterator[tuple[str, str]]:
    """What keeps a label map from being used, each as a kind, and what was found with what to do.

    Args:
        labels: as it is stored.
        size: (width, height) of its image, in pixels.
        num_classes: the highest label that there may be.
    """
    if labels.mode not in LABEL_MODES:
        yield (
            IN_COLOURS,
            f"an image of mode {labels.mode}, not one number per pixel; save it as a PNG of mode L or P, "
            "0 = not labelled, classes from 1",
        )
        return
    if labels.format == "JPEG":
        yield "label map in a JPEG", "its compression changes labels; save it as a PNG, from the original"
    if labels.size != size:
        yield (
            "size mismatch",
            f"the label map has {labels.width}x{labels.height} pixels, its image {size[0]}x{size[1]}",
        )
    values = np.asarray(labels)
    if (least := int(values.min())) < 0:
        yield "negative label", f"the least label is {least}; 0 = not labelled, classes from 1"
    if (largest := int(values.max())) > num_classes:
        remedy = f"set dataset.num_classes={largest} if there are so many"
        if largest == OFTEN_VOID:
            remedy = f"pixels that are not labelled must be 0, not {OFTEN_VOID}"
        yield "label above the number of classes", f"the largest label is {largest}, of {num_classes} classes; {remedy}"
