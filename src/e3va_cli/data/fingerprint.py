"""Fingerprints of data sets, by which a resumed run detects changed data."""

from __future__ import annotations

import hashlib
import marshal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e3va_cli.data.sampling import evenly_spaced
from e3va_cli.utils.text import pluralize

SAMPLE = 256  # files whose sizes are read
MARSHAL_VERSION = 2  # the last in which equal values have equal bytes


@dataclass(frozen=True)
class Fingerprint:
    """Fingerprint of one split, independent of the location of its folder.

    Attributes:
        images: number of images.
        files: digest of image names, and of the sizes of some files.
        annotations: digest of the annotations.
    """

    images: int
    files: str
    annotations: str

    def changes(self, before: dict[str, Any]) -> Iterator[str]:
        """Yield the differences to an earlier fingerprint, given as a dictionary."""
        if self.images != before.get("images"):
            yield f"{pluralize(self.images, 'image')}, {before.get('images'):,} before"
        elif self.files != before.get("files"):
            yield "image files changed (names or sizes)"
        elif self.annotations != before.get("annotations"):
            yield "annotations changed"


def digest(*parts: Iterable[Any]) -> str:
    """Return the SHA-256 digest of built-in values, in hexadecimal."""
    sha = hashlib.sha256()
    for part in parts:
        for item in part:
            sha.update(marshal.dumps(item, MARSHAL_VERSION))
    return sha.hexdigest()


def sample_file_sizes(length: int, file_of: Callable[[int], Path]) -> list[int]:
    """Return the sizes in bytes of evenly spaced files, -1 for inaccessible ones."""
    return [_size(file_of(index)) for index in evenly_spaced(length, SAMPLE)]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
