"""From a finished run to a folder that others evaluate: by the real commands."""

import json
import re
from pathlib import Path

import pytest

from e3va_cli.commands import export_adapter
from e3va_cli.config.run_config import ExportAdapterConfig
from e3va_cli.errors import UserError
from e3va_cli.runs.folder import find_checkpoint


def refused(done, *says):
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("e3va: error: "), done.stderr
    assert all(word in lines[0] for word in says), lines[0]


def read(path: Path):
    return json.loads(path.read_text())


@pytest.mark.slow
def test_export_move_evaluate(short_run, e3va, tmp_path):
    out = e3va("export-adapter", f"checkpoint={short_run}", "output=my adapter").stdout
    assert "1,279,859 numbers: 96,000 on the backbone" in out and "MiB" in out
    assert "e3va evaluate checkpoint=my adapter" in out.replace("'", "").replace('"', "")
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
    refused(e3va("evaluate", f"checkpoint='{moved}'", "backbone.seed=1", expect=2), "other weights of swin_nano")
    for option in ("resume", "checkpoint"):
        with pytest.raises(UserError, match="an exported adapter; give the run"):
            find_checkpoint(str(moved), option)
    # Half precision: the findings are nearly the same.
    words = [f"checkpoint={short_run}/checkpoints/best.ckpt", "output=half", "precision=fp16"]
    e3va("export-adapter", *words)
    assert (tmp_path / "half" / "adapter_model.safetensors").stat().st_size < 2.6e6
    e3va("evaluate", "checkpoint=half", "hydra.run.dir=of_half", "trainer.accelerator=cpu")
    ours, theirs = (sorted(d["score"] for d in read(tmp_path / n / "detections.json")) for n in ("of_half", "of_run"))
    assert len(ours) == pytest.approx(len(theirs), rel=0.05)
    assert ours[-20:] == pytest.approx(theirs[-20:], abs=0.01)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"output": "taken"}, "taken: exists already"),
        ({"output": None}, "output: the name of a folder is needed"),
        ({"checkpoint": "empty"}, "checkpoint=empty: an empty folder, not a run"),
        ({"checkpoint": "nowhere"}, "checkpoint=nowhere: no such run folder"),
    ],
)
def test_mistakes_in_the_options(short_run, tmp_path, monkeypatch, options, says):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "a.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    given = {"checkpoint": str(short_run), "output": "new", "precision": "fp32", **options}
    with pytest.raises(UserError, match=re.escape(says)) as refusal:
        export_adapter.run(ExportAdapterConfig(**given))
    assert len(refusal.value.messages) == 1
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["empty", "taken", "taken/a.txt"]


def test_mistakes_on_the_command_line(e3va, tmp_path):
    refused(e3va("export-adapter", "checkpoint=nowhere", expect=2), "checkpoint=nowhere: no such run folder")
    assert not list(tmp_path.iterdir()), "nothing is made"
    (tmp_path / "empty").mkdir()
    refused(e3va("evaluate", "checkpoint=empty", expect=2), "checkpoint=empty: an empty folder", "not a run")


def test_without_a_name_it_lies_under_runs(short_run, e3va, tmp_path):
    e3va("export-adapter", f"checkpoint={short_run}")
    (made,) = (tmp_path / "runs").iterdir()
    assert made.name.endswith("_adapter") and (made / "adapter_config.json").is_file()
