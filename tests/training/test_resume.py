"""A run that ends anywhere goes on exactly: it comes, bit for bit, to what a run comes to that was never stopped."""

import json
import os
import resource
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from e3va_cli.errors import UserError
from e3va_cli.training.graceful_shutdown import RunStopped
from e3va_cli.training.history import MetricsHistory
from e3va_cli.training.run import build_run
from tests.training.small import SMALL, last, rows

# Two epochs of four steps, each followed by an evaluation of two batches.
RUN = [*SMALL, "trainer.max_epochs=2", "schedule=cosine", "schedule.warmup_steps=3"]


class KilledError(Exception):
    """Stands for kill -9: nothing is written once it is raised."""


class At(Callback):
    """Does something at a batch of training or evaluation, counted over the whole run of the process."""

    def __init__(self, act, *, train=None, val=None):
        self.act, self.train, self.val = act, train, val
        self.trained = self.evaluated = 0

    def on_train_batch_start(self, *_):
        self.trained += 1
        if self.trained == self.train:
            self.act()

    def on_validation_batch_start(self, *_):
        self.evaluated += 1
        if self.evaluated == self.val:
            self.act()


def kill():
    raise KilledError


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def start(config, monkeypatch):
    def start(folder, *words, callbacks=(), resume=False):
        run = build_run(config(*RUN, *words), folder)
        run.trainer.callbacks[:0] = callbacks
        path = last(folder) if resume else None
        if resume:
            for logger in run.trainer.loggers:
                logger.drop_from(torch.load(path, weights_only=True)["global_step"])
        with monkeypatch.context() as patch:
            if callbacks and callbacks[0].act is kill:
                patch.setattr(MetricsHistory, "finalize", lambda *_: None)  # which kill -9 leaves no time for
            run.trainer.fit(run.lightning_module, run.data, ckpt_path=path, weights_only=True)
        return run

    return start


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Folders of runs that were never stopped, by their words."""
    return {}


@pytest.fixture
def reference(straight, start, tmp_path_factory):
    def reference(*words):
        if words not in straight:
            straight[words] = tmp_path_factory.mktemp("straight")
            start(straight[words], *words)
        return straight[words]

    return reference


def assert_same_run(folder: Path, expected: Path) -> None:
    ours, theirs = (torch.load(last(f), weights_only=True) for f in (folder, expected))
    assert ours["global_step"] == theirs["global_step"]
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0, msg=part)
    history, wanted = (
        [{k: v for k, v in row.items() if not k.startswith("resources/")} for row in rows(f)]
        for f in (folder, expected)
    )
    assert history == wanted
    assert json.loads((folder / "metrics.json").read_text()) == json.loads((expected / "metrics.json").read_text())


EVERY_TWO = ["trainer.checkpoint_every_steps=2"]
SAMPLING = ["head=mask_rcnn_nano", "dataset.image_size=96"]  # draws proposals at random in every step
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"train": 4}, EVERY_TWO),
        ({"val": 2}, EVERY_TWO),
        pytest.param({"train": 5}, EVERY_TWO, marks=slow),
        ({"train": 4}, [*EVERY_TWO, "data.num_workers=2"]),
        pytest.param({"train": 1}, EVERY_TWO, marks=slow),
        pytest.param({"val": 1}, EVERY_TWO, marks=slow),
        pytest.param({"val": 4}, EVERY_TWO, marks=slow),
        pytest.param({"train": 8}, [*EVERY_TWO, *SAMPLING], marks=slow),
        pytest.param({"train": 8}, [*EVERY_TWO, "data.num_workers=2", "schedule=multistep"], marks=slow),
    ],
)
def test_a_killed_run_goes_on_exactly(start, reference, tmp_path, where, words):
    with pytest.raises(KilledError):
        start(tmp_path, *words, callbacks=[At(kill, **where)])
    start(tmp_path, *words, resume=True)
    assert_same_run(tmp_path, reference(*(word for word in words if "num_workers" not in word)))


def test_an_evaluation_killed_three_times_is_repeated(start, reference, tmp_path):
    for resume, batch in ((False, 2), (True, 1), (True, 2)):
        with pytest.raises(KilledError):
            start(tmp_path, *EVERY_TWO, callbacks=[At(kill, val=batch)], resume=resume)
    start(tmp_path, *EVERY_TWO, resume=True)
    assert_same_run(tmp_path, reference(*EVERY_TWO))


@pytest.mark.parametrize(
    ("where", "step"),
    [
        ({"train": 3}, 3),
        ({"val": 1}, 4),
        pytest.param({"train": 4}, 4, marks=slow),
        pytest.param({"train": 6}, 6, marks=slow),
    ],
)
def test_a_run_stopped_by_a_signal_loses_no_step(start, reference, tmp_path, capsys, where, step):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunStopped) as stopped:
        start(tmp_path, callbacks=[At(terminate, **where)])
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    assert torch.load(last(tmp_path), weights_only=True)["global_step"] == step
    assert [int(row["step"]) for row in rows(tmp_path)] == list(range(step))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"after step {step}" in line and f"e3va train resume={tmp_path}" in line
    start(tmp_path, resume=True)
    assert_same_run(tmp_path, reference(*EVERY_TWO))


@pytest.mark.parametrize(("before", "ignored"), [(signal.SIG_DFL, False), (signal.SIG_IGN, True)])
def test_a_closed_terminal_stops_a_run_that_nohup_does_not_guard(start, tmp_path, capsys, before, ignored):
    usual = signal.signal(signal.SIGHUP, before)
    hang_up = At(lambda: os.kill(os.getpid(), signal.SIGHUP), train=3)
    try:
        with nullcontext() if ignored else pytest.raises(RunStopped, match="129"):
            start(tmp_path, "trainer.max_epochs=1", callbacks=[hang_up])
        assert signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, usual)
    assert torch.load(last(tmp_path), weights_only=True)["global_step"] == (4 if ignored else 3)
    assert ("stopped by SIGHUP after step 3" in capsys.readouterr().err) != ignored


def test_a_run_ended_within_an_epoch_goes_on_there(start, reference, tmp_path):
    constant = ["schedule=multistep"]  # a cosine would fall over another number of steps
    start(tmp_path, *constant, "trainer.max_steps=3")
    start(tmp_path, *constant, "trainer.max_steps=3", resume=True)  # nothing is left to do
    assert torch.load(last(tmp_path), weights_only=True)["global_step"] == 3
    for further in (["trainer.max_steps=4"], ["trainer.max_steps=6"], []):  # to the end of an epoch, and within one
        start(tmp_path, *constant, *further, resume=True)
    assert_same_run(tmp_path, reference(*constant))


def test_accumulated_gradients_are_never_cut(start, reference, tmp_path):
    words = ["data.batch_size=1", "trainer.accumulate_grad_batches=3", "trainer.checkpoint_every_steps=1"]
    with pytest.raises(RunStopped):
        start(tmp_path, *words, callbacks=[At(terminate, train=4)])
    assert torch.load(last(tmp_path), weights_only=True)["global_step"] == 2, "the step was done to its end"
    with pytest.raises(KilledError):
        start(tmp_path, *words, callbacks=[At(kill, train=3)], resume=True)
    start(tmp_path, *words, resume=True)
    assert_same_run(tmp_path, reference(*words))


def test_resources_cover_all_starts(start, tmp_path):
    words = ["dataset.train_images=32", "trainer.max_epochs=1", "trainer.checkpoint_every_steps=8"]
    with pytest.raises(KilledError):
        start(tmp_path, *words, callbacks=[At(kill, train=11)])
    before = torch.load(last(tmp_path), weights_only=True)["callbacks"]["Resources"]
    start(tmp_path, *words, resume=True)
    resources = json.loads((tmp_path / "resources.json").read_text())
    assert resources["starts"] == 2
    assert resources["steps_measured"] == 3 + 3, "of 8 steps of each start the first 5 are not counted"
    assert resources["measured_time_s"] > sum(before["step_times"].tolist()) > 0
    assert resources["process_peak_rss_mib"] >= before["peaks"][2] > 100


def test_a_full_disk_leaves_the_state_from_before(start, tmp_path):
    """The system refuses to write more than a megabyte into a file, as a full disk would, from the second step on."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, unlimited[1]))

    words = ["trainer.checkpoint_every_steps=1"]
    try:
        with pytest.raises(UserError, match=r"last\.ckpt: cannot be written: File too large"):
            start(tmp_path, *words, callbacks=[At(fill, train=3)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert torch.load(last(tmp_path), weights_only=True)["global_step"] == 2
    assert [path.name for path in last(tmp_path).parent.iterdir()] == ["last.ckpt"]


@slow
def test_another_batch_size_within_an_epoch(start, tmp_path):
    """The epoch is cut short or goes on; nothing fails, and the next one is whole."""
    with pytest.raises(RunStopped):
        start(tmp_path, callbacks=[At(terminate, train=3)])
    start(tmp_path, "data.batch_size=4", resume=True)
    assert torch.load(last(tmp_path), weights_only=True)["global_step"] == 5
