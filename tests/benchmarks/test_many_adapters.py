"""Adapters on one pass: the table, the file, and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import many_adapters
from e3va_cli.errors import UserError


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--backbone", "swin_nano", "--size", "64", "--counts", "2,1", "--repeats", "1", "--threads", "1"]
    assert many_adapters.main([*arguments, "--output", str(tmp_path / "out.json")]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["adapters"] for row in rows] == [1, 2]
    assert rows[1]["MiB, one after another"] < rows[1]["MiB, together"] < rows[1]["MiB, all loaded"]
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(printed) == 3 and printed[0].split("|")[1].strip() == "adapters"


def test_errors() -> None:
    with pytest.raises(UserError, match="head=upernat_nano: no such head"):
        many_adapters.main(["--heads", "upernat_nano"])
    with pytest.raises(SystemExit):
        many_adapters.main(["--counts", "0,1"])
