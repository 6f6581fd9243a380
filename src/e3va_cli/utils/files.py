"""Files that are either the old one or the whole new one, never half of it."""

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

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # of a disk, whatever is written to it
REMEDIES = {
    errno.ENOSPC: "free space on that disk",
    errno.EDQUOT: "free space within your quota",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
}


class UnwritableError(UserError):
    """A file cannot be written, for a reason outside this program: a full disk, missing permissions, a folder gone.

    Attributes:
        reason: what the system said, and what to do.
    """

    def __init__(self, path: Path, error: OSError) -> None:
        remedy = REMEDIES.get(error.errno or 0, "make its folder writable")
        said = f"{error.strerror or first_line(error)}; what was there before is whole"
        if not path.parent.is_dir():
            said = f"{path.parent} was deleted or moved while the command ran"
            remedy = "start again, or go on with it in its new place"
        self.reason = f"{said}; {remedy}"
        super().__init__(f"{path}: cannot be written: {self.reason}")


@contextmanager
def report_write_errors(path: Path) -> Iterator[None]:
    """Say in one line what keeps a file from being written; errors of files in other folders are none of that.

    Raises:
        UnwritableError: the disk is full, the folder read-only or gone, or the like.
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
    """A temporary name beside `path` to write to; renamed to `path` at the end, removed if anything goes wrong.

    The folder must be there: a run whose folder is deleted must not go on in an empty one.

    Raises:
        UnwritableError: the disk is full, the folder read-only or gone, or the like.
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
    """Make a folder in one that must be there.

    Raises:
        UnwritableError: the disk is full, or the folder that it is in is read-only or gone.
    """
    with report_write_errors(path):
        path.mkdir(exist_ok=True)
    return path


@contextmanager
def atomic_append(path: Path) -> Iterator[IO[str]]:
    """A text file to append lines to; what was appended is cut off again if anything goes wrong.

    Raises:
        UnwritableError: the disk is full, the file read-only, or the like.
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
    """Make sure that reading comes to an end: opening a pipe would wait for ever, and some devices never end.

    Raises:
        OSError: there is nothing, or a folder, pipe or device.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "a folder, pipe or device, not a file")


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON; a NaN is refused, as JSON has none."""
    text = json.dumps(content, indent=2, allow_nan=False)
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
