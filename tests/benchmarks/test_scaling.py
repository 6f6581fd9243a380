"""Estimated scaling: axes, estimates and ratios."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling
from benchmarks.scaling import AXES, BASES, Estimate, Point
from e3va_cli.errors import UserError
from e3va_cli.memory.estimate import estimate_memory
from e3va_cli.memory.step import StepSize

SMALL = Point("voc_retinanet_swin_l", (96, 128), 1, "swin_nano", 8)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("settings", BASES)
def test_one_axis_is_varied(axis: str, settings: str) -> None:
    base = BASES[settings]
    varied = scaling.points(base, axis)
    assert base in varied and len(set(varied)) == len(AXES[axis])
    assert {dataclasses.replace(point, **{axis: getattr(base, axis)}) for point in varied} == {base}
    assert len({scaling.label(point, axis) for point in varied}) == len(varied)


def test_estimate_is_that_of_the_configuration(config: Callable[..., dict[str, Any]]) -> None:
    arguments = ["experiment=voc_retinanet_swin_l", "backbone=swin_nano", "adapter=e3va", "adapter.rank=8"]
    composed = config(*arguments, "adapter.activations=compress", "dataset.root=/none", command="train")
    size = StepSize(1, (96, 128), 20, "32", composed.trainer.gradient_clip_norm)
    expected = estimate_memory(composed, size, num_classes=20)
    found = scaling.estimate("e3va compress", SMALL, ())
    assert found == Estimate(expected.peak.total_bytes, expected.flops)


def test_variants_without_adapters_have_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(scaling, "estimate", lambda variant, point, arguments: asked.append((variant, point.rank)))
    scaling.variants_at(dataclasses.replace(SMALL, rank=64), SMALL, ())
    assert dict(asked) == {
        "full": 8,
        "frozen": 8,
        "e3va keep": 64,
        "e3va compress": 64,
        "e3va recompute": 64,
    }


def test_ratios() -> None:
    full, frozen, ours = Estimate(4 * 2**30, 8 * 10**12), Estimate(2**30, 10**12), Estimate(2**31, 2 * 10**12)
    assert scaling.cells(ours, full, frozen) == ["2,048", "0.500", "2.000", "2.00", "0.250", "2.000"]


@pytest.mark.slow
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        scaling, "estimate", lambda variant, point, arguments: Estimate(len(variant) * point.batch * 2**20, 10**12)
    )
    assert scaling.main(["--settings", "voc", "--axes", "batch", "--output", str(tmp_path / "out.json")]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {(r["batch"], r["variant"]): r["peak_bytes"] for r in rows} == {
        (batch, variant): len(variant) * batch * 2**20 for batch in AXES["batch"] for variant in scaling.VARIANTS
    }
    printed = capsys.readouterr().out
    assert printed.startswith("Estimated: experiment=voc_retinanet_swin_l")
    of_row = next(line for line in printed.splitlines() if "e3va compress" in line and line.startswith("| 4 "))
    assert [cell.strip() for cell in of_row.split("|")[3:6]] == ["52", "3.250", "2.167"]  # 13 letters against 4 and 6


@pytest.mark.slow
def test_one_backward_pass_needs_more_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(scaling.BASES, "voc", dataclasses.replace(SMALL, size=(480, 640)))
    monkeypatch.setitem(scaling.AXES, "batch", (2,))
    peaks = []
    for arguments in ([], ["--one-backward-pass"]):
        scaling.estimate.cache_clear()
        scaling.main(["--settings", "voc", "--axes", "batch", *arguments])
        row = next(
            line for line in capsys.readouterr().out.splitlines() if line.startswith("| 2 ") and "frozen" in line
        )
        peaks.append(int(row.split("|")[3]))
    assert peaks[1] > peaks[0]


@pytest.mark.slow
def test_errors() -> None:
    with pytest.raises(UserError, match=r"--axes size,depth: no axis depth; choices: size, batch"):
        scaling.main(["--axes", "size,depth"])
    with pytest.raises(UserError, match=r"unknown option trainer\.precison"):
        scaling.main(["trainer.precison=bf16-mixed"])
