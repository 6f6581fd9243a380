"""Files that cannot be written: one line, the old file whole, nothing half written."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from e3va_cli.errors import UserError
from e3va_cli.training.checkpoints import AtomicCheckpointIO
from e3va_cli.utils.files import UnwritableError, atomic_append, atomic_write, make_subfolder, write_json

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def one_line(refused: pytest.ExceptionInfo[UserError]) -> str:
    (message,) = refused.value.messages
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free space on that disk"),
        (errno.EDQUOT, "free space within your quota"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EACCES, "make its folder writable"),
        (errno.EROFS, "make its folder writable"),
    ],
)
def test_what_is_said_and_what_is_left(tmp_path, number, remedy):
    path = tmp_path / "metrics.json"
    write_json(path, {"AP": 1})
    before = path.read_bytes()
    with pytest.raises(UnwritableError) as refused, atomic_write(path) as temporary:
        temporary.write_text("half")
        raise OSError(number, os.strerror(number))
    line = one_line(refused)
    assert line.startswith(f"{path}: cannot be written: {os.strerror(number)}") and remedy in line
    assert path.read_bytes() == before and [one.name for one in tmp_path.iterdir()] == ["metrics.json"]


def test_a_folder_that_was_deleted_is_not_made_again(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.rmtree(folder)
    for write in (
        lambda: write_json(folder / "metrics.json", {}),
        lambda: make_subfolder(folder / "checkpoints"),
        lambda: AtomicCheckpointIO().save_checkpoint({}, folder / "checkpoints" / "last.ckpt"),
    ):
        with pytest.raises(UnwritableError) as refused:
            write()
        assert f"{folder} was deleted or moved" in one_line(refused)
    assert not folder.exists()


def test_errors_of_other_files_are_not_taken_for_it(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a") as temporary:
        temporary.touch()
        Path(tmp_path / "data" / "image.png").read_bytes()
    assert not list(tmp_path.iterdir())


def test_what_was_appended_is_cut_off_again(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step\n")
    with pytest.raises(UnwritableError), atomic_append(path) as file:
        file.write("1,")
        file.flush()
        raise FULL
    assert path.read_text() == "epoch,step\n"


def test_a_checkpoint_on_a_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": torch.ones(1)}, path)

    def save(content, file):
        file.write(b"half")
        try:
            raise FULL
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598")  # noqa: B904

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(UnwritableError) as refused:
        AtomicCheckpointIO().save_checkpoint({}, path)
    assert f"{path}: cannot be written: No space left on device; the previous file is unchanged" in one_line(refused)
    assert torch.load(path, weights_only=True) == {"step": torch.ones(1)} and len(list(path.parent.iterdir())) == 1
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("a tensor without data")))
    with pytest.raises(RuntimeError, match="without data"):
        AtomicCheckpointIO().save_checkpoint({}, path)
