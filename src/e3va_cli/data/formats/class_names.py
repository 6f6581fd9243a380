"""Class names, from a list or a text file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from e3va_cli.errors import UserError
from e3va_cli.utils.text import is_printable_name, shorten

REMEDY = "set dataset.classes to a list such as [cat,dog], or a text file with one name a line"


def read_class_names(given: Sequence[str] | str) -> list[str]:
    """Return the names in their order.

    Args:
        given: the names; or a text file with one name a line, or with ADE20K's tab-separated table
            (https://github.com/CSAILVision/sceneparsing, objectInfo150.txt), of which the first synonyms are used.

    Raises:
        UserError: the file cannot be read, there are no names, or a name is not a string or occurs twice.
    """
    source, names = (str(given), _read(given)) if isinstance(given, str) else ("dataset.classes", given)
    if not isinstance(names, Sequence):
        raise UserError(f"{source}={names}: {REMEDY}")
    if not names:
        raise UserError(f"{source} has no class names; {REMEDY}")
    if wrong := [name for name in names if not isinstance(name, str) or not is_printable_name(name.strip())]:
        raise UserError(f"{source}: a class name must be a string, not {shorten(wrong[0])}; put it in quotes")
    names = [name.strip() for name in names]
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{source}: duplicate class names: {', '.join(repeated)}; rename or remove them")
    return names


def _read(file: str) -> list[str]:
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"no such file of class names: {path}; {REMEDY}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; {REMEDY}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot read the class names in {path}: {reason}; {REMEDY}") from None
    rows = [line.strip() for line in text.splitlines() if line.strip()]
    header = rows[0].split("\t") if rows else []
    if header[:1] != ["Idx"] or "Name" not in header:
        return rows
    column = header.index("Name")
    fields = [row.split("\t") for row in rows[1:]]
    if short := [number for number, row in enumerate(fields, start=1) if len(row) <= column]:
        raise UserError(f"{path}: class {short[0]} of the table has no name")
    return [re.split("[,;]", row[column])[0].strip() for row in fields]
