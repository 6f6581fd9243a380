"""The table of backbones: estimates beside those of the command, and largest batches within budgets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import backbones
from e3va_cli.errors import UserError

SMALL = ("head=mask_rcnn_nano", "image_size=[96,128]")


def test_largest_batch_is_the_last_that_fits() -> None:
    method = backbones.Method("swin_nano", "e3va", [*SMALL, "reserve_mib=0"])
    budget = f"{method.peak_mib(3) + 0.01:.3f}MiB"
    assert method.peak_mib(1) < method.peak_mib(2) < method.peak_mib(3)
    assert method.largest_batch(budget) == 3


def test_table_and_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "backbones.json"
    options = ["--backbones", "swin_nano", "--methods", "frozen,e3va", "--budgets", "", "--output", str(file)]
    assert backbones.main([*options, *SMALL]) == 0
    e3va = json.loads(file.read_text())["backbones"]["swin_nano"]["e3va"]
    method = backbones.Method("swin_nano", "e3va", SMALL)
    assert e3va["peak_mib"] == [round(method.peak_mib(size), 1) for size in (1, 2)] and e3va["largest_batch"] == []
    row = [f"{one:,.0f}" for one in e3va["peak_mib"]]
    assert [cell.strip() for cell in capsys.readouterr().out.split("`swin_nano`")[1].split("|")][-3:-1] == row


def test_methods_that_do_not_suit_a_backbone_have_no_values() -> None:
    lora, frozen = None, {"trainable": 0, "parameters": 2e6, "peak_mib": [1.0, 2.0], "largest_batch": [3]}
    assert backbones.cells({"frozen": frozen, "lora": lora}, [1, 2], ["8GiB"]) == [
        "2.0",
        "-",
        "1",
        "2",
        "-",
        "-",
        "3 / -",
    ]


def test_unknown_backbones_are_an_error() -> None:
    with pytest.raises(UserError, match=r"--backbones swin_x: no backbone swin_x; choices: .*swin_t"):
        backbones.main(["--backbones", "swin_x"])


def test_all_backbones_but_those_for_tests() -> None:
    selected = backbones.selected_backbones(None)
    assert {"swin_t", "hiera_l", "dinov3_7b"} <= set(selected) and "swin_nano" not in selected
