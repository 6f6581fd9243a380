"""Matching listed file names that differ from those on disk: separators, URL escapes, case, Unicode form, folders.

Annotations are often written on another system or by a web page. A name is matched only if that is unambiguous: no
other file matches it, and no other name matches the file. Otherwise the closest file is suggested.
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

MAX_SUGGESTIONS = 10
MIN_SIMILARITY = 0.75  # of difflib, 0..1


@dataclass(frozen=True)
class ResolvedNames:
    """Files of listed names.

    Attributes:
        resolved: file by listed name, where they differ.
        missing: suggested file or None, by listed name without a file.
    """

    resolved: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str | None] = field(default_factory=dict)

    def describe_missing(self, most: int = MAX_SUGGESTIONS) -> str:
        """Return the first few missing names, with suggestions."""
        named = [
            f"{escape_text(name)}{f' (perhaps {escape_text(likely)})' if likely else ''}"
            for name, likely in list(self.missing.items())[:most]
        ]
        return truncate_list([*named, *[""] * (len(self.missing) - len(named))], most)


def resolve_names(folder: Path, names: Iterable[str], suffixes: Collection[str]) -> ResolvedNames:
    """Find listed files in a folder; names outside the folder, or in unreadable folders, are skipped.

    Args:
        folder: that the names are relative to.
        names: as listed.
        suffixes: of candidate files, in lower case.
    """
    absent, present = _absent(folder, dict.fromkeys(names))
    if not absent:
        return ResolvedNames()
    files = sorted(name for name in _files_below(folder) if PurePosixPath(name).suffix.lower() in suffixes)
    by_base: dict[str, list[str]] = defaultdict(list)
    for name in files:
        by_base[normal_form(name).rpartition("/")[2]].append(name)
    candidates = {name: _candidates(name, by_base) for name in absent}
    claims = Counter([*present, *(one for [one] in (files for files in candidates.values() if len(files) == 1))])
    resolved = {name: one[0] for name, one in candidates.items() if len(one) == 1 and claims[one[0]] == 1}
    missing: dict[str, str | None] = dict.fromkeys(name for name in absent if name not in resolved)
    for name in list(missing)[:MAX_SUGGESTIONS]:
        missing[name] = candidates[name][0] if candidates[name] else likely_name(name, files)
    return ResolvedNames(resolved, missing)


def match_stems(images: Collection[str], labels: Collection[str]) -> dict[str, str]:
    """Return the stem of the semantic mask of each image stem; images without one are missing.

    Stems are equal, or equal in `normal_form`, or all masks have the same additional ending, such as `_mask`.
    """
    matched = {stem: stem for stem in images if stem in labels}
    rest, unused = [stem for stem in images if stem not in matched], [stem for stem in labels if stem not in matched]
    forms, wanted = defaultdict(list), Counter(map(normal_form, rest))
    for stem in unused:
        forms[normal_form(stem)].append(stem)
    for stem in rest:
        equal = forms[normal_form(stem)]
        if len(equal) == 1 == wanted[normal_form(stem)]:
            matched[stem] = equal[0]
    if not matched and rest:
        endings = [stem.removeprefix(rest[0]) for stem in unused if stem.startswith(rest[0])]
        complete = [ending for ending in endings if all(f"{stem}{ending}" in labels for stem in rest)]
        if len(complete) == 1:
            matched = {stem: f"{stem}{complete[0]}" for stem in rest}
    return matched


def likely_name(name: str, others: Iterable[str]) -> str | None:
    """Return the file name most similar to `name`, ignoring suffixes, or None."""
    by_stem: dict[str, str] = {}
    for other in sorted(others):
        by_stem.setdefault(_stem(other), other)
    stem = _stem(name)
    longer = [one for one in by_stem if one.startswith(stem) and not one[len(stem) : len(stem) + 1].isalnum()]
    closest = longer[:1] or get_close_matches(stem, by_stem, n=1, cutoff=MIN_SIMILARITY)
    return by_stem[closest[0]] if closest else None


def _stem(name: str) -> str:
    return PurePosixPath(normal_form(name)).stem


def normal_form(name: str) -> str:
    """Return a name with `/` separators, unquoted, in Unicode NFC, case-folded."""
    return unicodedata.normalize("NFC", unquote(name.replace("\\", "/"))).casefold()


def _absent(folder: Path, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the names without a file, and the paths of the others; each folder is listed once."""
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
    """Return all names in a folder: none if it does not exist, None if it cannot be listed."""
    try:
        return set(os.listdir(folder))  # noqa: PTH208 (a Path for each of many costs seconds)
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except (OSError, ValueError):
        return None


def _files_below(folder: Path) -> Iterable[str]:
    for parent, _, names in os.walk(folder):  # follows no links
        inner = Path(parent).relative_to(folder).as_posix()
        yield from (names if inner == "." else (f"{inner}/{name}" for name in names))


def _candidates(name: str, by_base: dict[str, list[str]]) -> Sequence[str]:
    """Return files equal to the name in `normal_form`, or else after leading folders are removed from either."""
    wanted = normal_form(name).strip("/")
    same_base = by_base.get(wanted.rpartition("/")[2], [])
    same = [file for file in same_base if normal_form(file) == wanted]
    return same or [file for file in same_base if _ends(wanted, normal_form(file)) or _ends(normal_form(file), wanted)]


def _ends(path: str, end: str) -> bool:
    return path.endswith(f"/{end}")
