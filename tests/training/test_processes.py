"""Several processes of one run, and the whole command under signals; each starts processes, so nearly all are slow."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from e3va_cli.config.composition import validate_overrides
from e3va_cli.errors import UserError
from e3va_cli.training.run import build_run
from tests.training.small import SMALL, last, rows

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
TWO = ["trainer.devices=2", "trainer.strategy=ddp"]
LONG = [*SMALL, "dataset.train_images=40", "data.batch_size=1", "trainer.max_epochs=2"]

# `e3va` with a network that goes wrong on the second process: SPOIL is what becomes of its losses at its third batch.
SPOILT = """
import itertools, os, sys, time, torch
from e3va_cli.cli import main
from e3va_cli.models.model import DenseModel
losses, count = DenseModel.losses, itertools.count(1)
def spoilt(self, *args):
    found = losses(self, *args)
    if os.environ.get("LOCAL_RANK") == "1" and next(count) == 3:
        SPOIL
    return found
DenseModel.losses = spoilt
main()
"""


class Process:
    """`e3va WORDS` in a process group of its own."""

    def __init__(self, folder: Path, *words: str, script: Path | None = None):
        self.folder, self.errors = folder, folder.with_suffix(".err")
        program = [str(script)] if script else ["-m", "e3va_cli"]
        self.popen = subprocess.Popen(
            [sys.executable, *program, "train", *words, f"hydra.run.dir={folder}"],
            env=ENVIRONMENT,
            stdout=folder.with_suffix(".out").open("a"),
            stderr=self.errors.open("a"),
            start_new_session=True,
        )

    def wait_for(self, steps: int) -> None:
        """Until the history has so many rows."""
        end = time.monotonic() + 300
        while not (self.folder / "metrics.csv").is_file() or len(rows(self.folder)) < steps:
            assert self.popen.poll() is None and time.monotonic() < end, self.errors.read_text()
            time.sleep(0.05)

    def child(self) -> int:
        """The process that the first one has started."""
        (number,) = subprocess.check_output(["pgrep", "-P", str(self.popen.pid)], text=True).split()
        return int(number)

    def end(self) -> tuple[int, list[str]]:
        """Exit code, and the lines of standard error that are ours; no process may be left."""
        code = self.popen.wait(300)
        end = time.monotonic() + 60
        while subprocess.run(["pgrep", "-g", str(self.popen.pid)], capture_output=True).returncode == 0:
            assert time.monotonic() < end, "a process has outlived the run"
            time.sleep(0.2)
        text = self.errors.read_text()
        assert "Traceback" not in text, text
        return code, [line for line in text.splitlines() if line.startswith("e3va: ")]


def assert_equal(ours: Path, theirs: Path) -> None:
    for part in ("global_step", "state_dict", "optimizer_states"):
        found, expected = (torch.load(last(folder), weights_only=True)[part] for folder in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "name"),
    [
        (signal.SIGTERM, 143, "SIGTERM"),
        (signal.SIGINT, 130, "Ctrl-C"),
        (signal.SIGUSR1, 138, "SIGUSR1"),
        (signal.SIGHUP, 129, "SIGHUP"),
    ],
)
def test_a_signal_ends_the_command_with_its_code(tmp_path, number, code, name):
    process = Process(tmp_path / "run", *LONG)
    process.wait_for(4)
    process.popen.send_signal(number)
    found, (line,) = process.end()
    assert found == code and f"stopped by {name} after step" in line
    assert line.endswith(f"resume with: e3va train resume={tmp_path}/run")
    assert Process(tmp_path / "run", f"resume={tmp_path}/run").end()[0] == 0
    assert [int(row["step"]) for row in rows(tmp_path / "run")] == list(range(80))


@pytest.mark.slow
def test_a_terminal_that_closes_loses_no_step(tmp_path):
    folder = tmp_path / "run"
    child, terminal = pty.fork()  # the child leads a session of the new terminal, as a shell's window does
    if child == 0:
        words = [*LONG, "data.num_workers=1", f"hydra.run.dir={folder}"]
        os.execve(sys.executable, [sys.executable, "-m", "e3va_cli", "train", *words], ENVIRONMENT)
    end = time.monotonic() + 300
    while not (folder / "metrics.csv").is_file() or len(rows(folder)) < 4:
        assert time.monotonic() < end
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 65536)
    known = len(rows(folder))
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 129
    steps = torch.load(last(folder), weights_only=True)["global_step"]
    assert steps >= known and [int(row["step"]) for row in rows(folder)] == list(range(steps))


@pytest.mark.slow
def test_a_run_without_a_checkpoint_starts_from_its_beginning(tmp_path):
    words = [*SMALL, "trainer.limit_val_batches=0"]
    process = Process(tmp_path / "run", *words)
    process.wait_for(2)
    process.popen.kill()
    process.end()
    last(tmp_path / "run").unlink()
    assert Process(tmp_path / "run", f"resume={tmp_path}/run").end() == (0, [])
    assert [int(row["step"]) for row in rows(tmp_path / "run")] == list(range(4))


@pytest.mark.slow
def test_a_second_ctrl_c_ends_it_at_once(tmp_path):
    script = tmp_path / "spoilt.py"
    script.write_text(
        SPOILT.replace('os.environ.get("LOCAL_RANK") == "1" and ', "").replace("SPOIL", "time.sleep(600)")
    )
    process = Process(tmp_path / "run", *LONG, script=script)
    process.wait_for(1)
    for _ in range(2):
        time.sleep(1)
        process.popen.send_signal(signal.SIGINT)
    assert process.end()[0] == -signal.SIGINT, "which a shell shows as 130"


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of two processes that was never stopped."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert Process(folder, *LONG, *TWO).end() == (0, [])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["first", "second", "all"])
def test_all_processes_stop_after_the_same_step(tmp_path, straight, whom):
    process = Process(tmp_path / "run", *LONG, *TWO)
    process.wait_for(4)
    if whom == "all":
        os.killpg(process.popen.pid, signal.SIGTERM)
    else:
        os.kill(process.popen.pid if whom == "first" else process.child(), signal.SIGTERM)
    code, (line,) = process.end()
    assert code == 143 and "after step" in line
    assert Process(tmp_path / "run", f"resume={tmp_path}/run").end()[0] == 0
    assert_equal(tmp_path / "run", straight)


@pytest.mark.slow
def test_where_a_process_dies_the_others_end_with_a_message(tmp_path):
    process = Process(tmp_path / "run", *LONG, *TWO)
    process.wait_for(4)
    os.kill(process.child(), signal.SIGKILL)
    code, (line,) = process.end()
    assert code in (1, -signal.SIGKILL) and "code -9" in line


@pytest.mark.slow
def test_where_the_first_process_dies_the_others_end_with_a_message(tmp_path):
    process = Process(tmp_path / "run", *LONG, *TWO)
    process.wait_for(4)
    process.popen.kill()
    _, (line,) = process.end()
    assert "the first process has ended" in line


@pytest.mark.slow
def test_a_process_that_dies_while_the_first_is_busy(tmp_path):
    """The first one waits for nothing and so learns nothing: it is ended from outside, but not without a word."""
    script = tmp_path / "spoilt.py"
    script.write_text(SPOILT.replace('== "1"', '!= "1"').replace("SPOIL", "time.sleep(600)") + "\n")
    process = Process(tmp_path / "run", *LONG, *TWO, script=script)
    process.wait_for(1)
    os.kill(process.child(), signal.SIGKILL)
    code, (line,) = process.end()
    assert code == -signal.SIGKILL and "terminated with code -9" in line


@pytest.mark.slow
def test_a_loss_of_one_process_that_is_not_finite_is_left_out_by_all(tmp_path):
    script = tmp_path / "spoilt.py"
    script.write_text(SPOILT.replace("SPOIL", "return {k: v * torch.nan for k, v in found.items()}"))
    words = [*SMALL, "data.batch_size=1", *TWO, "trainer.limit_val_batches=0"]
    code, (line,) = Process(tmp_path / "run", *words, script=script).end()
    assert code == 0 and "step 2" in line and "skipped" in line
    (entry,) = json.loads((tmp_path / "run" / "skipped_steps.json").read_text())
    assert entry["losses"]["loss"] == "nan" and len(entry["image_ids"]) == 1
    assert all(value.isfinite().all() for value in torch.load(last(tmp_path / "run"))["state_dict"].values())
    script.write_text(
        SPOILT.replace("next(count) == 3", "next(count) >= 3").replace(
            "SPOIL", "return {k: v * torch.nan for k, v in found.items()}"
        )
    )
    code, lines = Process(tmp_path / "other", *words, "trainer.max_nonfinite_steps=2", script=script).end()
    assert code == 2 and len(lines) == 2 and "2 skipped steps in a row" in lines[1]


@pytest.mark.slow
def test_three_processes_and_shares_of_unequal_size_give_the_run_of_one(config, tmp_path):
    """Ten images to train on leave one over in each epoch; five to evaluate are shares of 2, 2 and 1."""
    words = [*SMALL, "dataset.train_images=10", "dataset.val_images=5", "data.batch_size=1", "dataset.flip=0"]
    words.append("trainer.limit_train_batches=9")
    three = Process(tmp_path / "three", *words, "trainer.devices=3", "trainer.strategy=ddp")
    assert three.end() == (0, [])
    one = build_run(config(*words, "trainer.accumulate_grad_batches=3"), tmp_path / "one")
    start = {name: value.clone() for name, value in one.lightning_module.state_dict().items()}
    one.trainer.fit(one.lightning_module, one.data)
    ours, theirs = (torch.load(last(tmp_path / name), weights_only=True) for name in ("three", "one"))
    assert ours["global_step"] == theirs["global_step"] == 3
    moved = sum((theirs["state_dict"][name] - start[name]).abs().sum() for name in theirs["state_dict"])
    apart = sum((theirs["state_dict"][name] - ours["state_dict"][name]).abs().sum() for name in theirs["state_dict"])
    assert moved > 1 and apart < 1e-3 * moved
    results = [json.loads((tmp_path / name / "metrics.json").read_text())["box"] for name in ("three", "one")]
    assert results[0]["AP50"] == pytest.approx(results[1]["AP50"], abs=1e-3)
    assert results[0]["per_class"].keys() == results[1]["per_class"].keys()


@pytest.mark.parametrize(("train", "val", "which"), [(1, 4, "train"), (4, 1, "val")])
def test_fewer_images_than_devices_are_refused(config, tmp_path, monkeypatch, train, val, which):
    from e3va_cli.errors import UserError
    from e3va_cli.training import run

    build = run.build_trainer

    def on_two(*args, **options):
        trainer = build(*args, **options)
        monkeypatch.setattr(type(trainer), "world_size", 2)
        return trainer

    monkeypatch.setattr(run, "build_trainer", on_two)
    words = [f"dataset.train_images={train}", f"dataset.val_images={val}"]
    with pytest.raises(UserError, match=f"trainer.devices: 2 .* 1 {which}"):
        build_run(config(*SMALL, *words), tmp_path)


def test_the_name_of_the_preemption_signal_is_checked(config):
    with pytest.raises(UserError, match=r"trainer\.preemption_signal=USR1: the name of a signal"):
        validate_overrides("train", ["trainer.preemption_signal=USR1"])
