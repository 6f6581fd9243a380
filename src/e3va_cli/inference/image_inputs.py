"""The image files of an `input=` option."""

from __future__ import annotations

from collections.abc import Sequence
from glob import glob
from pathlib import Path

from e3va_cli.data.images.formats import IMAGE_SUFFIXES, KNOWN_SUFFIXES, describe_unsupported
from e3va_cli.errors import UserError


def find_images(inputs: Sequence[str]) -> list[Path]:
    """Return the image files of files, folders (not their subfolders) and patterns, without duplicates.

    Files of a folder in unsupported image formats are included; reading them raises an error.

    Raises:
        UserError: one line for each input without files.
    """
    found: dict[Path, Path] = {}
    errors = []
    for given in inputs:
        path = Path(given).expanduser()
        if path.is_dir():
            try:
                files = [p for p in path.iterdir() if p.suffix.lower() in KNOWN_SUFFIXES and not p.name.startswith(".")]
            except OSError as error:
                errors.append(f"input={given}: cannot be read ({error.strerror})")
                continue
            reason = f"no images in this folder; a pattern such as '{given}/**/*.jpg' includes subfolders"
        elif path.exists() or not any(character in given for character in "*?["):
            files, reason = [path], "no such file or folder"
        else:
            names = glob(str(path), recursive=True)  # noqa: PTH207 (pathlib's would find hidden files)
            files, reason = [Path(name) for name in names], "matches no file"
        files = sorted(file for file in files if file.is_file())
        if not files:
            errors.append(f"input={given}: {reason}")
        elif path.is_dir() and not any(file.suffix.lower() in IMAGE_SUFFIXES for file in files):
            errors.append(f"input={given}: {describe_unsupported(file.name for file in files)}")
        for file in files:
            found.setdefault(file.resolve(), file)
    if errors or not found:
        raise UserError(*(errors or ["input=[]: no input; use images, folders or patterns"]))
    return list(found.values())
