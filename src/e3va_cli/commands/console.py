"""The console that all commands print to, and tables that fit it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from e3va_cli.inference.loaded_adapter import LoadedAdapter

console = Console(highlight=False, soft_wrap=True, emoji=False)

MIN_NAME_WIDTH = 8  # of the first column, in characters; longer names are wrapped
Row = Sequence[str]


def print_table(
    title: str | None, header: Row, rows: Sequence[Row], *, compact: bool = False, styles: Sequence[str] = ()
) -> None:
    """Print a table whose numbers are never wrapped or truncated.

    On a narrow console headers are wrapped between words; then the columns are split over several tables, each with
    the first column, and a column that still does not fit is printed as lines.

    Args:
        title: above the table.
        header: names of the columns, in Rich's markup as all cells; the first column is of names, the others are
            aligned to the right.
        rows: the cells.
        compact: without borders.
        styles: of the rows.
    """
    everything = range(1, len(header))
    for wrapped in (False, True):
        if _width(header, rows, everything, wrapped, compact) <= console.width:
            console.print(_table(title, header, rows, everything, wrapped, compact, styles))
            return
    for columns in _chunks(header, rows, compact):
        if _width(header, rows, columns, True, compact) <= console.width:
            console.print(_table(title, header, rows, columns, True, compact, styles))
        else:
            console.print(*([f"[italic]{title}[/]"] if title else []), *_lines(header, rows, columns[0]), sep="\n")
        title = None


def _chunks(header: Row, rows: Sequence[Row], compact: bool) -> Iterator[list[int]]:
    """Yield groups of columns, without the first, that fit the console."""
    chunk: list[int] = []
    for column in range(1, len(header)):
        if chunk and _width(header, rows, [*chunk, column], True, compact) > console.width:
            yield chunk
            chunk = []
        chunk.append(column)
    yield chunk


def _lines(header: Row, rows: Sequence[Row], column: int) -> list[str]:
    return [f"{row[0]}: {header[column]} {row[column]}" for row in rows]


def _table(
    title: str | None,
    header: Row,
    rows: Sequence[Row],
    columns: Sequence[int],
    wrapped: bool,
    compact: bool,
    styles: Sequence[str],
) -> Table:
    style = {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0), "show_edge": False, "pad_edge": False} if compact else {}
    table = Table(title=title, **style)  # type: ignore[arg-type]
    room = console.width - _width(header, rows, columns, wrapped, compact) + _least_name(header, rows)
    table.add_column(header[0], width=min(room, _longest(header, rows, 0)), overflow="fold")
    for column in columns:
        width = _needed(header, rows, column, wrapped)
        table.add_column(header[column], width=width, justify="right", overflow="fold")
    for number, row in enumerate(rows):
        table.add_row(row[0], *(row[column] for column in columns), style=styles[number] if styles else "")
    return table


def _width(header: Row, rows: Sequence[Row], columns: Sequence[int], wrapped: bool, compact: bool) -> int:
    """Return the minimum width of a table with these columns, in characters."""
    widths = [_least_name(header, rows), *(_needed(header, rows, column, wrapped) for column in columns)]
    return sum(widths) + (2 * len(widths) if compact else 3 * len(widths) + 1)


def _least_name(header: Row, rows: Sequence[Row]) -> int:
    return min(_longest(header, rows, 0), max(MIN_NAME_WIDTH, console.width // 3))


def _longest(header: Row, rows: Sequence[Row], column: int) -> int:
    return max(_length(line) for cell in (header[column], *(row[column] for row in rows)) for line in cell.split("\n"))


def _needed(header: Row, rows: Sequence[Row], column: int, wrapped: bool) -> int:
    """Return the width of a column: of its longest value and of its header, or its longest word if wrapped."""
    parts = header[column].split() if wrapped else header[column].split("\n")
    return max(_length(text) for text in (*parts, *(row[column] for row in rows), ""))


def _length(markup: str) -> int:
    return Text.from_markup(markup, emoji=False).cell_len


def as_list(value: Any) -> list[str]:
    """Return the value of an option that takes one name or a list, as a list of str; a folder may be named 7."""
    return [str(one) for one in (value if isinstance(value, list) else [value])]


def print_passes(passes: Iterable[Sequence[LoadedAdapter]]) -> None:
    """Print a line for each forward pass of the backbone, with the adapters that share it."""
    for adapters in passes:
        names, resize = ", ".join(adapter.name for adapter in adapters), adapters[0].resize
        sharing = "one shared backbone pass" if len(adapters) > 1 else "separate backbone pass"
        sides = f"short side {resize.size}, long side up to {resize.max_size} pixels"
        console.print(f"{names}: {adapters[0].exclusive_reason or f'{sharing}, {sides}'}", markup=False)
