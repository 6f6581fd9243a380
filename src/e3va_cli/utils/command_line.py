"""Commands to paste into a shell, and values in the grammar of Hydra's overrides."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

PLAIN_PATH = re.compile(r"[\w.-]*(/[\w.-]+)+", re.ASCII)  # Hydra reads it as it is
PLAIN_NAME = re.compile(r"(?!(?:null|true|false|nan|inf)$)[a-z][\w-]*", re.ASCII | re.IGNORECASE)
SPECIAL_IN_QUOTES = re.compile(r'["$`\\!]')  # special to a shell within double quotes


def to_override_value(value: str | float | bool | Sequence[Any] | None) -> str:
    """Return a value in Hydra's grammar: text in quotes, unless it is a path of plain characters."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value if PLAIN_PATH.fullmatch(value) else QuotedString(value, Quote.single).with_quotes()
    if isinstance(value, int | float):
        return repr(value)
    return f"[{','.join(map(to_override_value, value))}]"


def format_command(command: str, options: Mapping[str, Any]) -> str:
    """Return `e3va COMMAND KEY=VALUE ...`, quoted for a shell."""
    return " ".join(["e3va", command, *(_shell_word(f"{key}={_value(value)}") for key, value in options.items())])


def _value(value: Any) -> str:
    """Return a value as `to_override_value` does, but plain names without quotes."""
    return value if isinstance(value, str) and PLAIN_NAME.fullmatch(value) else to_override_value(value)


def _shell_word(word: str) -> str:
    if "'" in word and not SPECIAL_IN_QUOTES.search(word):
        return f'"{word}"'
    return shlex.quote(word)
