"""What the benchmarks share: words of the command line, their configuration, tables in Markdown, a JSON file."""

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
from e3va_cli.errors import UserError, print_mistakes
from e3va_cli.utils.environment import device_name, versions
from e3va_cli.utils.files import write_json

console = Console(highlight=False, soft_wrap=True, width=200)  # tables as wide as they are, in a file too


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with `doc` as its help, of `--output FILE` and the options `KEY=VALUE` of `e3va`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="the figures with versions, device and date")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="further options, as e3va has them")
    return parser


def listed(text: str, least: int = 0) -> list[int]:
    """Numbers such as `1,2,4`, once each and in order.

    Raises:
        ValueError: no whole numbers, or one below `least`.
    """
    numbers = sorted({int(word) for word in text.split(",")})
    if numbers[0] < least:
        raise ValueError(text)
    return numbers


def positive(text: str) -> int:
    """A whole number of at least one.

    Raises:
        ValueError: anything else.
    """
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def composed(command: str, words: Sequence[str], *, complete: bool = True) -> Any:
    """Return the configuration of an `e3va` command under `words`; not `complete` where places of data may be missing.

    Raises:
        UserError: words that it does not take, all of them at once.
    """
    validate_overrides(command, list(words))
    return load_config(command, words, complete=complete)


def show(columns: Sequence[str], rows: Sequence[Sequence[str]], *, names: int = 1) -> None:
    """Print a table that can be pasted into Markdown; the first columns hold `names`, the others numbers."""
    table = Table(box=MARKDOWN)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < names else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def about(device: str) -> dict[str, Any]:
    """What figures belong to: the command, the versions, the device and the date."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "device": device_name(torch.device(device)),
        "versions": versions(),
    }


def write(path: Path | None, device: str, figures: dict[str, Any]) -> None:
    """Write the figures as JSON, if a file is wanted."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**about(device), **figures})
        console.print(f"Figures: {path}")


def exit_code(main: Callable[[], int]) -> int:
    """What `main` returns; 2 and a line for each mistake of the user."""
    try:
        return main()
    except UserError as error:
        print_mistakes(error, Path(sys.argv[0]).name)
        return 2
