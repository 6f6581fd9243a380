"""Steps of several variants in turns: the table, the file, and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import step_time
from e3va_cli.errors import UserError

NANO = ["--experiment", "voc_retinanet_swin_l", "--size", "32x64", "--threads", "1", "backbone=swin_nano"]


def test_a_single_step_of_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.json"
    arguments = ["--repeats", "1", "--variants", "frozen:head.recompute_neck=true,e3va:rank=4", "--output", str(output)]
    assert step_time.main([*NANO, *arguments]) == 0
    printed = capsys.readouterr().out
    assert "batch 1 of 32x64, precision 32" in printed and printed.count("(1 threads)") == 1
    row = next(line for line in printed.splitlines() if line.startswith("| e3va:rank=4"))
    step, between = (cell.strip() for cell in row.split("|")[2:4])
    assert between == f"{step} to {step}"
    variants = json.loads(output.read_text())["variants"]
    assert list(variants) == ["frozen:head.recompute_neck=true", "e3va:rank=4"]
    assert [(variant["planned_mib"] > 0, variant["operations"] > 0) for variant in variants.values()] == [
        (True, True)
    ] * 2
    assert [len(variant["step_times_s"]) for variant in variants.values()] == [1, 1]
    assert torch.get_num_threads() == 1


def test_quartiles() -> None:
    assert step_time.quartiles([2.0]) == (2.0, 2.0)
    assert step_time.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)


def test_errors() -> None:
    with pytest.raises(UserError, match=r"unknown option trainer\.precison"):
        step_time.main([*NANO, "trainer.precison=bf16-mixed"])
    with pytest.raises(UserError, match="adapter=e4va: no such adapter"):
        step_time.main([*NANO, "--variants", "e4va"])
    for wrong in ("512", "0x512", "ax4"):
        with pytest.raises(SystemExit):
            step_time.main(["--size", wrong])
