"""The image files that an `input=` option means."""

from __future__ import annotations

from collections.abc import Sequence
from glob import glob
from pathlib import Path

from e3va_cli.data.images.formats import IMAGE_SUFFIXES, KNOWN_SUFFIXES, describe_unsupported
from e3va_cli.errors import UserError


def find_images(inputs: Sequence[str]) -> list[Path]:
    """The files that `inputs` mean, each once: image files, folders (the images directly in them), and patterns.

    Images of a folder that cannot be read here are among them; reading them says so.

    Raises:
        UserError: one of them means no file; a line for each.
    """
    found: dict[Path, Path] = {}
    mistakes = []
    for given in inputs:
        path = Path(given).expanduser()
        if path.is_dir():
            try:
                files = [p for p in path.iterdir() if p.suffix.lower() in KNOWN_SUFFIXES and not p.name.startswith(".")]
            except OSError as error:
                mistakes.append(f"input={given}: the folder cannot be read ({error.strerror})")
                continue
            reason = f"no images in this folder; a pattern such as '{given}/**/*.jpg' also looks into those below it"
        elif path.exists() or not any(character in given for character in "*?["):
            files, reason = [path], "no such file or folder"
        else:
            names = glob(str(path), recursive=True)  # noqa: PTH207 (pathlib's would find hidden files)
            files, reason = [Path(name) for name in names], "matches no file"
        files = sorted(file for file in files if file.is_file())
        if not files:
            mistakes.append(f"input={given}: {reason}")
        elif path.is_dir() and not any(file.suffix.lower() in IMAGE_SUFFIXES for file in files):
            mistakes.append(f"input={given}: {describe_unsupported(file.name for file in files)}")
        for file in files:
            found.setdefault(file.resolve(), file)
    if mistakes or not found:
        raise UserError(*(mistakes or ["input=[]: nothing to do; give images, folders or patterns"]))
    return list(found.values())
