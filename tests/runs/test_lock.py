"""One process at a time writes to a run folder."""

import errno
import fcntl
import os
import socket
import subprocess
import sys

import pytest

from e3va_cli.errors import UserError
from e3va_cli.runs.folder import remove_empty_run
from e3va_cli.runs.lock import lock_folder
from tests.training.small import SMALL

HOLD = """
import os, pathlib, sys, time
from e3va_cli.runs.lock import lock_folder
lock_folder(pathlib.Path(sys.argv[1]))
if os.fork():
    print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of a folder, and a process of its own that outlives it, as loaders may."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    os.killpg(process.pid, 9)
    process.wait()
    process.stdout.close()


def test_a_folder_has_one_writer_until_that_is_dead(tmp_path, holder):
    says = f"{tmp_path}: process {holder.pid} on {socket.gethostname()} is writing to this run"
    for _ in range(2):
        with pytest.raises(UserError) as refused:
            lock_folder(tmp_path)
        assert says in str(refused.value)
    os.kill(holder.pid, 9)
    holder.wait()
    lock_folder(tmp_path)
    lock_folder(tmp_path)
    assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_a_second_writer_leaves_the_folder_as_it_is(tmp_path, holder, e3va):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text("- seed=3\n")
    words = ["train", f"resume={tmp_path}", *SMALL, "trainer.max_steps=1"]
    (line,) = e3va(*words, expect=2).stderr.splitlines()
    assert line.startswith("e3va: error: ") and f"process {holder.pid} on " in line
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hydra", ".lock"]
    assert (tmp_path / ".hydra" / "overrides.yaml").read_text() == "- seed=3\n"
    assert "max_steps: 1" in e3va(*words, "--cfg", "job").stdout, "looking writes nothing"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys, number):
    def lockf(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    lock_folder(tmp_path)
    assert f"e3va: note: {tmp_path}: no locks on this file system" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(UserError, match="gone: cannot be written: No such file"):
        lock_folder(tmp_path / "gone")


def test_a_refused_run_leaves_no_folder(tmp_path):
    folder = tmp_path / "run"
    (folder / ".hydra").mkdir(parents=True)
    lock_folder(folder)
    remove_empty_run(folder)
    assert not folder.exists()
