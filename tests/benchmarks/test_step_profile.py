"""Profiles of a step: time by part, forward and backward, and by operator."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence

import pytest
from torch import nn

from benchmarks import step_profile
from benchmarks.step_profile import Spent, operator_rows, part_rows
from benchmarks.variants import Variant
from e3va_cli.errors import UserError
from e3va_cli.memory.step import StepSize

WORDS = ["--size", "64x64", "--threads", "1", "--device", "cpu", "backbone=swin_nano", "head=mask_rcnn_nano"]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Variant, list[Spent]]]:
    """The model and the operators of each variant that `main` profiles."""
    found: dict[str, tuple[Variant, list[Spent]]] = {}
    real = step_profile.profiled

    def profiled(variant: Variant, size: StepSize, given: Namespace) -> tuple[list[Spent], float]:
        spent, seconds = real(variant, size, given)
        found[variant.name] = (variant, spent)
        return spent, seconds

    monkeypatch.setattr(step_profile, "profiled", profiled)
    return found


def calls(spent: Sequence[Spent], part: str, phase: str, operator: str) -> int:
    return sum((one.part, one.phase, one.operator) == (part, phase, operator) for one in spent)


@pytest.mark.slow
def test_each_operator_belongs_to_the_part_that_called_it(seen, tmp_path, capsys):
    output, steps = tmp_path / "out.json", 2
    arguments = ["--steps", str(steps), "--variants", "full,e3va:activations=recompute", "--output", str(output)]
    assert step_profile.main([*WORDS, *arguments, "--traces", str(tmp_path / "traces")]) == 0
    for name, (variant, spent) in seen.items():
        neck, backbone = variant.model.head.neck, variant.model.extractor.backbone
        convolutions = steps * sum(isinstance(module, nn.Conv2d) for module in neck.modules())
        assert calls(spent, "neck", "forward", "aten::convolution") == convolutions, name
        assert calls(spent, "neck", "backward", "aten::convolution_backward") == convolutions, name
        assert calls(spent, "head", "backward", "aten::convolution_backward") > 0, name
        branches = steps * sum(len(stage.branches) for stage in backbone.stages)
        blocks, again = branches // 2, name == "e3va:activations=recompute"  # the frozen stages run again
        gelus = [calls(spent, "backbone", phase, "aten::gelu") for phase in ("forward", "backward")]
        assert gelus == [blocks, blocks * again], name
        assert calls(spent, "backbone", "backward", "aten::gelu_backward") == blocks * (name == "full"), name
        assert calls(spent, "adapters", "backward", "aten::gelu_backward") == branches * ("e3va" in name), name
        adapters = sum(one.seconds for one in spent if one.part == "adapters" and one.phase == "backward")
        assert adapters > 0, name
        assert calls(spent, "optimizer", "backward", "aten::sqrt") == 0
        assert calls(spent, "optimizer", "forward", "aten::sqrt") > 0
    printed = capsys.readouterr().out
    assert "batch 1 of 64x64, precision 32" in printed and printed.count("the tables have") == 2
    variants = json.loads(output.read_text())["variants"]
    for name, (_, spent) in seen.items():
        assert sum(variants[name]["parts_s"].values()) == pytest.approx(sum(one.seconds for one in spent))
        assert sum(variants[name]["operators_s"].values()) == pytest.approx(sum(one.seconds for one in spent))
    assert sorted(path.name for path in (tmp_path / "traces").iterdir()) == [
        "e3va_activations_recompute.json.gz",
        "full.json.gz",
    ]


def test_tables():
    spent = [
        Spent("backbone", "forward", "aten::mm", 3.0),
        Spent("head", "forward", "aten::mm", 1.0),
        Spent("head", "backward", "aten::mm", 3.0),
        Spent("optimizer", "forward", "aten::add_", 1.0),
    ]
    assert part_rows(spent, 2) == [
        ["backbone", "1,500.0", "0.0", "1,500.0", "37.5"],
        ["head", "500.0", "1,500.0", "2,000.0", "50.0"],
        ["optimizer", "500.0", "0.0", "500.0", "12.5"],
    ]
    assert operator_rows(spent, 2, most=1) == [["aten::mm", "head, backbone", "2", "3,500.0", "87.5"]]


def test_unknown_method_is_an_error():
    with pytest.raises(UserError, match="adapter=e4va: no such adapter"):
        step_profile.main([*WORDS, "--variants", "e4va"])
