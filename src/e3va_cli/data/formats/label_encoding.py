"""Mapping from the values or colors of semantic masks to labels: 1..K, and 0 for unlabeled pixels.

The options are mmsegmentation's (https://mmsegmentation.readthedocs.io/en/latest/advanced_guides/transforms.html):
`reduce_zero_label`, `ignore_index` and `label_map`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from e3va_cli.errors import UserError
from e3va_cli.utils.text import shorten, truncate_list

MODES = ("1", "L", "P", "I", "I;16", "I;16B")  # of Pillow: one bit, 8 bits, a palette's indices, 16 or 32 bits
COLOR_MODES = ("RGB", "RGBA", "P")
IGNORED = 255  # the usual value of unlabeled pixels
UNKNOWN = -1
SHOWN = 8  # values or colors in a message
MAX_TABLE = 2**16  # values below it are looked up in a table
LINES = (
    re.compile(r"(?P<name>[^:#]+):(?P<color>\d+,\s*\d+,\s*\d+)(:.*)?"),  # CVAT's labelmap.txt
    re.compile(r"(?P<color>\d+\s+\d+\s+\d+)\s+(?P<name>\S.*)"),  # CamVid's label_colors.txt
    re.compile(r"(?P<value>\d+)\s*,\s*(?P<name>\S.*)"),  # Roboflow's _classes.csv
)
FORMS = "set it to the value or color of each class, as [0,255] or [[0,0,0],[255,0,0]], or a file of lines NAME:R,G,B"
Key = int  # a value, or a color as 0xRRGGBB


@dataclass(frozen=True)
class LabelEncoding:
    """Labels of a mask's values or colors.

    Attributes:
        labels: by value or color (0xRRGGBB); 0 is unlabeled.
        category_ids: value of label k in masks at index k - 1; predictions are written with it.
        in_colors: whether masks are read as colors.
        names: of the classes, if a file has them.
        from_one: whether values are the labels, and 0 is unlabeled.
        mapped: whether there is a `label_map`.
    """

    labels: dict[Key, int]
    category_ids: list[int]
    in_colors: bool = False
    names: list[str] | None = None
    from_one: bool = False
    mapped: bool = False

    @property
    def num_classes(self) -> int:
        """Return K."""
        return len(self.category_ids)

    def reads(self, mask: Image.Image) -> bool:
        """Return whether the encoding applies to a mask of this mode."""
        return mask.mode in (COLOR_MODES if self.in_colors else MODES)

    def keys_of(self, mask: Image.Image) -> np.ndarray:
        """Return the value or color of each pixel, int32 or int64 [H, W]."""
        if not self.in_colors:
            return np.asarray(mask).astype(np.int64 if mask.mode == "I" else np.int32)
        r, g, b = np.moveaxis(np.asarray(mask.convert("RGBA").convert("RGB")).astype(np.int32), -1, 0)
        return (r << 16) | (g << 8) | b

    def encode(self, keys: np.ndarray) -> np.ndarray:
        """Return labels, int32 [H, W]; -1 for values or colors without one."""
        known = np.array(sorted(self.labels), dtype=np.int64)
        labels = np.array([self.labels[key] for key in known.tolist()], dtype=np.int32)
        if known[-1] < MAX_TABLE:
            table = np.full(known[-1] + 2, UNKNOWN, dtype=np.int32)
            table[known] = labels
            inside = (keys >= 0) & (keys <= known[-1])
            return table[np.where(inside, keys, known[-1] + 1)]
        places = np.searchsorted(known, keys).clip(max=len(known) - 1)
        return np.where(known[places] == keys, labels[places], UNKNOWN).astype(np.int32)

    def format_key(self, key: Key) -> str:
        """Return a value or color as written in options."""
        return str(_rgb(key)).replace(" ", "") if self.in_colors else str(key)

    def format_keys(self, keys: Iterable[Key]) -> str:
        """Return the first few values or colors."""
        return truncate_list([self.format_key(key) for key in sorted(keys)], SHOWN)


def label_encoding(
    *, num_classes: int | None, reduce_zero_label: bool, ignore_index: Any, label_map: Any, root: Path
) -> LabelEncoding:
    """Build the encoding from the options of a data set.

    Args:
        num_classes: None to take it from `label_map`.
        reduce_zero_label: whether 0 is unlabeled and classes start at 1; else classes start at 0.
        ignore_index: unlabeled values, or colors [r, g, b]; None for 255 unless it is a class.
        label_map: None, a value or color for each class, or a file name.
        root: folder that the file name may be relative to.

    Raises:
        UserError: an option is invalid, or options contradict each other.
    """
    ignored = _ignored(ignore_index)
    names = None
    if label_map is None:
        if num_classes is None:
            raise UserError("dataset.num_classes=null: set it, dataset.classes or dataset.label_map")
        first = 1 if reduce_zero_label else 0
        labels = {first + k: k + 1 for k in range(num_classes)} | ({0: 0} if reduce_zero_label else {})
        in_colors, ids = False, list(range(first, first + num_classes))
    else:
        entries = _read(label_map, root) if isinstance(label_map, str) else _listed(label_map)
        in_colors = not _is_value(entries[0][0])
        classes: dict[str | Key, int] = {}  # labels by name, or by value or color where there is no name
        labels = {}
        for key, name in ((_key(entry), name) for entry, name in entries):
            if key not in ignored:
                labels[key] = classes.setdefault(name or key, len(classes) + 1)
        ids = list(range(len(classes))) if in_colors or len(labels) > len(classes) else list(labels)
        names = [name for name in classes if isinstance(name, str)] or None
    if ignore_index is None and not in_colors and not labels.get(IGNORED):
        ignored = {IGNORED: False}
    if wrong := [key for key, is_color in ignored.items() if is_color != in_colors]:
        expected = ("values, not colors", "colors [r,g,b], not values")
        raise UserError(f"dataset.ignore_index={ignore_index}: {wrong[0]}: the masks are read as {expected[in_colors]}")
    if label_map is None and (clash := [key for key in ignored if labels.get(key)]):
        raise UserError(
            f"dataset.ignore_index={ignore_index}: {clash[0]} is also a class, with dataset.num_classes={num_classes} "
            f"and dataset.reduce_zero_label={str(reduce_zero_label).lower()}; change one of them"
        )
    if num_classes is not None and num_classes != len(ids):
        raise UserError(f"dataset.label_map has {len(ids)} classes; set dataset.num_classes={len(ids)}, or remove it")
    labels |= dict.fromkeys(ignored, 0)
    return LabelEncoding(labels, ids, in_colors, names, label_map is None and reduce_zero_label, label_map is not None)


def _listed(label_map: Any) -> list[tuple[Any, None]]:
    """Return the values or colors of a list, without names."""
    if not isinstance(label_map, Sequence) or not label_map:
        raise UserError(f"dataset.label_map={shorten(label_map)}: {FORMS}")
    fits = _is_value if _is_value(label_map[0]) else _is_color
    if not all(map(fits, label_map)):
        raise UserError(
            f"dataset.label_map={shorten(label_map)}: whole numbers from 0, or colors of three from 0 to 255"
        )
    if len(set(map(_key, label_map))) < len(label_map):
        raise UserError(f"dataset.label_map={shorten(label_map)}: duplicate entry; each class needs its own")
    return [(entry, None) for entry in label_map]


def _ignored(given: Any) -> dict[Key, bool]:
    """Return the unlabeled values and colors, and whether each is a color."""
    entries = [] if given is None else given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if wrong := [entry for entry in entries if not _is_value(entry) and not _is_color(entry)]:
        raise UserError(
            f"dataset.ignore_index={given}: {shorten(wrong[0])} is neither a value nor a color; set it to 255, [0,255] "
            "or [[0,0,0]]"
        )
    return {_key(entry): not _is_value(entry) for entry in entries}


def _read(file: str, root: Path) -> list[tuple[Any, str]]:
    """Return the color or value, and the name, of each line; entries of the same name are one class."""
    given = Path(file).expanduser()
    path = next((one for one in (given, root / file) if one.is_file()), given)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"dataset.label_map={file}: cannot be read ({reason}); {FORMS}") from None
    entries = list(_entries(lines))
    if not entries or len({isinstance(entry, int) for entry, _ in entries}) > 1:
        raise UserError(f"dataset.label_map={file}: no line has a class with its color or value; {FORMS}")
    return entries


def _entries(lines: Iterable[str]) -> Iterator[tuple[Any, str]]:
    for line in lines:
        match = next((match for form in LINES if (match := form.fullmatch(line.strip()))), None)
        if match is None:  # a comment or the header of a table
            continue
        parts = match.groupdict()
        color = parts.get("color")
        entry = [int(part) for part in re.split(r"[,\s]+", color)] if color else int(parts["value"])
        yield entry, parts["name"].strip()


def _is_value(entry: object) -> bool:
    return isinstance(entry, int) and not isinstance(entry, bool) and 0 <= entry < 2**31


def _is_color(entry: object) -> bool:
    is_list = isinstance(entry, Sequence) and not isinstance(entry, str) and len(entry) == 3
    return is_list and all(_is_value(part) and part < 256 for part in entry)  # type: ignore[attr-defined]


def _key(entry: Any) -> Key:
    return entry if _is_value(entry) else (entry[0] << 16) | (entry[1] << 8) | entry[2]


def _rgb(key: Key) -> list[int]:
    return [key >> 16, key >> 8 & 255, key & 255]
