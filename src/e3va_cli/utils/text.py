"""Text out of files that anyone may have written: what can be a name, and how a value is shown in one line."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence, Sized

LONGEST = 300  # characters of a shown text
NOT_IN_NAMES = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, and halves of characters

_brief = reprlib.Repr()
_brief.maxstring = 60


def is_printable_name(value: object) -> bool:
    """Whether a value can be the name of a file or class: text that has an encoding and moves no cursor."""
    return isinstance(value, str) and bool(value) and not NOT_IN_NAMES.search(value)


def shorten(value: object) -> str:
    """A value as Python writes it, cut where it is long or nested deeply."""
    return _brief.repr(value)


def escape_text(value: object) -> str:
    """A text, such as a path, that stays in its line: escapes stand for what is not printable, dots for the middle."""
    text = str(value)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]}...{text[-LONGEST // 2 :]}"
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def pluralize(number: float, one: str, several: str = "") -> str:
    """A number with its noun, as in `1 step` and `2,000 steps`; the plural of `one` ends in -s unless it is given."""
    value = f"{number:,}" if isinstance(number, int) else f"{number:.3g}"
    return f"{value} {one if value == '1' else several or f'{one}s'}"


def truncate_list(items: Sequence[object], most: int) -> str:
    """Up to `most` items in a row, and how many there are beside them."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more


def more_suffix(found: Sized) -> str:
    """Behind the first item: how many there are beside it."""
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""
