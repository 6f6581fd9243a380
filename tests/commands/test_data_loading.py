"""Loader processes: what ends them is one line, and no run waits for one that can give nothing any more."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from hydra import initialize_config_module

from e3va_cli.commands import data_loading as loading
from e3va_cli.commands import error_handling as failures
from e3va_cli.config.composition import CONFIG_MODULE
from e3va_cli.data import DenseDataModule
from e3va_cli.data.collate import collate
from e3va_cli.errors import UserError
from tests.components import loader_options
from tests.conftest import QUICK

PATIENCE_S = 100  # after which a test would rather fail than wait for ever
NO_SPACE = "unable to allocate shared memory(shm) for file </torch_7>: No space left on device (28)"


class Images:
    """Eight empty images; what it does with each is up to the test."""

    def __init__(self, act=lambda: None):
        self.act = act

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((3, 32, 32), index, dtype=torch.uint8), {"image_id": index, "extra": self.act()}


class Unsendable:
    def __reduce__(self):
        raise OSError(errno.EMFILE, "Too many open files")


def batches(dataset, workers=2):
    data = DenseDataModule(None, dataset, loader_options(2, 2, workers), seed=0)
    loader = data.val_dataloader()
    loader.timeout = PATIENCE_S if workers else 0
    return list(loader)


def line(dataset, folder):
    """The line that a run ends with."""
    with pytest.raises(UserError) as refused, failures.friendly_errors(folder, failures.evaluation_oom_message):
        batches(dataset)
    (message,) = refused.value.messages
    assert "\n" not in message
    return message


def names_the_remedies(message):
    return "shared memory" in message and "--shm-size" in message and "data.num_workers=0" in message


def test_processes_give_what_this_one_does():
    ours, theirs = batches(Images(), workers=0), batches(Images())
    assert [batch.images.flatten().tolist() for batch in ours] == [batch.images.flatten().tolist() for batch in theirs]
    assert all(batch.images.is_shared() for batch in theirs)


def test_batches_without_objects_can_be_shared():
    batch = collate([(torch.zeros(3, 9, 9, dtype=torch.uint8), {"boxes": torch.zeros(0, 4), "image_id": 3})])
    batch.share_memory()
    assert batch.images.is_shared() and batch.targets[0]["boxes"].shape == (0, 4)


def test_shared_memory_that_does_not_suffice(monkeypatch, tmp_path):
    def share_memory_(tensor):
        raise RuntimeError(NO_SPACE)

    monkeypatch.setattr(torch.Tensor, "share_memory_", share_memory_)  # in the processes too, which are forked
    assert names_the_remedies(line(Images(), tmp_path))


def test_where_the_system_ends_a_process_for_it(tmp_path):
    assert names_the_remedies(line(Images(lambda: os.kill(os.getpid(), signal.SIGBUS)), tmp_path))


def test_a_process_that_the_system_ends_for_memory(tmp_path):
    message = line(Images(lambda: os.kill(os.getpid(), signal.SIGKILL)), tmp_path)
    assert "out of memory" in message.lower() and "data.num_workers" in message


def test_a_batch_that_cannot_be_handed_over(tmp_path, capfd):
    assert "data.num_workers" in line(Images(Unsendable), tmp_path)
    assert "worker cannot send a batch: [Errno 24] Too many open files" in capfd.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOENT, errno.EACCES, errno.ENOSYS])
def test_a_system_without_shared_memory(monkeypatch, tmp_path, number):
    def semlock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(multiprocessing.synchronize._multiprocessing, "SemLock", semlock)
    message = line(Images(), tmp_path)
    assert names_the_remedies(message) and os.strerror(number) in message


def test_processes_that_cannot_be_started(monkeypatch, tmp_path):
    def fork():
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    assert "cannot be started ([Errno 11] Resource temporarily unavailable)" in line(Images(), tmp_path)


def test_too_many_open_files():
    told = RuntimeError("Too many open files. Communication with the workers is no longer possible. Please")
    assert "ulimit -n" in loading.loading_failure(told)
    assert "ulimit -n" in loading.loading_failure(RuntimeError("received 0 items of ancdata"))
    assert loading.loading_failure(OSError(errno.EMFILE, "Too many open files", "a.png")) is None


def test_processes_leave_ctrl_c_to_the_run():
    found = batches(Images(lambda: signal.getsignal(signal.SIGINT)))
    assert all(target["extra"] == signal.SIG_IGN for batch in found for target in batch.targets)


Space = namedtuple("Space", ["f_bavail", "f_frsize"])


@pytest.mark.parametrize(
    ("words", "evaluates", "needed"),
    [
        # 2 processes hold 2 batches each, and the run one more, of 2 images of 128 x 128 with 20 masks
        (["data.batch_size=2"], False, 5 * 2 * 128 * 128 * (3 + 20)),
        (["data.batch_size=2", "head=retinanet"], False, 5 * 2 * 128 * 128 * 3),
        (["data.val_batch_size=4"], True, 5 * 4 * 128 * 128 * 3),
    ],
)
def test_a_warning_before_the_first_step(config, monkeypatch, tmp_path, words, evaluates, needed):
    options = config("dataset=shapes", "data.num_workers=2", *words)
    monkeypatch.setattr(loading, "SHARED_MEMORY", tmp_path)

    def note(free):
        monkeypatch.setattr(loading.os, "statvfs", lambda _: Space(free, 1))
        with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
            return loading.shared_memory_note(options, evaluates=evaluates)

    assert note(needed) is None
    assert "--shm-size" in note(needed - 1) and f"{needed / 2**20:,.0f} MiB" in note(needed - 1)
    options.data.num_workers = 0
    assert note(0) is None


@pytest.mark.slow
@pytest.mark.parametrize("options", ["size=300k", "ro"])
def test_a_small_dev_shm(tmp_path, options):
    """A real one, which takes the right to mount: then a run ends by itself, and says why."""
    mount = f"mount -t tmpfs -o {options} tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    words = ["dataset.train_images=32", "data.num_workers=2", "data.batch_size=4", *QUICK[1:2], *QUICK[3:]]
    command = f'{mount}; exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command, "sh", sys.executable, "-m", "e3va_cli", "train", *words],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert names_the_remedies(done.stderr) and done.stderr.count("e3va: error: ") == 1
