"""Installed fonts that have the characters of a text, and replacements of characters that no font has.

Class names may be in any script. The fonts of Pillow and matplotlib have European scripts and few others; any other
character would be drawn as a box.
"""

from __future__ import annotations

import logging
import re
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
PLACEHOLDER_FONTS = ("lastresort", "adobeblank")  # a box, or nothing, for every character
UNUSUAL = re.compile(  # faces used only for characters that no other has
    "serif|mono|bold|italic|oblique|black|light|thin|medium|cond|narrow|display|symbol|math", re.IGNORECASE
)
JOINERS = "\u200c\u200d"  # shape letters; all other format characters are removed
NAMELESS = "(no name)"
MAX_LISTED = 8  # characters in the warning
MAX_LABEL = 24  # letters

log = logging.getLogger(__name__)
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # warns about fonts with a single weight

_reported: set[str] = set()


def legible_names(names: Sequence[str]) -> list[str]:
    """Return names as single lines of characters that an installed font has; log once those that none has.

    Symbols that no font has are replaced by their Unicode name, such as `(automobile)`, letters by their escape, such
    as `\\u732b`.
    """
    return list(_legible_names(tuple(names)))


@lru_cache(maxsize=16)
def _legible_names(names: tuple[str, ...]) -> tuple[str, ...]:
    plain = ["".join(map(_visible, unicodedata.normalize("NFC", name))).strip() for name in names]
    letters = "".join(sorted(set("".join(plain))))
    missing = set(letters).difference(*map(_characters, fonts_for(letters)))
    _warn_missing(sorted(missing - set(JOINERS) - _reported))
    shown = ("".join(_substitute(one) if one in missing else one for one in name).strip() for name in plain)
    return tuple(name or NAMELESS for name in shown)


@lru_cache(maxsize=1024)
def fonts_for(text: str) -> list[Path]:
    """Return few fonts that together have the characters of a text, the preferred one first."""
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
    """Return the names of fonts that have the characters of the texts, for matplotlib's `font.family`."""
    fonts = fonts_for("".join(sorted(set("".join(texts)))))
    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    for path in fonts:
        if str(path) not in known:  # installed after matplotlib cached its list
            font_manager.fontManager.addfont(path)
    return [FT2Font(str(path)).family_name for path in fonts]


def plot_labels(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return names truncated and escaped for matplotlib, and the fonts that have their characters for `font.family`."""
    shown = [f" {name}" if name.startswith("_") else name for name in legible_names(names)]  # `_` hides legend entries
    short = [name if len(name) <= MAX_LABEL else f"{name[: MAX_LABEL - 1]}\N{HORIZONTAL ELLIPSIS}" for name in shown]
    return [name.replace("$", r"\$") for name in short], families_for(short)


class TextLine:
    """A line of text for Pillow, each part in a font that has its characters.

    Args:
        text: made of names returned by `legible_names`.
        size: of the font in pixels.

    Attributes:
        box: (left, top, right, bottom) in pixels, relative to the start of the baseline.
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
        """Return the length of the line in pixels."""
        return self.offsets[-1]

    def draw(self, canvas: ImageDraw.ImageDraw, at: tuple[float, float], color: tuple[int, int, int]) -> None:
        """Draw the line with the start of its baseline at (x, y)."""
        for (part, font), offset in zip(self.runs, self.offsets, strict=False):
            canvas.text((at[0] + offset, at[1]), part, fill=color, font=font, anchor="ls")


def fit_text(text: str, size: float, width: float, ending: str = "") -> TextLine:
    """Return the line of a text and its ending, the text truncated to fit `width` pixels."""
    line, kept = TextLine(text + ending, size), text
    while kept and line.length > width:
        kept = kept[:-1]
        line = TextLine(f"{kept}...{ending}", size)
    return line


def _runs(text: str) -> Iterator[tuple[str, Path | None]]:
    """Yield parts of a text with their fonts (None: Pillow's default); a single part if one font has all characters."""
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
    """Return the characters of a font; none of a bitmap font, which cannot be scaled."""
    try:
        font = FT2Font(str(path))
        return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()
    except (OSError, RuntimeError, ValueError):
        return frozenset()


@cache
def _installed() -> Sequence[Path]:
    """Return the installed fonts, regular sans-serif ones first."""
    paths = [Path(name) for name in font_manager.findSystemFonts()]
    usable = [path for path in paths if not path.stem.lower().startswith(PLACEHOLDER_FONTS)]
    return sorted(usable, key=lambda path: (len(UNUSUAL.findall(path.stem.lower().replace("sansserif", ""))), path))


def _visible(letter: str) -> str:
    """Return a space for control characters and separators, nothing for invisible marks."""
    category = unicodedata.category(letter)
    if category in ("Cc", "Zl", "Zp", "Zs", "Cs"):
        return " "
    is_invisible = category == "Cf" and letter not in JOINERS
    return "" if is_invisible or "\ufe00" <= letter <= "\ufe0f" else letter


def _substitute(letter: str) -> str:
    if letter in JOINERS or unicodedata.category(letter) == "Sk":  # such as skin tones of emoji
        return ""
    name = unicodedata.name(letter, "")
    if name and unicodedata.category(letter) == "So":
        return f"({name.lower()})"
    return letter.encode("ascii", "backslashreplace").decode()


def _warn_missing(letters: Sequence[str]) -> None:
    if not letters:
        return
    _reported.update(letters)
    more = f" and {len(letters) - MAX_LISTED} more" if len(letters) > MAX_LISTED else ""
    log.warning(
        "no installed font has %s%s; names or codes of the characters are drawn instead; install fonts that have them, "
        "such as fonts-noto-core, fonts-noto-cjk and fonts-symbola on Debian and Ubuntu",
        " ".join(letters[:MAX_LISTED]),
        more,
    )
