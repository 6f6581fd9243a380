"""Atomic writes: a file is either the old one or the whole new one."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from e3va_cli.errors import UserError, first_line

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # errors of the disk
REMEDIES = {
    errno.ENOSPC: "free space on that disk",
    errno.EDQUOT: "free space within your quota",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
}


class UnwritableError(UserError):
    """A file cannot be written: the disk is full, permissions are missing, or its folder was deleted.

    Attributes:
        reason: the system's message, and what to do.
    """

    def __init__(self, path: Path, error: OSError) -> None:
        remedy = REMEDIES.get(error.errno or 0, "make its folder writable")
        message = f"{error.strerror or first_line(error)}; the previous file is unchanged"
        if not path.parent.is_dir():
            message = f"{path.parent} was deleted or moved while the command ran"
            remedy = "start again, or resume from its new path"
        self.reason = f"{message}; {remedy}"
        super().__init__(f"{path}: cannot be written: {self.reason}")


@contextmanager
def report_write_errors(path: Path) -> Iterator[None]:
    """Turn errors of writing a file into one line; errors of files in other folders are raised as they are.

    Raises:
        UnwritableError: the disk is full, or the folder read-only or deleted.
    """
    try:
        yield
    except OSError as error:
        place = path if error.filename is None else Path(os.fsdecode(error.filename))
        if path.parent not in (place, place.parent):
            raise
        raise UnwritableError(path, error) from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which is renamed to `path` at the end, and deleted after an error.

    The folder must exist: a run whose folder is deleted must not continue in an empty one.

    Raises:
        UnwritableError: the disk is full, or the folder read-only or deleted.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with report_write_errors(path):
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def make_subfolder(path: Path) -> Path:
    """Create a folder in an existing one, and return its path.

    Raises:
        UnwritableError: the disk is full, or the parent is read-only or deleted.
    """
    with report_write_errors(path):
        path.mkdir(exist_ok=True)
    return path


@contextmanager
def atomic_append(path: Path) -> Iterator[IO[str]]:
    """Yield a text file to append to, which is truncated to its previous size after an error.

    Raises:
        UnwritableError: the disk is full, or the file is read-only.
    """
    with report_write_errors(path):
        size = path.stat().st_size
        try:
            with path.open("a", encoding="utf-8", newline="") as file:
                yield file
        except BaseException:
            with suppress(OSError):
                os.truncate(path, size)
            raise


def check_regular_file(path: Path) -> None:
    """Check that a path is a regular file: opening a pipe would block, and some devices never end.

    Raises:
        OSError: it does not exist, or is a folder, pipe or device.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "a folder, pipe or device, not a file")


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON; a NaN raises a ValueError, as JSON has none."""
    text = json.dumps(content, indent=2, allow_nan=False)
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
