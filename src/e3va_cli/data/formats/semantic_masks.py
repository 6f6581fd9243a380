"""Files of images and semantic masks, and the errors of a mask.

A mask has one value or color for each pixel of its image; `label_encoding.py` maps them to labels.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from e3va_cli.data.formats.label_encoding import IGNORED, UNKNOWN, LabelEncoding
from e3va_cli.errors import UserError
from e3va_cli.utils.text import truncate_list

MASK_SUFFIXES = {".png", ".bmp", ".gif", ".tif", ".tiff"}
COLORS_SHOWN = 8


def files_by_stem(folder: Path, suffixes: Collection[str]) -> dict[str, list[str]]:
    """Return the names of files with these suffixes by stem, both sorted, without hidden files.

    Raises:
        UserError: the folder cannot be listed.
    """
    names: dict[str, list[str]] = defaultdict(list)
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                stem, suffix = os.path.splitext(entry.name)  # noqa: PTH122 (a Path for each of many costs seconds)
                if suffix.lower() in suffixes and not stem.startswith(".") and _is_file(entry):
                    names[stem].append(entry.name)
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}") from None
    return {stem: sorted(names[stem]) for stem in sorted(names)}


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself
        return False


def validate_semantic_mask(
    mask: Image.Image, size: tuple[int, int], encoding: LabelEncoding
) -> Iterator[tuple[str, str]]:
    """Yield the errors of a semantic mask as (issue type, detail).

    Args:
        mask: as stored.
        size: (width, height) of its image in pixels.
        encoding: of its values or colors.
    """
    if error := _validate_mode(mask, encoding):
        yield error
        return
    if mask.format == "JPEG":
        yield "JPEG semantic mask", "JPEG compression changes labels; save it as PNG from the original"
    if mask.size != size:
        yield (
            "size mismatch",
            f"the semantic mask has {mask.width}x{mask.height} pixels, its image {size[0]}x{size[1]}",
        )
    keys = encoding.keys_of(mask)
    if (least := int(keys.min())) < 0:
        yield "negative label", f"the smallest label is {least}; {_expected_values(encoding)}"
    unknown = keys[(encoding.encode(keys) == UNKNOWN) & (keys >= 0)]
    if not unknown.size:
        return
    if encoding.mapped:
        share = 100 * unknown.size / keys.size
        yield (
            f"{'color' if encoding.in_colors else 'value'} without a class",
            f"{encoding.format_keys(np.unique(unknown).tolist())} ({share:.2g} % of the pixels) are not in "
            "dataset.label_map; add them there or to dataset.ignore_index",
        )
    else:
        yield "label above the number of classes", _too_high(int(unknown.max()), np.unique(keys), encoding)


def _validate_mode(mask: Image.Image, encoding: LabelEncoding) -> tuple[str, str] | None:
    if encoding.reads(mask):
        return None
    if encoding.in_colors:
        return (
            "semantic mask without colors",
            f"an image of mode {mask.mode}, but dataset.label_map has colors; set it to the value of each class",
        )
    remedy = f"save it as a PNG of mode L or P, {_expected_values(encoding)}"
    if mask.mode in ("RGB", "RGBA"):
        pixels = np.asarray(mask.convert("RGB")).reshape(-1, 3)
        colors = [str(color).replace(" ", "") for color in np.unique(pixels, axis=0)[: COLORS_SHOWN + 1].tolist()]
        remedy += f"; or set the color of each class, dataset.label_map=[{truncate_list(colors, COLORS_SHOWN)}]"
    return "semantic mask in colors", f"an image of mode {mask.mode}, not one number per pixel; {remedy}"


def _expected_values(encoding: LabelEncoding) -> str:
    if encoding.mapped:
        return "with the values of dataset.label_map"
    return "0 = unlabeled, classes from 1" if encoding.from_one else "classes from 0"


def _too_high(largest: int, values: np.ndarray, encoding: LabelEncoding) -> str:
    count = encoding.num_classes
    remedy = f"set dataset.num_classes={largest if encoding.from_one else largest + 1} if there are more"
    if len(values) == 2 and not values[0]:
        remedy = f"if 0 is the background and {largest} the object, set {two_classes(largest)}"
    elif largest == IGNORED:
        remedy = f"if {largest} is unlabeled, set dataset.ignore_index={largest}"
    return f"the largest label is {largest}, of {count} classes; {remedy}"


def two_classes(value: int) -> str:
    """Return the options for masks with background 0 and an object of `value`."""
    if value == 1:
        return "dataset.reduce_zero_label=false dataset.num_classes=2"
    return f"dataset.label_map=[0,{value}] dataset.num_classes=2"
