import io
import re

import pytest
from rich.console import Console
from rich.markup import escape

from e3va_cli.commands import console
from e3va_cli.commands import run_summary as report

EDGE = "\N{BOX DRAWINGS LIGHT VERTICAL}"


@pytest.fixture
def printed(monkeypatch):
    """What a function prints to a console of a width."""

    def printed(width, show, *args):
        shown = Console(width=width, soft_wrap=True, file=io.StringIO())
        monkeypatch.setattr(console, "console", shown)
        show(*args)
        return shown.file.getvalue()

    return printed


def cells(text):
    return [[cell.strip() for cell in line.split(EDGE)[1:-1]] for line in text.splitlines() if line.startswith(EDGE)]


def test_no_name_is_cut_in_a_narrow_terminal(printed):
    of_one = {"AP": 0.5, "AP50": 1.0, "per_class": {"a_rather_long_name_of_a_class": 0.5}}
    results = {f"adapter_{number}, {kind}": of_one for number in range(4) for kind in ("box", "mask")}
    text = printed(80, report.print_results, results)
    assert "\N{HORIZONTAL ELLIPSIS}" not in text and "100.0" in text
    assert "a_rather_long_name_of_a_class" in "".join(row[0] for row in cells(text))
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("width", [20, 30, 40, 60, 80, 200])
def test_no_number_is_broken_at_any_width(printed, width):
    measures = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR100")
    results = {
        kind: {**{name: (10 * row + column) / 100 for column, name in enumerate(measures)}, "per_class": {"cat": 1.0}}
        for row, kind in enumerate(("box", "mask"), start=1)
    }
    text = printed(width, report.print_results, results)
    wanted = {f"{10 * row + column}.0" for row in (1, 2) for column in range(len(measures))} | {"100.0"}
    assert set(re.findall(r"(?<![\d.])\d+\.\d(?!\d)", text)) == wanted
    assert all(re.fullmatch(r"\d+\.\d|-|", cell) for row in cells(text) for cell in row[1:])
    assert all(name in text for name in measures)
    assert all(len(line) <= width for line in text.splitlines() if EDGE in line)


def test_a_column_without_room_is_printed_as_lines(printed):
    words = "adapter=e3va data.batch_size=12"
    text = printed(40, console.print_table, "Title", ["method", "fits", "overrides"], [["e3va", "yes", words]])
    assert f"e3va: overrides {words}" in text.splitlines()


def test_no_name_is_an_emoji_or_a_style(capsys):
    for name in (":cat:", "runs/:dog:", "[red]"):
        console.print_table(None, ["class", "AP"], [[escape(name), "1.0"]])
        console.console.print(name, markup=False)
        assert capsys.readouterr().out.count(name) == 2
