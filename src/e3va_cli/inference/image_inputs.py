"""Find the image files of an `input=` option."""

from __future__ import annotations

from collections.abc import Sequence
from glob import glob
from pathlib import Path

from e3va_cli.data.images.formats import IMAGE_SUFFIXES, KNOWN_SUFFIXES, describe_unsupported
from e3va_cli.errors import UserError


def find_images(inputs: Sequence[str]) -> list[Path]:
    """Return the files of image paths, folders (not recursive) and glob patterns, without duplicates.

    Files of a folder are those with a suffix of an image format, including unsupported ones, which fail when they are
    read.

    Raises:
        UserError: an input has no files; one line for each.
    """
    images: dict[Path, Path] = {}
    errors = []
    for given in inputs:
        path = Path(given).expanduser()
        if path.is_dir():
            try:
                files = [p for p in path.iterdir() if p.suffix.lower() in KNOWN_SUFFIXES and not p.name.startswith(".")]
            except OSError as error:
                errors.append(f"input={given}: the folder cannot be read ({error.strerror})")
                continue
            reason = f"no images in this folder; for subfolders, use a pattern such as '{given}/**/*.jpg'"
        elif path.exists() or not any(character in given for character in "*?["):
            files, reason = [path], "no such file or folder"
        else:
            names = glob(str(path), recursive=True)  # noqa: PTH207 (pathlib's glob includes hidden files)
            files, reason = [Path(name) for name in names], "the pattern matches no file"
        files = sorted(file for file in files if file.is_file())
        if not files:
            errors.append(f"input={given}: {reason}")
        elif path.is_dir() and not any(file.suffix.lower() in IMAGE_SUFFIXES for file in files):
            errors.append(f"input={given}: {describe_unsupported(file.name for file in files)}")
        for file in files:
            images.setdefault(file.resolve(), file)
    if not inputs:
        errors.append("input=[]: no input; set it to images, folders or patterns")
    if errors:
        raise UserError(*errors)
    return list(images.values())
