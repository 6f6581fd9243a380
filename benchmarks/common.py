"""Shared by the benchmarks: command line, configuration, Markdown tables and the JSON file."""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from e3va_cli.config.composition import load_config, validate_overrides
from e3va_cli.errors import UserError, print_errors
from e3va_cli.utils.environment import device_name, package_versions
from e3va_cli.utils.files import write_json

console = Console(highlight=False, soft_wrap=True, width=200)  # full width, also in a file


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with `doc` as its help, for `--output FILE` and `e3va`'s overrides `KEY=VALUE`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="write the values with versions, device and date"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options of e3va")
    return parser


def int_list(text: str, least: int = 0) -> list[int]:
    """Return the integers of a text such as `1,2,4`, unique and sorted.

    Raises:
        ValueError: not integers, or one below `least`.
    """
    numbers = sorted({int(part) for part in text.split(",")})
    if numbers[0] < least:
        raise ValueError(text)
    return numbers


def positive(text: str) -> int:
    """Return a positive integer.

    Raises:
        ValueError: another text.
    """
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def compose(command: str, overrides: Sequence[str], *, complete: bool = True) -> Any:
    """Return the configuration of an `e3va` command; without `complete`, paths of data may be missing.

    Raises:
        UserError: invalid overrides, all at once.
    """
    validate_overrides(command, list(overrides))
    return load_config(command, overrides, complete=complete)


def show(columns: Sequence[str], rows: Sequence[Sequence[str]], *, names: int = 1) -> None:
    """Print a Markdown table: the first `names` columns are text, the rest numbers."""
    table = Table(box=MARKDOWN)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < names else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def about(device: str) -> dict[str, Any]:
    """Return command, versions, device and date."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "device": device_name(torch.device(device)),
        "versions": package_versions(),
    }


def write(path: Path | None, device: str, values: dict[str, Any]) -> None:
    """Write the values as JSON if `path` is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**about(device), **values})
        console.print(f"Results: {path}")


def exit_code(main: Callable[[], int]) -> int:
    """Return the exit code of `main`; after a `UserError`, print a line per error and return 2."""
    try:
        return main()
    except UserError as error:
        print_errors(error, Path(sys.argv[0]).name)
        return 2
