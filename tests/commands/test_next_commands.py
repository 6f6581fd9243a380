"""What commands print as next commands is pasted from real runs in an empty folder, and works."""

import re
import shlex
import shutil

import pytest
import torch

from tests.training.small import SMALL, last, rows


def printed_next(done):
    """The commands below "Next"."""
    listed = done.stdout.partition("\nNext")[2].partition("\n")[2]
    commands = [shlex.split(line) for line in listed.splitlines() if line.startswith("  e3va ")]
    assert commands, done.stdout
    return {words[1]: words[1:] for words in commands}


def steps(run):
    return torch.load(last(run), weights_only=True)["global_step"]


@pytest.fixture
def images(short_run, tmp_path):
    """What the placeholder stands for."""
    (tmp_path / "IMAGES").mkdir()
    shutil.copy(short_run / "predictions.png", tmp_path / "IMAGES" / "photo.png")


def test_a_run_that_max_steps_ended_goes_on(e3va, tmp_path):
    folder = tmp_path / "my run"
    done = e3va("train", *SMALL, "trainer.max_steps=1", f"hydra.run.dir='{folder}'")
    assert "best.ckpt" not in done.stdout and not (folder / "checkpoints" / "best.ckpt").exists()
    assert "1 step of 2 images: 0.25 epochs of 4 steps" in done.stdout and "1 steps" not in done.stdout
    again = e3va(*printed_next(done)["train"])
    assert steps(folder) == 2 and "after 1 step\n" in again.stdout
    assert not re.search(r"\b1 (steps|epochs|images|classes)\b", done.stdout + again.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["trainer.max_epochs=1"], ["trainer.max_steps=2", "trainer.limit_val_batches=0"]])
def test_every_printed_command_works(e3va, images, tmp_path, words):
    folder = tmp_path / "my run"
    done = e3va("train", *SMALL, *words, f"hydra.run.dir='{folder}'")
    assert ("best.ckpt" in done.stdout) == (folder / "checkpoints" / "best.ckpt").exists()
    commands = printed_next(done)
    assert list(commands) == ["evaluate", "predict", "export-adapter", "train"]
    assert "AP of each class" in e3va(*commands["evaluate"]).stdout
    assert "1 image: " in e3va(*commands["predict"]).stdout
    exported = e3va(*commands["export-adapter"])
    assert (tmp_path / "ADAPTER" / "adapter_config.json").is_file()
    for command in printed_next(exported).values():
        e3va(*command)
    before = steps(folder)
    again = e3va(*commands["train"])
    assert steps(folder) == 2 * before
    complete = e3va("train", f"resume='{folder}'")
    assert "Training is complete after" in complete.stdout
    e3va(*printed_next(again)["train"])
    assert steps(folder) == 4 * before


@pytest.mark.slow
def test_a_run_that_stopped_early_goes_on(e3va, tmp_path):
    words = ["trainer.early_stopping_patience=1", "optimizer.lr=1e-12", "trainer.max_epochs=5"]
    done = e3va("train", *SMALL, *words, "hydra.run.dir=run")
    before = steps(tmp_path / "run")
    assert before < 20
    e3va(*printed_next(done)["train"])
    assert steps(tmp_path / "run") == 20


@pytest.mark.slow
def test_a_run_of_so_many_iterations_goes_on(e3va, tmp_path):
    words = [word for word in SMALL if not word.startswith("trainer.max_epochs")]
    done = e3va(
        "train", *words, "schedule=poly", "schedule.iterations=4", "schedule.total_batch=2", "hydra.run.dir=run"
    )
    before = steps(tmp_path / "run")
    e3va(*printed_next(done)["train"])
    assert steps(tmp_path / "run") == 2 * before


def test_a_refused_resume_changes_nothing(e3va, short_run, tmp_path):
    run = shutil.copytree(short_run, tmp_path / "run")
    (run / ".lock").unlink()
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    e3va("train", f"resume={run}", "adapter.rank=8", expect=2)
    assert {path: path.read_bytes() for path in kept} == kept


def test_a_pipe_gets_a_line_an_epoch(e3va, tmp_path):
    done = e3va("train", *SMALL, "trainer.max_epochs=2", "hydra.run.dir=run")
    assert "\r" not in done.stdout and "\x1b" not in done.stdout
    epochs = [line for line in done.stdout.splitlines() if line.startswith("Epoch")]
    assert [line.partition(":")[0] for line in epochs] == ["Epoch 1/2", "Epoch 2/2"]
    assert all(re.search(r"memory [\d,]+ MiB$", line) for line in epochs) and "MiB (2^20 bytes)" in done.stdout
    assert {row["epoch"] for row in rows(tmp_path / "run") if row["epoch"]} == {"1", "2"}
