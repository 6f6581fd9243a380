"""Files that are not called quite as they are listed: other separators, URL escapes, cases, Unicode forms, folders.

What lists them was often written on another system, or by a web page. A file is taken for a name only where it is
certain: no other file could be meant, and no other name could mean it. Otherwise the likely one is named.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from e3va_cli.data.paths import safe_join
from e3va_cli.utils.text import escape_text, truncate_list

GUESSED = 10  # names for which a likely file is looked for
CLOSE = 0.75  # of difflib's ratio, from 0 to 1


@dataclass(frozen=True)
class ResolvedNames:
    """Where listed files lie.

    Attributes:
        taken: the file that is meant, by each name that is not quite its own.
        missing: the likely file, or None, by each name that means none for certain.
    """

    resolved: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str | None] = field(default_factory=dict)

    def describe_missing(self, most: int = GUESSED) -> str:
        """The first few of what is missing, with what may be meant."""
        named = [
            f"{escape_text(name)}{f' (perhaps {escape_text(likely)})' if likely else ''}"
            for name, likely in list(self.missing.items())[:most]
        ]
        return truncate_list([*named, *[""] * (len(self.missing) - len(named))], most)


def resolve_names(folder: Path, names: Iterable[str], suffixes: Collection[str]) -> ResolvedNames:
    """Look for listed files in a folder; those that lie outside of it, or cannot be listed, are passed over.

    Args:
        folder: that the names are relative to.
        names: as they are listed.
        suffixes: of files that can be meant, in lower case.
    """
    absent, present = _absent(folder, dict.fromkeys(names))
    if not absent:
        return ResolvedNames()
    files = sorted(name for name in _files_below(folder) if PurePosixPath(name).suffix.lower() in suffixes)
    by_base: dict[str, list[str]] = defaultdict(list)
    for name in files:
        by_base[normal_form(name).rpartition("/")[2]].append(name)
    meant = {name: _meant(name, by_base) for name in absent}
    claims = Counter([*present, *(one for [one] in (found for found in meant.values() if len(found) == 1))])
    resolved = {name: found[0] for name, found in meant.items() if len(found) == 1 and claims[found[0]] == 1}
    missing: dict[str, str | None] = dict.fromkeys(name for name in absent if name not in resolved)
    for name in list(missing)[:GUESSED]:
        missing[name] = meant[name][0] if meant[name] else likely_name(name, files)
    return ResolvedNames(resolved, missing)


def match_stems(images: Collection[str], labels: Collection[str]) -> dict[str, str]:
    """The label map that belongs to each image, by the names without their suffixes; what has none is left out.

    They are the same, or the same but for what systems write otherwise, or each label map has one ending more, such as
    `_mask`.
    """
    matched = {stem: stem for stem in images if stem in labels}
    rest, unused = [stem for stem in images if stem not in matched], [stem for stem in labels if stem not in matched]
    forms, wanted = defaultdict(list), Counter(map(normal_form, rest))
    for stem in unused:
        forms[normal_form(stem)].append(stem)
    for stem in rest:
        found = forms[normal_form(stem)]
        if len(found) == 1 == wanted[normal_form(stem)]:
            matched[stem] = found[0]
    if not matched and rest:
        endings = [stem.removeprefix(rest[0]) for stem in unused if stem.startswith(rest[0])]
        complete = [ending for ending in endings if all(f"{stem}{ending}" in labels for stem in rest)]
        if len(complete) == 1:
            matched = {stem: f"{stem}{complete[0]}" for stem in rest}
    return matched


def likely_name(name: str, others: Iterable[str]) -> str | None:
    """The one of some file names that is most like another, suffixes aside; None where none is."""
    by_stem: dict[str, str] = {}
    for other in sorted(others):
        by_stem.setdefault(_stem(other), other)
    stem = _stem(name)
    longer = [one for one in by_stem if one.startswith(stem) and not one[len(stem) : len(stem) + 1].isalnum()]
    found = longer[:1] or get_close_matches(stem, by_stem, n=1, cutoff=CLOSE)
    return by_stem[found[0]] if found else None


def _stem(name: str) -> str:
    return PurePosixPath(normal_form(name)).stem


def normal_form(name: str) -> str:
    """What names have in common that mean one file on some system."""
    return unicodedata.normalize("NFC", unquote(name.replace("\\", "/"))).casefold()


def _absent(folder: Path, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The names that no file has, and the others as they lie in the folder; each folder is listed once."""
    listed: dict[Path, set[str] | None] = {}
    absent, present = [], []
    for name in names:
        path = safe_join(folder, name)
        if path is None:
            continue
        if path.parent not in listed:
            listed[path.parent] = _names_in(path.parent)
        others = listed[path.parent]
        if others is None or path.name in others:
            present.append(path.relative_to(folder).as_posix())
        else:
            absent.append(name)
    return absent, present


def _names_in(folder: Path) -> set[str] | None:
    """All names in a folder; none where it does not exist, None where it cannot be listed."""
    try:
        return set(os.listdir(folder))  # noqa: PTH208 (a Path for each of many costs seconds)
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except (OSError, ValueError):
        return None


def _files_below(folder: Path) -> Iterable[str]:
    for parent, _, names in os.walk(folder):  # which follows no links
        inner = Path(parent).relative_to(folder).as_posix()
        yield from (names if inner == "." else (f"{inner}/{name}" for name in names))


def _meant(name: str, by_base: dict[str, list[str]]) -> Sequence[str]:
    """The files that a name can mean: the same but for what systems write otherwise, or for folders before it."""
    wanted = normal_form(name).strip("/")
    candidates = by_base.get(wanted.rpartition("/")[2], [])
    same = [file for file in candidates if normal_form(file) == wanted]
    return same or [file for file in candidates if _ends(wanted, normal_form(file)) or _ends(normal_form(file), wanted)]


def _ends(path: str, end: str) -> bool:
    return path.endswith(f"/{end}")
