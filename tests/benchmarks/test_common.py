"""The benchmarks' command line, tables and JSON files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import common
from e3va_cli.errors import UserError

FOLDER = Path(common.__file__).parent


def test_int_list_is_unique_and_sorted() -> None:
    assert common.int_list("4,0,2,4") == [0, 2, 4]
    for wrong in ("", "a", "1,-2"):
        with pytest.raises(ValueError):
            common.int_list(wrong)


def test_table_is_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    common.show(["variant", "a rather long name of a column " * 3], [["e3va", "1.5"]])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [line.count("|") for line in lines] == [3, 3, 3]
    assert [cell.strip() for cell in lines[2].split("|")] == ["", "e3va", "1.5", ""]


def test_values_are_written_with_command_versions_and_date(tmp_path: Path) -> None:
    common.write(tmp_path / "new" / "values.json", "cpu", {"ratio": 0.5})
    written = json.loads((tmp_path / "new" / "values.json").read_text())
    assert written["ratio"] == 0.5 and written["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {"command", "date", "device"} <= set(written)


def test_all_invalid_overrides_are_reported() -> None:
    with pytest.raises(UserError) as caught:
        common.compose("train", ["backbone=swin_x", "adapter.rnk=4"])
    assert [message.partition(":")[0] for message in caught.value.messages] == ["backbone=swin_x", "adapter.rnk=4"]


def test_user_error_is_one_line() -> None:
    arguments = [sys.executable, str(FOLDER / "data_loading.py"), "dataset=coco", "dataset.root=/nowhere"]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("data_loading.py: error: ") and "/nowhere" in done.stderr
