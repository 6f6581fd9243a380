"""Download and unpack COCO 2017, Pascal VOC 07+12 or ADE20K, laid out as `dataset.root` wants them.

    python scripts/download.py coco                     # into data/coco
    python scripts/download.py voc /data/voc --keep-archives

Stop it and run it again at any time: a partial download goes on where it stopped, and what is complete is left alone.
Exit code 2 where something is wrong, with one line that says what, where, and what to do.
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

from archives import BROKEN_ARCHIVE, GIB, extract, progress_bar, require_space, size_of

from e3va_cli.errors import UserError, first_line, print_errors
from e3va_cli.utils.command_line import to_override_value


@dataclass(frozen=True)
class Archive:
    """A file to download: its size in bytes and its checksum as "ALGORITHM:HEX", where they are known."""

    url: str
    size: int | None
    checksum: str | None

    @property
    def name(self) -> str:
        """The file's name, here as on the server."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Part:
    """A folder that one or more archives have inside, and how many files it holds by pattern once it is complete."""

    folder: str
    archives: tuple[Archive, ...]
    holds: Mapping[str, int]


@dataclass(frozen=True)
class DataSet:
    """Parts, the largest first; `root` is what `dataset.root` points at, below the folder of the download."""

    title: str
    root: str
    parts: tuple[Part, ...]


# Checksums: COCO and ADE20K as in GluonCV's scripts/datasets (SHA-1), VOC as in torchvision's datasets/voc.py (MD5).
# Sizes: as TensorFlow Datasets (COCO, VOC) and Hugging Face (ADE20K) have recorded them.
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

PAUSES = (1, 2, 4, 8, 16)  # seconds before each new attempt; counted anew whenever bytes have arrived
TIMEOUT = 60  # seconds without a byte
NO_SUCH_RANGE = 416  # of HTTP's codes
CHUNK = 2**20
NETWORK_ERRORS = (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


# Download


def ask(url: str, start: int) -> HTTPResponse:
    """The server's answer, from byte `start` on where it can do that."""
    headers = {"User-Agent": "e3va", **({"Range": f"bytes={start}-"} if start else {})}
    response: HTTPResponse = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    return response


def total_size(archive: Archive, response: HTTPResponse, start: int) -> int:
    """Bytes of the whole file on the server, which must be those of the table."""
    if start:
        found = re.fullmatch(rf"bytes {start}-\d+/(\d+)", response.headers["Content-Range"] or "")
        if not found:
            raise ConnectionError("the server sent another range than the one asked for")
        size = int(found[1])
    else:
        size = int(response.headers["Content-Length"] or archive.size or 0)
    if size == 0:
        raise UserError(f"{archive.url}: the server does not say how large it is; fetch it yourself, then run again")
    if archive.size not in (None, size):
        raise UserError(
            f"{archive.url}: has {size:,} bytes on the server and should have {archive.size:,}; "
            "the file has changed, or something in between answers for it: look at the address in a browser"
        )
    return size


def transfer(archive: Archive, partial: Path) -> None:
    """One attempt: fetch what `partial` lacks, or everything where the server cannot resume or its file is another."""
    start = size_of(partial)
    if start and start == archive.size:
        return
    identity = Path(f"{partial}.id")  # size and ETag of the file that `partial` is a part of
    with ask(archive.url, start) as response:
        start = start if response.status == 206 else 0
        size = total_size(archive, response, start)
        found = f"{size} {response.headers['ETag'] or response.headers['Last-Modified']}"
        if start and identity.exists() and identity.read_text(encoding="utf-8") != found:
            partial.unlink()
            raise ConnectionError("the file on the server has changed since the download began")
        require_space(partial.parent, size - start + size, f"{archive.name} with what it unpacks to")
        identity.write_text(found, encoding="utf-8")
        print(f"{archive.url}: {(size - start) / GIB:.2f} of {size / GIB:.2f} GiB to download", file=sys.stderr)
        with partial.open("ab" if start else "wb") as file, progress_bar(archive.name, size, start) as advance:
            while chunk := response.read1(CHUNK):
                file.write(chunk)
                advance(len(chunk))
    if size_of(partial) != size:
        raise ConnectionError(f"the connection ended after {size_of(partial):,} of {size:,} bytes")


def is_final(error: Exception) -> bool:
    """Whether a new attempt would end the same way."""
    return isinstance(error, HTTPError) and error.code < 500 and error.code not in (408, NO_SUCH_RANGE, 429)


def fetch(archive: Archive, partial: Path) -> None:
    """Bring `partial` to its full size, through errors of the network."""
    failures = 0
    while True:
        before = size_of(partial)
        try:
            return transfer(archive, partial)
        except NETWORK_ERRORS as error:
            failures = 1 if size_of(partial) > before else failures + 1
            fault = f"{archive.url}: {error.reason if type(error) is URLError else first_line(error)}"
            if isinstance(error, HTTPError) and error.code == NO_SUCH_RANGE:
                partial.unlink(missing_ok=True)  # it is of a longer file
            if is_final(error):
                advice = f"if it has moved, put {archive.name} into {partial.parent} yourself, then run again"
                raise UserError(f"{fault}; {advice}") from error
            if failures > len(PAUSES):
                advice = "look at the network, then run again: it goes on where it stopped"
                raise UserError(f"{fault}; {advice}") from error
        pause = PAUSES[failures - 1]
        print(f"{fault}; again in {pause} s", file=sys.stderr)
        time.sleep(pause)


def digest(file: Path, algorithm: str) -> str:
    """The checksum of a file, as hexadecimal digits."""
    state = hashlib.new(algorithm, usedforsecurity=False)
    with file.open("rb") as stream, progress_bar(f"{file.name}: {algorithm}", size_of(file)) as advance:
        while chunk := stream.read(CHUNK):
            state.update(chunk)
            advance(len(chunk))
    return state.hexdigest()


def verify(archive: Archive, file: Path) -> None:
    """Put a file aside that is not what the table says, and stop."""
    fault = None
    if archive.size not in (None, size_of(file)):
        fault = f"has {size_of(file):,} bytes and should have {archive.size:,}"
    elif archive.checksum:
        algorithm, _, expected = archive.checksum.partition(":")
        found = digest(file, algorithm)
        fault = None if found == expected else f"its {algorithm} is {found} and should be {expected}"
    if fault:
        aside = file.with_name(f"{archive.name}.bad")
        file.replace(aside)
        raise UserError(f"{archive.url}: {fault}; it lies at {aside} now: remove it, then run again")


def download(archive: Archive, base: Path) -> Path:
    """The verified archive in `base`; one that lies there already, from whatever source, is verified and used."""
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


def lacks(part: Part, folder: Path) -> str | None:
    """What a folder lacks to be complete, in words."""
    for pattern, expected in part.holds.items():
        found = sum(1 for _ in folder.glob(pattern))
        if found < expected:
            return f"{found:,} of {expected:,} files {pattern}"
    return None


def unpack(part: Part, files: Sequence[Path], base: Path) -> None:
    """Unpack a part's archives beside its place, and move the folder there once it is complete."""
    target = base / part.folder
    temporary = base / f".{target.name}.unpacking"
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        for file in files:
            try:
                extract(file, part.folder, temporary)
            except UserError:
                raise
            except BROKEN_ARCHIVE as error:
                raise UserError(
                    f"{file}: cannot be unpacked ({first_line(error)}); remove it, then run again"
                ) from error
        if missing := lacks(part, temporary / part.folder):
            raise UserError(f"{files[-1]}: holds {missing}; remove it, then run again")
        target.parent.mkdir(parents=True, exist_ok=True)
        (temporary / part.folder).rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# The command


def is_complete(part: Part, base: Path) -> bool:
    """Whether a part is there; half of one, by whoever unpacked it, is left to the user."""
    folder = base / part.folder
    if not folder.exists():
        return False
    if missing := lacks(part, folder):
        raise UserError(f"{folder}: is there with {missing}; move it away or give another folder, then run again")
    return True


def install(data_set: DataSet, base: Path, keep_archives: bool) -> None:
    """Download and unpack every part that is not there yet."""
    base.mkdir(parents=True, exist_ok=True)
    missing = [part for part in data_set.parts if not is_complete(part, base)]
    for part in missing:
        files = [download(archive, base) for archive in part.archives]
        unpack(part, files, base)
        if not keep_archives:
            for file in files:
                file.unlink()


def next_commands(name: str, root: Path) -> str:
    """What to type next; a path with unusual characters is quoted for Hydra and for the shell."""
    word = shlex.quote(f"dataset.root={to_override_value(str(root))}")
    return (
        f"  e3va check-data dataset={name} {word}\n"
        f"  e3va train dataset={name} {word} backbone=swin_t backbone.pretrained=true"
    )


def parse(words: Sequence[str] | None, data_sets: Mapping[str, DataSet]) -> argparse.Namespace:
    """The command line."""
    lines = []
    for name, data_set in data_sets.items():
        size = sum(archive.size or 0 for part in data_set.parts for archive in part.archives)
        lines.append(f"  {name:<8}{data_set.title}: {size / GIB:.1f} GiB to download, twice that on disk meanwhile")
    parser = argparse.ArgumentParser(
        prog="download.py",
        description="Download and unpack a data set from its official place, as `dataset.root` wants it.",
        epilog="data sets:\n" + "\n".join(lines) + "\n\nRun it again at any time: it goes on where it stopped.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data_set", choices=data_sets, help="which one")
    parser.add_argument("folder", nargs="?", type=Path, help="where to; an archive that lies there is used (data/NAME)")
    parser.add_argument("--keep-archives", action="store_true", help="do not remove the archives once unpacked")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None, data_sets: Mapping[str, DataSet] = DATA_SETS) -> int:
    """Run the command; returns its exit code."""
    arguments = parse(words, data_sets)
    name: str = arguments.data_set
    base = (arguments.folder or Path("data") / name).expanduser().resolve()
    try:
        install(data_sets[name], base, arguments.keep_archives)
    except KeyboardInterrupt:
        print("Interrupted; run the same command again, and it goes on where it stopped", file=sys.stderr)
        return 130
    except UserError as error:
        print_errors(UserError(first_line(error)), "download.py")
        return 2
    except OSError as error:
        print_errors(UserError(f"{base}: {first_line(error)}; mend this, then run again"), "download.py")
        return 2
    print(f"{data_sets[name].title} is in {base}. Next:\n{next_commands(name, base / data_sets[name].root)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
