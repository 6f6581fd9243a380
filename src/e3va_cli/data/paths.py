"""Names of files that come from annotations, and what there is in place of a file that is missing."""

import os
from pathlib import Path

from e3va_cli.utils.text import escape_text, truncate_list

NAMES_SHOWN = 10


def safe_join(folder: Path, file_name: str) -> Path | None:
    """Where a file lies, without any `..`, or None where its name leads out of the folder.

    A name comes from whoever wrote the annotations. A link in the folder comes from its owner, who may well keep the
    images on another disk: links are followed, but never upwards again.
    """
    base = Path(os.path.normpath(folder.absolute()))
    path = Path(os.path.normpath(base / file_name))
    return folder / path.relative_to(base) if base in path.parents else None


def describe_directory(path: Path) -> str:
    """The first names in the nearest folder above the path that exists."""
    folder = next(parent for parent in path.parents if parent.is_dir())
    try:
        names = sorted(escape_text(entry.name) + "/" * entry.is_dir() for entry in folder.iterdir())
    except OSError as error:
        return f"{folder} cannot be listed: {error.strerror}"
    return f"{folder} holds {truncate_list(names, NAMES_SHOWN) or 'nothing'}"
