"""The steps and commands of `make gpu-check` are valid, and its reports are tested on a CPU."""

import json

import pytest
import torch

from benchmarks import variants
from scripts import gpu_check
from scripts.gpu_check import Command, Step


def test_steps_compose():
    steps = [check for check in gpu_check.checks() if isinstance(check, Step)]
    assert len(steps) == len(set(steps))
    sizes = {}
    for step in {(step.experiment, step.budget, step.options): step for step in steps}.values():
        config, spec = gpu_check.load_step(step)
        sizes[step.experiment] = spec.size.image_size
        assert spec.size.batch_size == step.batch_size and spec.size.precision == step.precision
        assert config.adapter.name == step.variant.partition(":")[0]
        assert spec.gpu_limit_mib == (10 * 1024 if step.budget else None), "11 GiB less the reserve"
    assert sizes["coco_cascade_swin_b"] == (800, 1333) and sizes["voc_retinanet_swin_l"] == (600, 1000)


def test_every_profile_has_valid_arguments():
    first, *profiles = [check for check in gpu_check.checks() if isinstance(check, Command)]
    assert first.title == "tests" and len(profiles) == 2
    for profile in profiles:
        script, *words = profile.arguments
        assert (gpu_check.ROOT / script).is_file()
        given = variants.parser(None, "").parse_intermixed_args([word for word in words if "--variants" not in word])
        assert given.size in ((800, 1333), (600, 1000))


@pytest.mark.slow
def test_report_and_skipped_checks(tmp_path):
    options = ("backbone=swin_nano", "head=mask_rcnn_nano", "image_size=[64,64]", "repeats=1", "instances_per_image=2")
    steps = [Step("coco_cascade_swin_b", v, 1, options=options, expected_s=1) for v in ("full", "e3va")]
    printed = Command("tests", ("-c", "print('3 passed')"), 20, "tests.txt")
    late = Step("coco_cascade_swin_b", "lora", 1, options=options, expected_s=10**6)
    report = gpu_check.run([printed, *steps, late], tmp_path, minutes=5, device="cpu")
    assert (tmp_path / "tests.txt").read_text() == "3 passed\n"
    checks = json.loads((tmp_path / "summary.json").read_text())["checks"]
    assert checks["tests"]["exit_code"] == 0 and "skipped" in checks[late.title]
    full, e3va = json.loads((tmp_path / "measurements.json").read_text())
    for entry in (full, e3va):
        assert not entry["error"] and entry["peak_mib"] > 0 and len(entry["step_times_s"]) == 1
    assert len(report.rows) == 2
    saved = f"{100 * (1 - e3va['peak_mib'] / full['peak_mib']):.1f} %"
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert sum("`e3va " in line and saved in line for line in lines) == 1


def test_a_command_is_killed_after_its_time(tmp_path):
    endless = Command("endless", ("-c", "import time; print('begun'); time.sleep(600)"), 1, "out.txt")
    assert gpu_check.run_command(endless, tmp_path, seconds=3)["exit_code"] == -9
    assert (tmp_path / "out.txt").read_text() == "begun\n"


def test_dry_run_marks_skipped_checks(capsys):
    assert gpu_check.main(["--dry-run", "--minutes", "5"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0].endswith("tests") and listed[-3].startswith("-") and not listed[1].startswith("-")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        gpu_check.main([])
