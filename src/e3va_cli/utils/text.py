"""Text from untrusted files: which names are allowed, and how a value is printed in one line."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence, Sized

MAX_LENGTH = 300  # characters
NOT_IN_NAMES = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters and surrogates

_repr = reprlib.Repr()
_repr.maxstring = 60


def is_printable_name(value: object) -> bool:
    """Return whether a value can be the name of a file or class: text without control characters and surrogates."""
    return isinstance(value, str) and bool(value) and not NOT_IN_NAMES.search(value)


def shorten(value: object) -> str:
    """Return the repr of a value, shortened if it is long or deeply nested."""
    return _repr.repr(value)


def escape_text(value: object) -> str:
    """Return a text, such as a path, in one line: unprintable characters escaped, a long middle as dots."""
    text = str(value)
    if len(text) > MAX_LENGTH:
        text = f"{text[: MAX_LENGTH // 2]}...{text[-MAX_LENGTH // 2 :]}"
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def pluralize(number: float, one: str, several: str = "") -> str:
    """Return a number and its noun, such as `1 step` and `2,000 steps`; the plural is `one` and -s unless given."""
    value = f"{number:,}" if isinstance(number, int) else f"{number:.3g}"
    return f"{value} {one if value == '1' else several or f'{one}s'}"


def truncate_list(items: Sequence[object], most: int) -> str:
    """Return the first `most` items, and the number of the rest: `a, b and 3 more`."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more


def more_suffix(items: Sized) -> str:
    """Return ` (and N more)`, to follow the first of several items; an empty string for one item."""
    return f" (and {len(items) - 1} more)" if len(items) > 1 else ""
