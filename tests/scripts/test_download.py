"""The download script with a local server and tiny archives in the official layouts."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory

import archives
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.datasets.voc import DATASET_YEAR_DICT

from e3va_cli.errors import UserError
from scripts import download
from scripts.download import DATA_SETS, Archive, DataSet, Part

VOC = "VOCdevkit/VOC20"
INSIDE = {
    "train2017.zip": ["train2017/", "train2017/000000000009.jpg", "train2017/000000000025.jpg"],
    "val2017.zip": ["val2017/", "val2017/000000000139.jpg", "val2017/000000000285.jpg"],
    "annotations_trainval2017.zip": [
        f"annotations/{kind}_{split}2017.json"
        for kind in ("instances", "captions", "person_keypoints")
        for split in ("train", "val")
    ],
    "VOCtrainval_11-May-2012.tar": [
        f"{VOC}12/{name}"
        for name in ("JPEGImages/2007_000027.jpg", "Annotations/2007_000027.xml", "ImageSets/Main/trainval.txt")
    ],
    "VOCtrainval_06-Nov-2007.tar": [
        f"{VOC}07/{name}" for name in ("JPEGImages/000005.jpg", "Annotations/000005.xml", "ImageSets/Main/trainval.txt")
    ],
    "VOCtest_06-Nov-2007.tar": [
        f"{VOC}07/{name}" for name in ("JPEGImages/000001.jpg", "Annotations/000001.xml", "ImageSets/Main/test.txt")
    ],
    "ADEChallengeData2016.zip": [
        "ADEChallengeData2016/",
        "ADEChallengeData2016/images/training/ADE_train_00000001.jpg",
        "ADEChallengeData2016/annotations/training/ADE_train_00000001.png",
        "ADEChallengeData2016/images/validation/ADE_val_00000001.jpg",
        "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png",
        "ADEChallengeData2016/objectInfo150.txt",
        "ADEChallengeData2016/sceneCategories.txt",
    ],
}
PARTIAL = "train2017.zip.part"


def content(name: str) -> bytes:
    """Bytes that do not compress, other ones for each name."""
    return b"".join(hashlib.sha256(f"{name} {i}".encode()).digest() for i in range(64))


def zipped(*entries: str | zipfile.ZipInfo, data: Callable[[str], bytes] = content) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in entries:
            name = entry if isinstance(entry, str) else entry.filename
            archive.writestr(entry, b"" if name.endswith("/") else data(name))
    return stream.getvalue()


def tarred(*entries: str | tarfile.TarInfo) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for entry in entries:
            info = tarfile.TarInfo(entry) if isinstance(entry, str) else entry
            data = content(info.name) if info.isreg() else b""
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def tiny(name: str) -> bytes:
    return (zipped if name.endswith(".zip") else tarred)(*INSIDE[name])


class Server(ThreadingHTTPServer):
    """Serves `files`; what it was asked and how much it sent is in `log`: (name, Range, bytes)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.log: list[tuple[str, str | None, int]] = []
        self.ranges = True
        self.etag = '"one"'
        self.cuts: list[int] = []  # for each request to come, the bytes after which the connection breaks
        self.errors: list[int] = []  # for each request to come, a status

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def archive(self, name: str, data: bytes) -> Archive:
        """Serve `data`; returns its line of the table."""
        self.files[name] = data
        return Archive(self.url(name), len(data), f"sha1:{hashlib.sha1(data).hexdigest()}")


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, name = self.server, self.path[1:]
        data, asked, start = server.files.get(name), self.headers["Range"], 0
        if server.errors or data is None:
            server.log.append((name, asked, 0))
            return self.send_error(server.errors.pop(0) if server.errors else 404)
        if asked and server.ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(data):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", server.etag)
        body = data[start:][: server.cuts.pop(0) if server.cuts else None]
        server.log.append((name, asked, len(body)))  # before the client can ask again
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSES", (0, 0))
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Run:
    """`download.py NAME FOLDER` in this process, on a table of one part unless told otherwise."""

    def __init__(self, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.base, self.capsys = base, capsys

    def __call__(self, data_set: DataSet, *options: str, name: str = "coco", expect: int = 0) -> str:
        """Return the output: the next commands on success, else the line of the error."""
        code = download.main([name, str(self.base), *options], {name: data_set})
        out, err = self.capsys.readouterr()
        assert code == expect, err
        if expect == 2:
            assert out == "" and err.count("error:") == 1
            assert err.splitlines()[-1].startswith("download.py: error: ")
        return out if expect == 0 else err.splitlines()[-1]

    def files(self) -> set[str]:
        return {str(path.relative_to(self.base)) for path in self.base.rglob("*") if not path.is_dir()}


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(tmp_path / "data" / "base", capsys)


def one_part(archive: Archive, folder: str = "train2017", holds: dict[str, int] | None = None) -> DataSet:
    return DataSet("Tiny", ".", (Part(folder, (archive,), {"*.jpg": 2} if holds is None else holds),))


@pytest.fixture
def train2017(server: Server) -> DataSet:
    return one_part(server.archive("train2017.zip", tiny("train2017.zip")))


def archive_of(data_set: DataSet) -> Archive:
    return data_set.parts[0].archives[0]


def lay_partial(run: Run, data: bytes, identity: str | None = None) -> None:
    run.base.mkdir(parents=True)
    (run.base / PARTIAL).write_bytes(data)
    if identity:
        (run.base / f"{PARTIAL}.id").write_text(identity)


UNPACKED = {"train2017/000000000009.jpg", "train2017/000000000025.jpg"}


# The table


@pytest.mark.parametrize("name", DATA_SETS)
def test_table_is_well_formed(name):
    for part in DATA_SETS[name].parts:
        for archive in part.archives:
            algorithm, _, digits = archive.checksum.partition(":")
            assert len(bytes.fromhex(digits)) == hashlib.new(algorithm).digest_size
            assert archive.size > 10**8
            assert archive.name in INSIDE


def test_checksums_of_voc_are_those_of_torchvision():
    theirs = {entry["filename"]: entry["md5"] for year, entry in DATASET_YEAR_DICT.items() if year != "2008"}
    for part in DATA_SETS["voc"].parts:
        for archive in part.archives:
            assert archive.checksum == f"md5:{theirs[archive.name]}"


@pytest.mark.parametrize("name", DATA_SETS)
def test_every_data_set_gets_its_layout(name, server, run):
    official = DATA_SETS[name]
    parts = tuple(
        replace(
            part,
            archives=tuple(server.archive(archive.name, tiny(archive.name)) for archive in part.archives),
            file_counts=dict.fromkeys(part.file_counts, 1),
        )
        for part in official.parts
    )
    said = run(replace(official, parts=parts), name=name)
    entries = [entry for archive in server.files for entry in INSIDE[archive] if not entry.endswith("/")]
    assert run.files() == set(entries)
    for entry in entries:
        assert (run.base / entry).read_bytes() == content(entry)
    root = run.base / official.root
    assert f"e3va check-data dataset={name} dataset.root={root}\n" in said
    assert f"e3va train dataset={name} dataset.root={root} backbone=swin_t backbone.pretrained=true" in said


# Download


def test_second_run_downloads_nothing(server, run, train2017):
    run(train2017)
    assert [entry[:2] for entry in server.log] == [("train2017.zip", None)]
    assert "e3va train" in run(train2017)
    assert len(server.log) == 1
    assert run.files() == UNPACKED


def test_archives_are_kept_on_request_and_used_again(server, run, train2017):
    run(train2017, "--keep-archives")
    assert run.files() == {*UNPACKED, "train2017.zip"}
    shutil.rmtree(run.base / "train2017")
    run(train2017)
    assert len(server.log) == 1
    assert run.files() == UNPACKED


def test_partial_file_is_continued(server, run, train2017):
    data = server.files["train2017.zip"]
    lay_partial(run, data[:1000], f'{len(data)} "one"')
    run(train2017)
    assert server.log == [("train2017.zip", "bytes=1000-", len(data) - 1000)]
    assert run.files() == UNPACKED


def test_interrupt_leaves_the_partial_file(server, run, train2017, monkeypatch):
    @contextmanager
    def interrupting(*_: object) -> Iterator[Callable[[int], None]]:
        def advance(_: int) -> None:
            raise KeyboardInterrupt

        yield advance

    monkeypatch.setattr(download, "CHUNK", 1000)
    with monkeypatch.context() as patch:
        patch.setattr(download, "progress_bar", interrupting)
        assert "run the same command again" in run(train2017, expect=130)
    got = (run.base / PARTIAL).stat().st_size
    assert 0 < got <= 1000
    run(train2017)
    assert server.log[1][1] == f"bytes={got}-"
    assert run.files() == UNPACKED


def test_interrupt_while_verifying_costs_no_download(server, run, train2017, monkeypatch):
    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(download, "digest", interrupted)
        run(train2017, expect=130)
    run(train2017)
    assert len(server.log) == 1
    assert run.files() == UNPACKED


def test_server_without_ranges_starts_again(server, run, train2017):
    server.ranges = False
    data = server.files["train2017.zip"]
    lay_partial(run, b"x" * 1000)
    run(train2017)
    assert server.log == [("train2017.zip", "bytes=1000-", len(data))]
    assert run.files() == UNPACKED


def test_changed_file_on_the_server_starts_again(server, run, train2017):
    data = server.files["train2017.zip"]
    lay_partial(run, b"x" * 1000, f'{len(data)} "zero"')
    run(train2017)
    assert [asked for _, asked, _ in server.log] == ["bytes=1000-", None]
    assert run.files() == UNPACKED


def test_partial_file_longer_than_the_servers_starts_again(server, run, train2017):
    lay_partial(run, b"x" * (archive_of(train2017).size + 1))
    run(train2017)
    assert [asked for _, asked, _ in server.log] == [None]  # the refused range is not in the log
    assert run.files() == UNPACKED


def test_broken_connection_is_taken_up_again(server, run, train2017, monkeypatch):
    monkeypatch.setattr(download, "PAUSES", (0,))
    server.cuts = [700, 500]  # more failures than pauses, but each has brought something
    run(train2017)
    size = archive_of(train2017).size
    assert [(asked, sent) for _, asked, sent in server.log] == [
        (None, 700),
        ("bytes=700-", 500),
        ("bytes=1200-", size - 1200),
    ]
    assert run.files() == UNPACKED


def test_retries_are_bounded(server, run, train2017):
    server.cuts = [700, 0, 0, 0, 0]
    assert f"the connection ended after 700 of {archive_of(train2017).size:,} bytes; check the network" in run(
        train2017, expect=2
    )
    assert len(server.log) == 1 + len(download.PAUSES)
    assert run.files() == {PARTIAL, f"{PARTIAL}.id"}


def test_busy_server_is_asked_again(server, run, train2017):
    server.errors = [503, 429]
    run(train2017)
    assert len(server.log) == 3
    assert run.files() == UNPACKED


def test_missing_file_is_one_line(server, run, train2017):
    del server.files["train2017.zip"]
    error = run(train2017, expect=2)
    assert f"{server.url('train2017.zip')}: HTTP Error 404: Not Found; if it has moved" in error
    assert len(server.log) == 1


def test_no_server_is_one_line(server, run, train2017):
    server.server_close()
    assert "refused; check the network" in run(train2017, expect=2)


@pytest.mark.parametrize("checksum", ["sha1:" + 40 * "0", "md5:" + 32 * "0"])
def test_wrong_checksum_is_put_aside(server, run, train2017, checksum):
    error = run(one_part(replace(archive_of(train2017), checksum=checksum)), expect=2)
    assert re.search(rf"its {checksum[:3]}\w* is [0-9a-f]+, expected 0+; moved to .*train2017.zip.bad", error)
    assert run.files() == {"train2017.zip.bad"}
    run(train2017)  # a new run is not led astray by what was bad
    assert run.files() == {"train2017.zip.bad", *UNPACKED}


def test_wrong_size_on_the_server_is_refused_before_the_download(server, run, train2017):
    error = run(one_part(replace(archive_of(train2017), size=12_345)), expect=2)
    assert f"has {archive_of(train2017).size:,} bytes on the server, expected 12,345" in error
    assert run.files() == set()


def test_bad_archive_of_the_user_is_put_aside(server, run, train2017):
    run.base.mkdir(parents=True)
    (run.base / "train2017.zip").write_bytes(b"not it")
    assert "has 6 bytes, expected" in run(train2017, expect=2)
    assert run.files() == {"train2017.zip.bad"}
    assert server.log == []


def test_size_and_checksum_may_be_unknown(server, run, train2017):
    run(one_part(replace(archive_of(train2017), size=None, checksum=None)))
    assert run.files() == UNPACKED


# Space


def let_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "total used free")(free, 0, free))


def test_no_space_for_the_download(server, run, train2017, monkeypatch):
    let_free(monkeypatch, 2 * archive_of(train2017).size - 1)
    assert re.search(r"train2017.zip .* needs \d\.\d\d GiB but \d\.\d\d GiB are free", run(train2017, expect=2))
    assert run.files() == set()
    let_free(monkeypatch, 2 * archive_of(train2017).size)
    run(train2017)


def test_no_space_for_unpacking(server, run, monkeypatch):
    data_set = one_part(server.archive("train2017.zip", zipped(*INSIDE["train2017.zip"], data=lambda _: bytes(10**6))))
    let_free(monkeypatch, 10**6)
    assert "unpacking train2017.zip needs 0.00 GiB" in run(data_set, expect=2)
    assert run.files() == {"train2017.zip"}


# Unpack


def tar_entry(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zip_link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


EVIL = {
    "zip_up": ("x.zip", lambda evil: zipped("train2017/a.jpg", "../evil")),
    "zip_up_inside": ("x.zip", lambda evil: zipped("train2017/a.jpg", "train2017/../../evil")),
    "zip_backslash": ("x.zip", lambda evil: zipped("train2017/a.jpg", "train2017\\..\\..\\evil")),
    "zip_absolute": ("x.zip", lambda evil: zipped("train2017/a.jpg", str(evil))),
    "zip_drive": ("x.zip", lambda evil: zipped("train2017/a.jpg", "C:evil")),
    "zip_link": ("x.zip", lambda evil: zipped("train2017/a.jpg", zip_link("train2017/evil"))),
    "tar_up": ("x.tar", lambda evil: tarred("train2017/a.jpg", "../evil")),
    "tar_absolute": ("x.tar", lambda evil: tarred("train2017/a.jpg", str(evil))),
    "tar_link": ("x.tar", lambda evil: tarred(tar_entry("train2017/evil", tarfile.SYMTYPE, "a.jpg"))),
    "tar_hard_link": ("x.tar", lambda evil: tarred(tar_entry("train2017/evil", tarfile.LNKTYPE, "../../secret"))),
    "tar_device": ("x.tar", lambda evil: tarred(tar_entry("train2017/evil", tarfile.CHRTYPE))),
    "tar_pipe": ("x.tar", lambda evil: tarred(tar_entry("train2017/evil", tarfile.FIFOTYPE))),
}


@pytest.mark.parametrize("case", EVIL)
def test_malicious_archive_is_refused(case, server, run, tmp_path):
    name, build = EVIL[case]
    (tmp_path / "secret").write_text("secret")
    data_set = one_part(server.archive(name, build(tmp_path / "evil")), holds={})
    error = run(data_set, expect=2)
    assert "evil" in error and "outside the archive's folder" in error
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.is_dir()} == {
        "secret",
        f"data/base/{name}",
    }


def test_bomb_is_refused(server, run, monkeypatch):
    data = zipped(*INSIDE["train2017.zip"], data=lambda _: bytes(10**6))
    data_set = one_part(server.archive("train2017.zip", data))
    monkeypatch.setattr(archives, "SMALL", 10**6)
    assert re.search(r"train2017.zip: 0.00 GiB would unpack to 0.00 GiB", run(data_set, expect=2))
    assert run.files() == {"train2017.zip"}


def test_sparse_file_counts_as_what_it_becomes(server, run):
    entry = tar_entry("train2017/a.jpg", tarfile.GNUTYPE_SPARSE)
    header = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    header[386:398] = header[483:495] = tarfile.itn(10 * 2**40, 12, tarfile.GNU_FORMAT)  # where its data ends; its size
    header[398:410] = tarfile.itn(0, 12, tarfile.GNU_FORMAT)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    error = run(one_part(server.archive("x.tar", bytes(header) + bytes(1024)), holds={}), expect=2)
    assert "0.00 GiB would unpack to 10,240.00 GiB" in error
    assert run.files() == {"x.tar"}


KINDS = {
    "stored.zip": zipfile.ZIP_STORED,
    "deflated.zip": zipfile.ZIP_DEFLATED,
    "bzip2.zip": zipfile.ZIP_BZIP2,
    "lzma.zip": zipfile.ZIP_LZMA,
    "plain.tar": "w",
    "gzip.tar": "w:gz",
    "bzip2.tar": "w:bz2",
    "xz.tar": "w:xz",
}


def packed(name: str) -> bytes:
    stream = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(stream, "w", KINDS[name]) as archive:
            for entry in ("train2017/a.jpg", "train2017/b.jpg"):
                archive.writestr(entry, content(entry))
    else:
        with tarfile.open(fileobj=stream, mode=KINDS[name]) as archive:
            for entry in ("train2017/a.jpg", "train2017/b.jpg"):
                info = tarfile.TarInfo(entry)
                info.size = len(content(entry))
                archive.addfile(info, io.BytesIO(content(entry)))
    return stream.getvalue()


PACKED = {name: packed(name) for name in KINDS}


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(list(KINDS)), st.data())
def test_changed_archive_is_unpacked_or_refused(name, data):
    """A few bytes changed, most of them where names and sizes stand."""
    archive = bytearray(PACKED[name])
    for _ in range(data.draw(st.integers(1, 3))):
        ends = st.one_of(st.integers(0, 200), st.integers(len(archive) - 200, len(archive) - 1))
        at = data.draw(st.one_of(ends, st.integers(0, len(archive) - 1)))
        archive[at] = data.draw(st.one_of(st.sampled_from(b"\0/.\\12\x7f\xff"), st.integers(0, 255)))
    with TemporaryDirectory() as folder:
        base = Path(folder) / "data/base"
        base.mkdir(parents=True)
        (base / name).write_bytes(archive)
        with contextlib.suppress(UserError, OSError):  # either becomes one line
            download.unpack(Part("train2017", (), {"*.jpg": 2}), [base / name], base)
        found = {str(path.relative_to(base)) for path in Path(folder).rglob("*") if not path.is_dir()}
        assert all(path == name or path.startswith("train2017/") for path in found)


def test_hard_link_within_a_tar_archive_is_a_file(server, run):
    link = tar_entry("train2017/b.jpg", tarfile.LNKTYPE, "train2017/a.jpg")
    run(one_part(server.archive("x.tar", tarred("train2017/a.jpg", link))))
    assert (run.base / "train2017/b.jpg").read_bytes() == content("train2017/a.jpg")


@pytest.mark.parametrize("name", ["train2017.zip", "VOCtest_06-Nov-2007.tar"])
def test_broken_archive_leaves_nothing_half_done(name, server, run):
    data = bytearray(tiny(name))
    if name.endswith(".zip"):
        data[len(data) // 4] ^= 1  # a wrong CRC
    else:
        del data[4000:]  # within a file
    folder = INSIDE[name][-1].split("/")[0]
    error = run(one_part(server.archive(name, bytes(data)), folder, {}), expect=2)
    assert "cannot be unpacked" in error and "delete it" in error
    assert run.files() == {name}
    assert not (run.base / folder).exists()


def test_archive_with_too_little_in_it_is_refused(server, run):
    data_set = one_part(server.archive("train2017.zip", zipped("train2017/a.jpg", "else/b.jpg")))
    assert "has 1 of 2 files *.jpg" in run(data_set, expect=2)
    assert run.files() == {"train2017.zip"}


def test_remains_of_a_killed_unpacking_are_removed(server, run, train2017):
    remains = run.base / ".train2017.unpacking" / "train2017" / "half.jpg"
    remains.parent.mkdir(parents=True)
    remains.touch()
    run(train2017)
    assert run.files() == UNPACKED


def test_folder_that_is_not_complete_is_left_alone(server, run, train2017):
    (run.base / "train2017").mkdir(parents=True)
    (run.base / "train2017" / "mine.jpg").touch()
    assert "train2017: has only 1 of 2 files *.jpg; move it away" in run(train2017, expect=2)
    assert run.files() == {"train2017/mine.jpg"}
    assert server.log == []


# The command


def test_folder_that_is_a_file_is_one_line(server, run, train2017):
    run.base.parent.mkdir()
    run.base.touch()
    assert f"{run.base}: " in run(train2017, expect=2)


def test_unusual_folder_is_quoted_for_the_shell_and_hydra(tmp_path):
    root = tmp_path / "my data, (new)"
    word = shlex.split(download.next_commands("coco", root))[3]
    assert OverridesParser.create().parse_override(word).value() == str(root)


def test_help_and_bad_words():
    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, download.__file__, *words], capture_output=True, text=True)

    done = call("--help")
    assert done.returncode == 0 and "COCO 2017: 19.0 GiB" in done.stdout
    done = call("imagenet")
    assert done.returncode == 2 and "'coco', 'voc', 'ade20k'" in done.stderr
