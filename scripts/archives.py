"""Unpack downloaded zip and tar archives; all names and sizes are checked before anything is written.

`shutil.unpack_archive` checks names while it writes and no sizes, and Python 3.11.0 to 3.11.3 has no tarfile filters.
"""

from __future__ import annotations

import lzma
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from e3va_cli.errors import UserError

GIB = 2**30
GROWTH = 20  # maximum ratio of unpacked to packed size
SMALL = GIB  # unpacked sizes below this may have a higher ratio
BROKEN_ARCHIVE = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, RuntimeError, ValueError, OverflowError),
)


@contextmanager
def progress_bar(text: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show a progress bar over bytes; yield the function that advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(text, total=total, completed=done)
        yield lambda count: progress.advance(task, count)


def check_disk_space(base: Path, needed: int, purpose: str) -> None:
    """Check the free disk space.

    Raises:
        UserError: less than `needed` bytes are free.
    """
    free = shutil.disk_usage(base).free
    if needed > free:
        raise UserError(
            f"{base}: {purpose} needs {needed / GIB:.2f} GiB but {free / GIB:.2f} GiB are free; "
            "free disk space or use another folder, then run again"
        )


def size_of(file: Path) -> int:
    """Return the bytes of a file, 0 if there is none."""
    return file.stat().st_size if file.exists() else 0


@dataclass(frozen=True)
class Member:
    """An entry of an archive: name and link target, size, and whether it is a file or a folder."""

    info: zipfile.ZipInfo | tarfile.TarInfo
    paths: tuple[str, ...]
    size: int
    plain: bool

    @property
    def safe(self) -> bool:
        """Return whether it is a file or a folder inside the target folder."""
        paths = [PureWindowsPath(path) for path in self.paths]  # accepts / and \
        return self.plain and self.size >= 0 and not any(path.anchor or ".." in path.parts for path in paths)


def members(archive: zipfile.ZipFile | tarfile.TarFile) -> list[Member]:
    """Return the archive's entries. Hard links count as files: they are second names of files in the archive."""
    if isinstance(archive, zipfile.ZipFile):
        types = (0, stat.S_IFREG, stat.S_IFDIR)  # 0: packed on a system without file types
        return [
            Member(info, (info.filename,), info.file_size, stat.S_IFMT(info.external_attr >> 16) in types)
            for info in archive.infolist()
        ]
    return [
        Member(info, (info.name, info.linkname), info.size, info.isreg() or info.isdir() or info.islnk())
        for info in archive.getmembers()
    ]


def open_archive(file: Path) -> zipfile.ZipFile | tarfile.TarFile:
    """Open a zip or tar archive."""
    if file.suffix == ".zip":
        return zipfile.ZipFile(file)
    archive = tarfile.open(file)  # noqa: SIM115 - closed by the caller
    # Python 3.11.0 to 3.11.3 has no filter; `Member.safe` is checked for every name before.
    archive.extraction_filter = getattr(tarfile, "data_filter", None)
    return archive


def extract(file: Path, folder: str, temporary: Path) -> None:
    """Unpack `folder` of an archive, if all its names and sizes are safe.

    Raises:
        UserError: they are not, or the disk is full.
    """
    with open_archive(file) as archive:
        index = members(archive)
        for member in index:
            if not member.safe:
                raise UserError(
                    f"{file}: {member.paths[0]!r} is a link, a device or a path outside the archive's folder; "
                    "delete the file, then run again"
                )
        wanted = [member for member in index if PurePosixPath(member.paths[0]).is_relative_to(folder)]
        size = sum(member.size for member in wanted)
        if size > max(SMALL, GROWTH * size_of(file)):
            raise UserError(
                f"{file}: {size_of(file) / GIB:.2f} GiB would unpack to {size / GIB:,.2f} GiB; "
                "delete the file, then run again"
            )
        check_disk_space(temporary.parent, size, f"unpacking {file.name}")
        with progress_bar(f"{file.name}: unpacking", size) as advance:
            for member in wanted:
                archive.extract(member.info, temporary)  # type: ignore[arg-type]  # a member of this very archive
                advance(member.size)
