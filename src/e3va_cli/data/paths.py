"""Paths from annotations, and descriptions of missing ones."""

import os
from pathlib import Path

from e3va_cli.utils.text import escape_text, truncate_list

NAMES_SHOWN = 10


def safe_join(folder: Path, file_name: str) -> Path | None:
    """Join a folder and a file name without `..`; return None if the name leads outside the folder.

    File names come from the author of the annotations and are not trusted. Links come from the owner of the folder, who
    may keep the images on another disk, and are followed.
    """
    base = Path(os.path.normpath(folder.absolute()))
    path = Path(os.path.normpath(base / file_name))
    return folder / path.relative_to(base) if base in path.parents else None


def describe_directory(path: Path) -> str:
    """Return the first names in the nearest existing parent folder."""
    folder = next(parent for parent in path.parents if parent.is_dir())
    try:
        names = sorted(escape_text(entry.name) + "/" * entry.is_dir() for entry in folder.iterdir())
    except OSError as error:
        return f"{folder} cannot be listed: {error.strerror}"
    return f"{folder} contains {truncate_list(names, NAMES_SHOWN) or 'nothing'}"
