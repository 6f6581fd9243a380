"""The kill trials notice every difference, and three of them run."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts import kill_trials

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ended(tmp_path):
    """Two folders of the same run."""
    folder = tmp_path / "ours"
    (folder / "checkpoints").mkdir(parents=True)
    parts = {"global_step": 2, "state_dict": {"a": torch.ones(3)}, "optimizer_states": [], "lr_schedulers": []}
    torch.save(parts, folder / "checkpoints" / "last.ckpt")
    (folder / "metrics.json").write_text(json.dumps({"box": {"AP": 0.5}}))
    with (folder / "metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["step", "train/loss", "resources/s"], [0, 1.5, 0.1], [1, 1.25, 0.2]])
    shutil.copytree(folder, tmp_path / "theirs")
    return folder, tmp_path / "theirs"


def test_equal_runs(ended):
    (ended[0] / "metrics.csv").write_text("step,train/loss,resources/s\n0,1.5,9\n1,1.25,9\n")
    kill_trials.compare(*ended)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("metrics.csv", "step,train/loss,resources/s\n0,1.5,0.1\n1,1.5,0.2\n", "different history"),
        ("metrics.csv", "step,train/loss,resources/s\n0,1.5,0.1\n1,1.25,0.2\n1,1.25,0.2\n", "different history"),
        ("metrics.json", '{"box": {"AP": 0.25}}', "different results"),
        ("checkpoints/.last.ckpt.12.tmp", "", "temporary files"),
        ("checkpoints/last.ckpt", "PK", "cannot be read"),
    ],
)
def test_differences(ended, file, content, says):
    (ended[0] / file).write_text(content)
    with pytest.raises(kill_trials.TrialError, match=says):
        kill_trials.compare(*ended)


def test_the_last_bit_of_a_weight_counts(ended):
    path = ended[0] / "checkpoints" / "last.ckpt"
    state = torch.load(path, weights_only=True)
    state["state_dict"]["a"][1] += 2**-23
    torch.save(state, path)
    with pytest.raises(kill_trials.TrialError, match="different state_dict"):
        kill_trials.compare(*ended)


@pytest.mark.slow
def test_three_trials():
    done = subprocess.run(
        [sys.executable, "scripts/kill_trials.py", "--trials", "3"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "3 of 3 passed" in done.stdout, done.stdout + done.stderr
