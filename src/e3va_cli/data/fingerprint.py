"""What a split of a data set held, in a few bytes: a resumed run compares it with what it finds."""

from __future__ import annotations

import hashlib
import marshal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from e3va_cli.utils.text import pluralize

SAMPLE = 256  # files whose sizes are looked at
PLAIN = 2  # marshal's version in which equal values are equal bytes


@dataclass(frozen=True)
class Fingerprint:
    """Of one split; where the folder lies is no part of it.

    Attributes:
        images: how many.
        files: digest of the names of the images, and of the sizes of some files.
        annotations: digest of what is to be found in them.
    """

    images: int
    files: str
    annotations: str

    def changes(self, before: dict[str, Any]) -> Iterator[str]:
        """What differs from the fingerprint, as a dictionary, that the split had before."""
        if self.images != before.get("images"):
            yield f"{pluralize(self.images, 'image')}, {before.get('images'):,} before"
        elif self.files != before.get("files"):
            yield "other image files than before, by their names or sizes"
        elif self.annotations != before.get("annotations"):
            yield "other annotations than before, of the same images"


def digest(*parts: Iterable[Any]) -> str:
    """A digest of plain values; SHA-256, in hexadecimal digits."""
    found = hashlib.sha256()
    for part in parts:
        for item in part:
            found.update(marshal.dumps(item, PLAIN))
    return found.hexdigest()


def sizes_of(length: int, file_of: Callable[[int], Path]) -> list[int]:
    """Bytes of some of so many files, evenly spread; -1 for one that cannot be looked at."""
    chosen = np.linspace(0, length - 1, min(SAMPLE, length)).round().astype(int)
    return [_size(file_of(index)) for index in chosen.tolist()]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
