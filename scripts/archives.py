"""Unpack zip and tar archives from elsewhere: every name and size in one is looked at before anything is written."""

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
GROWTH = 20  # times that an archive may grow when it is unpacked: text grows several times, zeros a thousand
SMALL = GIB  # what may grow more, as it fills no disk
BROKEN_ARCHIVE = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, RuntimeError, ValueError, OverflowError),
)


@contextmanager
def progress_bar(text: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar over bytes; yields the function that moves it on."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(text, total=total, completed=done)
        yield lambda count: progress.advance(task, count)


def require_space(base: Path, needed: int, purpose: str) -> None:
    """Refuse what would not fit on the disk."""
    free = shutil.disk_usage(base).free
    if needed > free:
        raise UserError(
            f"{base}: {purpose} needs {needed / GIB:.2f} GiB and {free / GIB:.2f} GiB are free; "
            "make room or give another folder, then run again"
        )


def size_of(file: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    return file.stat().st_size if file.exists() else 0


@dataclass(frozen=True)
class Member:
    """What the index of an archive says of one entry: every path in it, and whether it is a file or a folder."""

    info: zipfile.ZipInfo | tarfile.TarInfo
    paths: tuple[str, ...]
    size: int
    plain: bool

    @property
    def safe(self) -> bool:
        """Whether it would be a file or a folder, and below the folder that the archive is unpacked to."""
        paths = [PureWindowsPath(path) for path in self.paths]  # reads / and \ alike
        return self.plain and self.size >= 0 and not any(path.anchor or ".." in path.parts for path in paths)


def members(archive: zipfile.ZipFile | tarfile.TarFile) -> list[Member]:
    """The archive's index. A hard link of a tar archive is a file: a second name of one that the archive holds."""
    if isinstance(archive, zipfile.ZipFile):
        kinds = (0, stat.S_IFREG, stat.S_IFDIR)  # 0: packed where files have no kind
        return [
            Member(info, (info.filename,), info.file_size, stat.S_IFMT(info.external_attr >> 16) in kinds)
            for info in archive.infolist()
        ]
    return [
        Member(info, (info.name, info.linkname), info.size, info.isreg() or info.isdir() or info.islnk())
        for info in archive.getmembers()
    ]


def open_archive(file: Path) -> zipfile.ZipFile | tarfile.TarFile:
    """A zip or tar archive, to be closed by the caller."""
    if file.suffix == ".zip":
        return zipfile.ZipFile(file)
    archive = tarfile.open(file)  # noqa: SIM115 - closed by the caller
    # Python 3.11.0 to 3.11.3 has no filter; `Member.safe` has looked at every name before.
    archive.extraction_filter = getattr(tarfile, "data_filter", None)
    return archive


def extract(file: Path, folder: str, temporary: Path) -> None:
    """Unpack what an archive has below `folder`, once every one of its names is found safe."""
    with open_archive(file) as archive:
        index = members(archive)
        for member in index:
            if not member.safe:
                raise UserError(
                    f"{file}: refused, as {member.paths[0]!r} in it is a link, a device or outside its folder; "
                    "remove the file, then run again"
                )
        wanted = [member for member in index if PurePosixPath(member.paths[0]).is_relative_to(folder)]
        size = sum(member.size for member in wanted)
        if size > max(SMALL, GROWTH * size_of(file)):
            raise UserError(
                f"{file}: refused, as its {size_of(file) / GIB:.2f} GiB would become {size / GIB:,.2f} GiB; "
                "remove the file, then run again"
            )
        require_space(temporary.parent, size, f"unpacking {file.name}")
        with progress_bar(f"{file.name}: unpacking", size) as advance:
            for member in wanted:
                archive.extract(member.info, temporary)  # type: ignore[arg-type]  # a member of this very archive
                advance(member.size)
