"""Quote values of overrides for Hydra's grammar, after the shell has removed the quotes.

`"input=my photos (1)"` reaches the program without its quotes, and Hydra parses spaces, parentheses, commas, `=`, `#`
and most characters that are not ASCII as grammar or as errors. A value that it cannot parse is quoted; so is one that
it would parse as another type, if the option is text.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString
from hydra.errors import HydraException

from e3va_cli.components.options import info_of
from e3va_cli.config.run_config import COMMANDS, declared_options
from e3va_cli.errors import UserError

KEY = re.compile(r"\+{0,2}[A-Za-z_][\w./@-]*", re.ASCII)
ITEM = re.compile(r"""\s*('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^,]*)\s*(?:,|$)""")
NO_INTERPOLATION = re.compile(r"\$\{(?![\w.]+:|hydra\.)")  # not `${oc.env:HOME}` or `${hydra.job.name}`
TEXT_OR_LIST = ("checkpoint", "input", "classes")  # untyped options that take a text or a list of texts
HYDRA_OPTIONS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.job.name")


def quote_overrides(command: str, words: Sequence[str], *, multirun: bool = False) -> list[str]:
    """Return the overrides of a command with quotes around values where Hydra needs them.

    Args:
        command: such as `train`.
        words: such as `input=my photos (1)`.
        multirun: whether commas separate the values of jobs.

    Raises:
        UserError: under `multirun`, a value with commas is the name of a file too.
    """
    kinds = text_options(command)
    return [_quoted_word(word, kinds, multirun) for word in words]


@cache
def text_options(command: str) -> dict[str, bool]:
    """Return the options of a command that take any text, such as a path, and whether they take a list of such too."""
    texts = dict.fromkeys(HYDRA_OPTIONS, False)
    for key, one, hint in declared_options(COMMANDS[command.replace("-", "_")]):
        if hint == list[str] or (hint is Any and one.name in TEXT_OR_LIST):
            texts[key] = True
        elif hint in (str, str | None) and not info_of(one).choices:
            texts[key] = False
    return texts


def quoted(text: str) -> str:
    """Return a text quoted in Hydra's grammar; `${` without an interpolation is escaped."""
    return QuotedString(NO_INTERPOLATION.sub(r"\\${", text), Quote.single).with_quotes()


def _quoted_word(word: str, kinds: dict[str, bool], multirun: bool) -> str:
    key, _, value = word.partition("=")
    name = key.lstrip("+")
    if not value or not KEY.fullmatch(key):
        return word
    override = _parsed(word)
    if override is None:
        if value.startswith("[") and value.endswith("]") and kinds.get(name, True) and not Path(value).exists():
            return f"{key}=[{','.join(_items(value[1:-1]))}]"
        if multirun and "," in value and not Path(value).exists():
            return f"{key}={','.join(_items(value))}"
        return f"{key}={quoted(_home(value))}"
    if name not in kinds or "${" in value or _is_meant(override, value, takes_list=kinds[name], multirun=multirun):
        return word
    if multirun and override.is_sweep_override():
        raise UserError(
            f"{word}: with -m, commas separate the values of jobs, and there is a file of this name; for the file type "
            f"{shlex.quote(f'{key}={quoted(value)}')}, for jobs {shlex.quote(f'{key}=choice({value})')}"
        )
    return f"{key}={quoted(value)}"


def _is_meant(override: Override, value: str, *, takes_list: bool, multirun: bool) -> bool:
    """Return whether Hydra parses the value of a text option as it was typed, or as an intended list or sweep."""
    read: Any = override._value
    if read is None or isinstance(read, QuotedString):
        return True
    if override.is_sweep_override():
        is_list = isinstance(read, ChoiceSweep) and read.simple_form
        return not is_list or ((multirun or takes_list) and not Path(value).exists())
    if isinstance(read, list):
        return takes_list and not Path(value).exists()
    if isinstance(read, str):
        return value == value.strip()
    return str(read) == value


def _items(text: str) -> Iterator[str]:
    """Yield the items of a list, quoted where Hydra cannot parse them."""
    at = 0
    while at < len(text):
        match = ITEM.match(text, at)
        if match is None:  # a quoted item with something behind it
            end = text.find(",", at)
            item, at = text[at : end if end >= 0 else None].strip(), end + 1 if end >= 0 else len(text)
        else:
            item, at = match[1].strip(), match.end()
        override = _parsed(f"key={item}")
        yield quoted(_home(item)) if override is None or override.is_sweep_override() else item


def _home(text: str) -> str:
    """Return a path with `~` expanded, which a shell does not do after `=`."""
    return text if Path(text).exists() else os.path.expanduser(text)  # noqa: PTH111 (which would drop a last slash)


def _parsed(word: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None
