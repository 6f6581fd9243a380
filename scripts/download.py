"""Download and unpack COCO 2017, Pascal VOC 07+12 or ADE20K in the layout of `dataset.root`.

    python scripts/download.py coco                     # into data/coco
    python scripts/download.py voc /data/voc --keep-archives

Stop it and run it again at any time: partial downloads are resumed, complete folders skipped. Exit code 2 and one line
on an error.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shlex
import shutil
import ssl
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from archives import BROKEN_ARCHIVE, GIB, check_disk_space, extract, progress_bar, size_of

from e3va_cli.config.overrides import to_override_value
from e3va_cli.errors import UserError, first_line, print_errors


@dataclass(frozen=True)
class Archive:
    """A file to download, with size in bytes and checksum as "ALGORITHM:HEX", None if unknown."""

    url: str
    size: int | None
    checksum: str | None

    @property
    def name(self) -> str:
        """Return the file name."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Part:
    """A folder in one or more archives, and its number of files by pattern."""

    folder: str
    archives: tuple[Archive, ...]
    file_counts: Mapping[str, int]


@dataclass(frozen=True)
class DataSet:
    """A data set: parts, largest first; `root` is `dataset.root` relative to the download folder."""

    title: str
    root: str
    parts: tuple[Part, ...]


# Checksums: COCO and ADE20K as in GluonCV's scripts/datasets (SHA-1), VOC as in torchvision's datasets/voc.py (MD5).
# Sizes: of TensorFlow Datasets (COCO, VOC) and Hugging Face (ADE20K).
COCO, VOC = "http://images.cocodataset.org", "https://thor.robots.ox.ac.uk/pascal/VOC"
ADE20K = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
TRAIN2017 = Archive(f"{COCO}/zips/train2017.zip", 19_336_861_798, "sha1:10ad623668ab00c62c096f0ed636d6aff41faca5")
VAL2017 = Archive(f"{COCO}/zips/val2017.zip", 815_585_330, "sha1:4950dc9d00dbe1c933ee0170f5797584351d2a41")
INSTANCES = Archive(
    f"{COCO}/annotations/annotations_trainval2017.zip", 252_907_541, "sha1:8551ee4bb5860311e79dace7e79cb91e432e78b3"
)
VOC2012 = Archive(f"{VOC}/voc2012/VOCtrainval_11-May-2012.tar", 1_999_639_040, "md5:6cd6e144f989b92b3379bac3b3de84fd")
VOC2007 = Archive(f"{VOC}/voc2007/VOCtrainval_06-Nov-2007.tar", 460_032_000, "md5:c52e279531787c972589f7e41ab4ae64")
VOC2007_TEST = Archive(f"{VOC}/voc2007/VOCtest_06-Nov-2007.tar", 451_020_800, "md5:b6e924de25625d8de591ea690078ad9f")
SCENES = Archive(ADE20K, 967_382_037, "sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7")

VOC2012_FILES = {"JPEGImages/*.jpg": 17_125, "Annotations/*.xml": 17_125, "ImageSets/Main/trainval.txt": 1}
VOC2007_SETS = {"ImageSets/Main/trainval.txt": 1, "ImageSets/Main/test.txt": 1}
VOC2007_FILES = {"JPEGImages/*.jpg": 9_963, "Annotations/*.xml": 9_963, **VOC2007_SETS}
SCENE_FILES = {
    **{"images/training/*.jpg": 20_210, "annotations/training/*.png": 20_210},
    **{"images/validation/*.jpg": 2_000, "annotations/validation/*.png": 2_000, "objectInfo150.txt": 1},
}
DATA_SETS = {
    "coco": DataSet(
        title="COCO 2017",
        root=".",
        parts=(
            Part("train2017", (TRAIN2017,), {"*.jpg": 118_287}),
            Part("val2017", (VAL2017,), {"*.jpg": 5_000}),
            Part("annotations", (INSTANCES,), {"instances_train2017.json": 1, "instances_val2017.json": 1}),
        ),
    ),
    "voc": DataSet(
        title="Pascal VOC 07+12",
        root="VOCdevkit",
        parts=(
            Part("VOCdevkit/VOC2012", (VOC2012,), VOC2012_FILES),
            Part("VOCdevkit/VOC2007", (VOC2007, VOC2007_TEST), VOC2007_FILES),
        ),
    ),
    "ade20k": DataSet(
        title="ADE20K (Scene Parsing Challenge 2016)",
        root="ADEChallengeData2016",
        parts=(Part("ADEChallengeData2016", (SCENES,), SCENE_FILES),),
    ),
}

PAUSES = (1, 2, 4, 8, 16)  # seconds before each retry; restarts when bytes have arrived
TIMEOUT = 60  # seconds without a byte
NO_SUCH_RANGE = 416  # HTTP status
CHUNK = 2**20
NETWORK_ERRORS = (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


# Download


def request(url: str, start: int) -> HTTPResponse:
    """Return the response from byte `start` on, from 0 if the server cannot resume."""
    headers = {"User-Agent": "e3va", **({"Range": f"bytes={start}-"} if start else {})}
    response: HTTPResponse = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    return response


def total_size(archive: Archive, response: HTTPResponse, start: int) -> int:
    """Return the size of the file on the server.

    Raises:
        UserError: it is unknown or differs from the expected one.
    """
    if start:
        found = re.fullmatch(rf"bytes {start}-\d+/(\d+)", response.headers["Content-Range"] or "")
        if not found:
            raise ConnectionError("the server sent a different range than requested")
        size = int(found[1])
    else:
        size = int(response.headers["Content-Length"] or archive.size or 0)
    if size == 0:
        raise UserError(f"{archive.url}: the server does not report its size; download it yourself, then run again")
    if archive.size not in (None, size):
        raise UserError(
            f"{archive.url}: has {size:,} bytes on the server, expected {archive.size:,}; "
            "the file has changed, or a proxy answers: open the address in a browser"
        )
    return size


def transfer(archive: Archive, partial: Path) -> None:
    """Download the rest of `partial`, or all of it if the server cannot resume or its file has changed."""
    start = size_of(partial)
    if start and start == archive.size:
        return
    identity = Path(f"{partial}.id")  # size and ETag of the file that `partial` is a part of
    with request(archive.url, start) as response:
        start = start if response.status == 206 else 0
        size = total_size(archive, response, start)
        found = f"{size} {response.headers['ETag'] or response.headers['Last-Modified']}"
        if start and identity.exists() and identity.read_text(encoding="utf-8") != found:
            partial.unlink()
            raise ConnectionError("the file on the server has changed since the download began")
        check_disk_space(partial.parent, size - start + size, f"{archive.name} with its unpacked files")
        identity.write_text(found, encoding="utf-8")
        print(f"{archive.url}: {(size - start) / GIB:.2f} of {size / GIB:.2f} GiB to download", file=sys.stderr)
        with partial.open("ab" if start else "wb") as file, progress_bar(archive.name, size, start) as advance:
            while chunk := response.read1(CHUNK):
                file.write(chunk)
                advance(len(chunk))
    if size_of(partial) != size:
        raise ConnectionError(f"the connection ended after {size_of(partial):,} of {size:,} bytes")


def is_final(error: Exception) -> bool:
    """Return whether a retry is useless."""
    return isinstance(error, HTTPError) and error.code < 500 and error.code not in (408, NO_SUCH_RANGE, 429)


def fetch(archive: Archive, partial: Path) -> None:
    """Download `partial` to its full size, with retries.

    Raises:
        UserError: the server refuses, or the retries failed.
    """
    failures = 0
    while True:
        before = size_of(partial)
        try:
            return transfer(archive, partial)
        except NETWORK_ERRORS as error:
            failures = 1 if size_of(partial) > before else failures + 1
            message = f"{archive.url}: {error.reason if type(error) is URLError else first_line(error)}"
            if isinstance(error, HTTPError) and error.code == NO_SUCH_RANGE:
                partial.unlink(missing_ok=True)  # of a longer file
            if is_final(error):
                advice = f"if it has moved, download {archive.name} to {partial.parent} yourself, then run again"
                raise UserError(f"{message}; {advice}") from error
            if failures > len(PAUSES):
                advice = "check the network, then run again to resume"
                raise UserError(f"{message}; {advice}") from error
        pause = PAUSES[failures - 1]
        print(f"{message}; retrying in {pause} s", file=sys.stderr)
        time.sleep(pause)


def digest(file: Path, algorithm: str) -> str:
    """Return the checksum of a file in hexadecimal."""
    state = hashlib.new(algorithm, usedforsecurity=False)
    with file.open("rb") as stream, progress_bar(f"{file.name}: {algorithm}", size_of(file)) as advance:
        while chunk := stream.read(CHUNK):
            state.update(chunk)
            advance(len(chunk))
    return state.hexdigest()


def verify(archive: Archive, file: Path) -> None:
    """Check size and checksum of a file; rename it if they differ.

    Raises:
        UserError: they differ.
    """
    error = None
    if archive.size not in (None, size_of(file)):
        error = f"has {size_of(file):,} bytes, expected {archive.size:,}"
    elif archive.checksum:
        algorithm, _, expected = archive.checksum.partition(":")
        found = digest(file, algorithm)
        error = None if found == expected else f"its {algorithm} is {found}, expected {expected}"
    if error:
        aside = file.with_name(f"{archive.name}.bad")
        file.replace(aside)
        raise UserError(f"{archive.url}: {error}; moved to {aside}: delete it, then run again")


def download(archive: Archive, base: Path) -> Path:
    """Return the verified archive in `base`, downloaded if it is not there."""
    file, partial = base / archive.name, base / f"{archive.name}.part"
    if file.exists():
        verify(archive, file)
    else:
        fetch(archive, partial)
        Path(f"{partial}.id").unlink(missing_ok=True)
        verify(archive, partial)
        partial.rename(file)
    return file


# Unpack


def missing_files(part: Part, folder: Path) -> str | None:
    """Return which files a folder lacks, None if it is complete."""
    for pattern, expected in part.file_counts.items():
        found = sum(1 for _ in folder.glob(pattern))
        if found < expected:
            return f"{found:,} of {expected:,} files {pattern}"
    return None


def unpack(part: Part, files: Sequence[Path], base: Path) -> None:
    """Unpack a part's archives to a temporary folder, and move it into place if it is complete.

    Raises:
        UserError: an archive cannot be unpacked or lacks files.
    """
    target = base / part.folder
    temporary = base / f".{target.name}.unpacking"
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed run
    try:
        for file in files:
            try:
                extract(file, part.folder, temporary)
            except UserError:
                raise
            except BROKEN_ARCHIVE as error:
                raise UserError(
                    f"{file}: cannot be unpacked ({first_line(error)}); delete it, then run again"
                ) from error
        if missing := missing_files(part, temporary / part.folder):
            raise UserError(f"{files[-1]}: has {missing}; delete it, then run again")
        target.parent.mkdir(parents=True, exist_ok=True)
        (temporary / part.folder).rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# The command


def is_complete(part: Part, base: Path) -> bool:
    """Return whether a part is there.

    Raises:
        UserError: it is incomplete.
    """
    folder = base / part.folder
    if not folder.exists():
        return False
    if missing := missing_files(part, folder):
        raise UserError(f"{folder}: has only {missing}; move it away or use another folder, then run again")
    return True


def install(data_set: DataSet, base: Path, keep_archives: bool) -> None:
    """Download and unpack all missing parts."""
    base.mkdir(parents=True, exist_ok=True)
    missing = [part for part in data_set.parts if not is_complete(part, base)]
    for part in missing:
        files = [download(archive, base) for archive in part.archives]
        unpack(part, files, base)
        if not keep_archives:
            for file in files:
                file.unlink()


def next_commands(name: str, root: Path) -> str:
    """Return the next commands, with the path quoted for Hydra and for the shell."""
    override = shlex.quote(f"dataset.root={to_override_value(str(root))}")
    return (
        f"  e3va check-data dataset={name} {override}\n"
        f"  e3va train dataset={name} {override} backbone=swin_t backbone.pretrained=true"
    )


def parse(arguments: Sequence[str] | None, data_sets: Mapping[str, DataSet]) -> argparse.Namespace:
    """Parse the command line."""
    lines = []
    for name, data_set in data_sets.items():
        size = sum(archive.size or 0 for part in data_set.parts for archive in part.archives)
        lines.append(f"  {name:<8}{data_set.title}: {size / GIB:.1f} GiB to download, about twice that on disk")
    parser = argparse.ArgumentParser(
        prog="download.py",
        description="Download and unpack a data set from its official source, in the layout of `dataset.root`.",
        epilog="data sets:\n" + "\n".join(lines) + "\n\nRun it again at any time to resume.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data_set", choices=data_sets, help="data set")
    parser.add_argument(
        "folder", nargs="?", type=Path, help="target folder; archives in it are used (default: data/NAME)"
    )
    parser.add_argument("--keep-archives", action="store_true", help="keep the archives")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, data_sets: Mapping[str, DataSet] = DATA_SETS) -> int:
    """Run the command and return its exit code."""
    args = parse(arguments, data_sets)
    name: str = args.data_set
    base = (args.folder or Path("data") / name).expanduser().resolve()
    try:
        install(data_sets[name], base, args.keep_archives)
    except KeyboardInterrupt:
        print("Interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    except UserError as error:
        print_errors(UserError(first_line(error)), "download.py")
        return 2
    except OSError as error:
        print_errors(UserError(f"{base}: {first_line(error)}; fix this, then run again"), "download.py")
        return 2
    print(f"{data_sets[name].title} is in {base}. Next steps:\n{next_commands(name, base / data_sets[name].root)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
