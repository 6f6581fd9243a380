"""Fonts of this machine that have the characters of a text, and a readable text where there is none.

Names of classes may be in any script. Pictures are drawn by Pillow and by matplotlib, whose own fonts have European
scripts and few others; both would draw a box for any other character.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path

from matplotlib import font_manager, get_data_path
from matplotlib.ft2font import FT2Font
from PIL import ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Box = tuple[float, float, float, float]

DEJAVU = Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
BOXES = ("lastresort", "adobeblank")  # fonts that have a box, or nothing, for every character
UNUSUAL = re.compile(  # faces that are taken only where no other has a character
    "serif|mono|bold|italic|oblique|black|light|thin|medium|cond|narrow|display|symbol|math", re.IGNORECASE
)
JOINERS = "\u200c\u200d"  # which shape letters; all other format characters are left out
NAMELESS = "(no name)"
SAID_AT_MOST = 8  # characters that are listed

_said: set[str] = set()


def legible_names(names: Sequence[str]) -> list[str]:
    """Return names in one line each of characters that a font of this machine has; say once which none has.

    Symbols that no font has are replaced by their Unicode name, such as `(automobile)`, letters by their escape, such
    as `\\u732b`.
    """
    return list(_legible_names(tuple(names)))


@lru_cache(maxsize=16)
def _legible_names(names: tuple[str, ...]) -> tuple[str, ...]:
    plain = ["".join(map(_visible, unicodedata.normalize("NFC", name))).strip() for name in names]
    letters = "".join(sorted(set("".join(plain))))
    missing = set(letters).difference(*map(_characters, fonts_for(letters)))
    _say_missing(sorted(missing - set(JOINERS) - _said))
    shown = ("".join(_substitute(one) if one in missing else one for one in name).strip() for name in plain)
    return tuple(name or NAMELESS for name in shown)


@lru_cache(maxsize=1024)
def fonts_for(text: str) -> list[Path]:
    """Return the fewest fonts found that have the characters of a text, the one to be preferred first."""
    fonts, missing = [DEJAVU], set(text) - _characters(DEJAVU)
    while missing:
        best, most = None, 0
        for path in _installed():
            if (gain := len(missing & _characters(path))) > most:
                best, most = path, gain
                if most == len(missing):
                    break
        if best is None:
            break
        fonts.append(best)
        missing -= _characters(best)
    return fonts


def families_for(texts: Iterable[str]) -> list[str]:
    """Return the names of the fonts that have the characters of some texts, for matplotlib's `font.family`."""
    fonts = fonts_for("".join(sorted(set("".join(texts)))))
    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    for path in fonts:
        if str(path) not in known:  # installed since matplotlib has made its list
            font_manager.fontManager.addfont(path)
    return [FT2Font(str(path)).family_name for path in fonts]


class TextLine:
    """A line of text for Pillow, each part of it in a font that has its characters.

    Args:
        text: of names as `legible_names` returns them.
        size: of the letters, in pixels.

    Attributes:
        box: (left, top, right, bottom) of what is drawn, from the beginning of the base line.
    """

    def __init__(self, text: str, size: float) -> None:
        self.runs = [(part, _load(path, size)) for part, path in _runs(text)]
        if _is_right_to_left(text):
            self.runs.reverse()
        self.offsets = [0.0]
        boxes = []
        for part, font in self.runs:
            left, top, right, bottom = font.getbbox(part, anchor="ls")
            boxes.append((left + self.offsets[-1], top, right + self.offsets[-1], bottom))
            self.offsets.append(self.offsets[-1] + font.getlength(part))
        lefts, tops, rights, bottoms = zip(*boxes, strict=True) if boxes else ((0,),) * 4
        self.box: Box = (min(lefts), min(tops), max(rights), max(bottoms))

    @property
    def length(self) -> float:
        """Of the line, in pixels."""
        return self.offsets[-1]

    def draw(self, canvas: ImageDraw.ImageDraw, at: tuple[float, float], ink: tuple[int, int, int]) -> None:
        """Draw the line with the beginning of its base line at (x, y)."""
        for (part, font), offset in zip(self.runs, self.offsets, strict=False):
            canvas.text((at[0] + offset, at[1]), part, fill=ink, font=font, anchor="ls")


def fitting(text: str, size: float, room: float, ending: str = "") -> TextLine:
    """Return the line of a text and its ending; where that is longer than `room` pixels, the text is cut."""
    line, kept = TextLine(text + ending, size), text
    while kept and line.length > room:
        kept = kept[:-1]
        line = TextLine(f"{kept}...{ending}", size)
    return line


def _runs(text: str) -> Iterator[tuple[str, Path | None]]:
    """Parts of a text with their fonts, None for Pillow's own: one part where a single font has all of it."""
    if text.isascii():
        yield text, None
        return
    fonts = fonts_for(text)
    whole = [path for path in fonts if set(text) <= _characters(path)]
    part, current = "", (whole or fonts)[0]
    for letter in text:
        if letter not in _characters(current):
            if part:
                yield part, current
            part = ""
            current = next((path for path in fonts if letter in _characters(path)), current)
        part += letter
    yield part, current


def _is_right_to_left(text: str) -> bool:
    directions = (unicodedata.bidirectional(letter) for letter in text)
    return next((one for one in directions if one in ("L", "R", "AL")), "L") != "L"


@cache
def _load(path: Path | None, size: float) -> Font:
    return ImageFont.load_default(size=size) if path is None else ImageFont.truetype(path, size)


@cache
def _characters(path: Path) -> frozenset[str]:
    """The characters that a font draws; none of one whose letters have no outlines, which cannot be scaled."""
    try:
        font = FT2Font(str(path))
        return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()
    except (OSError, RuntimeError, ValueError):
        return frozenset()


@cache
def _installed() -> Sequence[Path]:
    """The fonts of this machine, upright sans-serif ones of usual weight first."""
    paths = [Path(name) for name in font_manager.findSystemFonts()]
    usable = [path for path in paths if not path.stem.lower().startswith(BOXES)]
    return sorted(usable, key=lambda path: (len(UNUSUAL.findall(path.stem.lower().replace("sansserif", ""))), path))


def _visible(letter: str) -> str:
    """A space for what breaks a line or moves a cursor, nothing for marks that are not seen."""
    category = unicodedata.category(letter)
    if category in ("Cc", "Zl", "Zp", "Zs", "Cs"):
        return " "
    is_unseen = category == "Cf" and letter not in JOINERS
    return "" if is_unseen or "\ufe00" <= letter <= "\ufe0f" else letter


def _substitute(letter: str) -> str:
    if letter in JOINERS or unicodedata.category(letter) == "Sk":  # such as the tones of emoji
        return ""
    name = unicodedata.name(letter, "")
    if name and unicodedata.category(letter) == "So":
        return f"({name.lower()})"
    return letter.encode("ascii", "backslashreplace").decode()


def _say_missing(letters: Sequence[str]) -> None:
    if not letters:
        return
    _said.update(letters)
    more = f" and {len(letters) - SAID_AT_MOST} more" if len(letters) > SAID_AT_MOST else ""
    print(
        f"e3va: note: pictures: no font here draws {' '.join(letters[:SAID_AT_MOST])}{more}; names or codes of the "
        "characters are written instead; install fonts that have them, such as fonts-noto-core, fonts-noto-cjk and "
        "fonts-symbola on Debian and Ubuntu",
        file=sys.stderr,
    )
