"""From a finished run to a folder that others evaluate: by the real commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import QUICK


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """One epoch on eight images, by the real command."""
    folder = tmp_path_factory.mktemp("run")
    subprocess.run(
        [sys.executable, "-m", "e3va_cli", "train", *QUICK, f"hydra.run.dir={folder}/first"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    return folder / "first"


def refused(done, *says):
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("e3va: error: "), done.stderr
    assert all(word in lines[0] for word in says), lines[0]


def read(path: Path):
    return json.loads(path.read_text())


def test_export_move_evaluate(short_run, e3va, tmp_path):
    out = e3va("export-adapter", f"checkpoint={short_run}", "output=my adapter").stdout
    assert "1,279,859 numbers: 96,000 on the backbone" in out and "MiB" in out
    assert "e3va evaluate checkpoint=my adapter" in out.replace("'", "")
    assert [p.name for p in tmp_path.iterdir()] == ["my adapter"], "nothing else is left"
    place = tmp_path / "else where"
    place.mkdir()
    moved = (tmp_path / "my adapter").rename(place / "moved")
    metrics = read(short_run / "metrics.json")
    assert read(moved / "adapter_config.json")["metrics"] == metrics
    e3va("evaluate", f"checkpoint='{moved}'", "hydra.run.dir=of_adapter", "trainer.accelerator=cpu")
    e3va("evaluate", f"checkpoint={short_run}", "hydra.run.dir=of_run")
    for name in ("metrics.json", "detections.json"):
        assert read(tmp_path / "of_adapter" / name) == read(tmp_path / "of_run" / name)
    assert read(tmp_path / "of_adapter" / "metrics.json") == metrics
    assert len(read(tmp_path / "of_adapter" / "detections.json")) > 50, "there is something to compare"
    again = e3va("evaluate", f"checkpoint='{moved}'", "adapter.rank=8", "trainer.accelerator=cpu", expect=2)
    refused(again, "another adapter; these differ: rank")
    refused(e3va("evaluate", f"checkpoint='{moved}'", "backbone=swin_t", expect=2), "swin_nano, not on swin_t")
    refused(e3va("evaluate", f"checkpoint='{moved}'", "backbone.seed=1", expect=2), "other weights of swin_nano")
    refused(e3va("train", f"resume='{moved}'", expect=2), "an exported adapter")
    refused(e3va("export-adapter", f"checkpoint='{moved}'", "output=b", expect=2), "an exported adapter")


def test_half_precision(short_run, e3va, tmp_path):
    e3va("export-adapter", f"checkpoint={short_run}/checkpoints/best.ckpt", "output=half", "precision=fp16")
    assert (tmp_path / "half" / "adapter_model.safetensors").stat().st_size < 2.6e6
    # Many findings, so that the scores that are left out in one and not in the other are few among them.
    for name, checkpoint in (("a", "half"), ("b", str(short_run))):
        e3va("evaluate", f"checkpoint={checkpoint}", f"hydra.run.dir={name}", "trainer.accelerator=cpu")
    ours, theirs = (sorted(d["score"] for d in read(tmp_path / n / "detections.json")) for n in ("a", "b"))
    assert len(ours) == pytest.approx(len(theirs), rel=0.05)
    assert ours[-20:] == pytest.approx(theirs[-20:], abs=0.01)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["precision=int8"], ["precision=int8: one of fp32, fp16"]),
        (["output=taken"], ["output=taken: there is something already"]),
        (["output=null"], ["output: the name of a folder is needed"]),
        (["outptu=x"], ["did you mean output?"]),
    ],
)
def test_mistakes_in_the_options(short_run, e3va, tmp_path, words, says):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "a.txt").write_text("mine")
    refused(e3va("export-adapter", f"checkpoint={short_run}", *words, expect=2), *says)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["taken", "taken/a.txt"]


@pytest.mark.parametrize("command", ["export-adapter", "evaluate"])
def test_a_folder_that_is_no_run(e3va, tmp_path, command):
    (tmp_path / "empty").mkdir()
    refused(e3va(command, "checkpoint=empty", expect=2), "checkpoint=empty: an empty folder", "not a run")
    refused(e3va(command, "checkpoint=nowhere", expect=2), "no such run folder")
    refused(e3va(command, expect=2), "checkpoint: a value is needed")


def test_without_a_name_it_lies_under_runs(short_run, e3va, tmp_path):
    e3va("export-adapter", f"checkpoint={short_run}")
    (made,) = (tmp_path / "runs").iterdir()
    assert made.name.endswith("_adapter") and (made / "adapter_config.json").is_file()
