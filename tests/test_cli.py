"""The command line as a person meets it."""

import json
import re
import subprocess
import sys

import pytest

from e3va_cli.config.composition import validate_overrides
from e3va_cli.errors import UserError
from tests.conftest import QUICK


def test_help_names_every_command_and_imports_neither_torch_nor_hydra():
    code = (
        "import sys; sys.argv = ['e3va', '--help']\n"
        "from e3va_cli.cli import main; main()\n"
        "print([m for m in ('torch', 'hydra', 'lightning') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(word in out for word in ("train", "evaluate", "check-data")) and out.rstrip().endswith("[]")


def test_unknown_command_names_the_nearest(e3va):
    assert "did you mean `e3va train`?" in e3va("trian", expect=2).stderr


def test_the_former_name_of_a_command_is_answered_with_the_current_one(e3va):
    assert e3va("export-onnx", "checkpoint=x", expect=2).stderr == "e3va: error: export-onnx is now called export\n"


@pytest.mark.parametrize("command", ["train", "evaluate", "check-data"])
def test_help_of_a_command_needs_nothing(e3va, command):
    out = e3va(command, "--help").stdout
    assert f"e3va {command}" in out and "backbone=" in out and "schema" not in out
    assert re.search(r"^  adapter\.rank=16 +parameters grow with it", out, re.MULTILINE)
    assert all((f"\n  {group}." in out) == (command == "train") for group in ("optimizer", "schedule"))


def test_evaluate_refuses_options_of_training():
    with pytest.raises(UserError) as refused:
        validate_overrides("evaluate", ["checkpoint=x", "optimizer.lr=1e-3", "schedule=poly", "data.num_workers=0"])
    assert refused.value.messages == [
        "optimizer.lr=1e-3: e3va evaluate does not read optimizer options; remove it",
        "schedule=poly: e3va evaluate does not read schedule options; remove it",
    ]


def test_check_data_takes_a_training_command():
    validate_overrides("check_data", ["optimizer.lr=1e-3", "schedule=poly", "schedule.epochs=null"])


def test_cfg_job_prints_the_configuration(e3va):
    out = e3va("train", "backbone=swin_l", "dataset=coco", "dataset.root=x", "--cfg", "job").stdout
    assert (
        "timm_name: swin_large_patch4_window7_224.ms_in22k" in out and "root: x" in out and "name: mask_rcnn\n" in out
    )


def test_all_mistakes_at_once(e3va, tmp_path):
    done = e3va(
        "train",
        "backbone=swin_x",
        "datset=coco",
        "adapter.rnak=3",
        "trainer.max_epochs=abc",
        "rank=4",
        "trainer.precision=bf16-true",
        "optimizer.lr=-1",
        expect=2,
    )
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 7 and all(line.startswith("e3va: error: ") for line in lines)
    for words in (
        ("backbone=swin_x", "swin_nano, swin_s, swin_t"),
        ("datset", "did you mean dataset?"),
        ("adapter.rnak", "did you mean adapter.rank?"),
        ("trainer.max_epochs=abc", "Integer"),
        ("rank=4", "did you mean adapter.rank?"),
        ("bf16-true", "use bf16-mixed"),
        ("optimizer.lr=-1", "above 0"),
    ):
        assert any(all(word in line for word in words) for line in lines), words
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["foo"], "use KEY=VALUE"),
        (["pictures=0"], "pictures=0: pictures is now called num_visualizations"),
        (["head.window=64", "dataset=ade20k", "dataset.root=."], "head.window is now called head.slide_window"),
        (["dataset=coco"], "dataset.root: a value is needed"),
        (["dataset=coco", "dataset.root=nowhere"], "no such data root: nowhere"),
        (["experiment=coco_cascade"], "no such experiment; did you mean experiment=coco_cascade_swin_"),
        (["head=upernet"], "head=upernet is trained on label maps"),
        (["dataset.metric=miou"], "dataset.metric=miou: one of coco, voc, voc_11_point"),
        (["head=cascade_mask_rcnn", "head.box.fg_iou=[0.5]"], "each needs one entry per stage"),
        (["schedule.epochs=null"], "set one of"),
        (["resume=nowhere"], "no such run folder"),
        (["resume=."], "not a run of `e3va train`"),
        (["trainer.devices=0"], "a count, auto, or a list"),
        (["adapter.rank=4,0", "-m"], "adapter.rank=0: must be above 0"),
        (["backbone.weights=none.pth"], "no such file: none.pth"),
        (["backbone=swin_t", "backbone.weights=a.pth", "backbone.pretrained=true"], "mutually exclusive"),
        (
            ["backbone.pretrained=true", "backbone.packaged_weights=null"],
            "there are no published weights for swin_nano",
        ),
    ],
)
def test_mistakes_are_one_line_each(e3va, words, says):
    done = e3va("train", *words, expect=2)
    assert says in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_multirun_makes_a_folder_for_each_value(e3va, tmp_path):
    e3va("train", "-m", "adapter.rank=2,4", "trainer.max_steps=1", "trainer.limit_val_batches=0", *QUICK)
    files = sorted(tmp_path.glob("multirun/*/*/resources.json"))
    ranks = [json.loads(f.read_text())["settings"]["adapter"]["rank"] for f in files]
    assert ranks == [2, 4]


def test_a_sweep_goes_on_after_a_failing_job_and_names_it(e3va, tmp_path):
    (tmp_path / "taken").write_text("")
    weights = f"backbone.weights={tmp_path}/none.pth,null,{tmp_path}/taken"
    done = e3va(
        "train",
        "-m",
        weights,
        "trainer.max_steps=1",
        "trainer.limit_val_batches=0",
        "num_visualizations=0",
        *QUICK,
        expect=1,
    )
    assert [path.parent.name for path in tmp_path.glob("multirun/*/*/resources.json")] == ["1"]
    lines = [line for line in done.stderr.splitlines() if line.startswith("e3va: ")]
    assert len(lines) == 3 and "Traceback" not in done.stderr
    for number, file, line in ((0, "none.pth", lines[0]), (2, "taken", lines[1])):
        assert line.startswith(f"e3va: error: job {number} (backbone.weights={tmp_path}/{file}): ")
    assert lines[2].startswith("e3va: error: 2 of 3 jobs failed: 0 (") and "taken)" in lines[2]
