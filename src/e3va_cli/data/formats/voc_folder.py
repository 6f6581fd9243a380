"""A folder in Pascal VOC's layout: its sets of images, and the XML files that annotate them.

Everingham et al., The Pascal Visual Object Classes (VOC) Challenge, IJCV 2010; the layout is the one of its
development kits (http://host.robots.ox.ac.uk/pascal/VOC/).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from xml.etree import ElementTree

from e3va_cli.data.file_names import FoundNames, find_names
from e3va_cli.data.formats.coco_file import is_finite
from e3va_cli.data.formats.text_encodings import decode_text, decode_xml
from e3va_cli.data.images.formats import IMAGE_SUFFIXES, KNOWN_SUFFIXES
from e3va_cli.data.images.reading import size_in_file
from e3va_cli.data.paths import describe_directory, safe_join
from e3va_cli.errors import UserError, first_line
from e3va_cli.utils.files import check_regular_file
from e3va_cli.utils.text import escape_text, shorten

YEARS = ("VOC2007", "VOC2012")
CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
CORNERS = ("xmin", "ymin", "xmax", "ymax")
FLAGS = dict.fromkeys(("", "0", "0.0", "false", "no", "none", "unspecified"), False)
FLAGS |= dict.fromkeys(("1", "1.0", "true", "yes"), True)


class VocObject(NamedTuple):
    """An `<object>`: its name, or None; COCO's [x, y, w, h], or what stands there where that is no box."""

    name: str | None
    box: list[Any]
    difficult: bool


@dataclass(frozen=True)
class VocImage:
    """What an XML file tells of an image; names of files are relative to the devkit.

    Attributes:
        fault: the kind and the details of what makes it unusable, or None.
        sized: whether the file tells the size; without, it is the one of the image file.
    """

    annotation: str
    file_name: str
    height: int = 0
    width: int = 0
    sized: bool = True
    objects: tuple[VocObject, ...] = ()
    fault: tuple[str, str] | None = None


class _FaultError(Exception):
    """What makes an XML file unusable: kind and details."""


def find_devkit(root: str) -> Path:
    """The folder with VOC2007, VOC2012 or both: the root, or VOCdevkit in it.

    Raises:
        UserError: neither has one; says what is there instead.
    """
    given = Path(root).expanduser()
    for folder in (given, given / "VOCdevkit"):
        if any((folder / year).is_dir() for year in YEARS):
            return folder
    raise UserError(
        f"no {' or '.join(YEARS)} in {given} or in {given / 'VOCdevkit'}; {describe_directory(given / YEARS[0])}; "
        "set dataset.root to the folder that holds one of them"
    )


def sets_of(devkit: Path, year: str) -> list[str]:
    """The names of a year's sets of images, the short ones first: VOC has 60 more that are of one class each."""
    names = [path.stem for path in (devkit / year / "ImageSets" / "Main").glob("*.txt") if path.is_file()]
    return sorted(names, key=lambda name: (len(name), name))


def read_set(devkit: Path, year: str, name: str, encoding: str | None = None) -> list[VocImage]:
    """All images of a set of that year, in its order; `encoding` is that of files that are not UTF-8 and declare none.

    Raises:
        UserError: the list cannot be read, or the year lacks the folder of images or of annotations.
    """
    file = devkit / year / "ImageSets" / "Main" / f"{name}.txt"
    try:
        lines = decode_text(file.read_bytes(), encoding).splitlines()
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot read the list of images {file}: {first_line(error)}") from None
    images, annotations = devkit / year / "JPEGImages", devkit / year / "Annotations"
    for folder in (images, annotations):
        if not folder.is_dir():
            raise UserError(f"no folder {folder}, to which {file} refers; {describe_directory(folder)}")
    # One look at the folder instead of one for each image; VOC's own suffix comes last and wins.
    try:
        files = sorted(images.iterdir(), key=_preference)
    except OSError as error:
        raise UserError(f"cannot list {images}: {error.strerror}") from None
    file_names = {path.stem: path.name for path in files if path.suffix.lower() in KNOWN_SUFFIXES}
    found = []
    for sheet in _sheets([line.strip() for line in lines if line.strip()], annotations):
        stem = sheet[: -len(".xml")]
        found.append(_read_image(devkit, year, sheet, file_names.get(stem, f"{stem}.jpg"), encoding))
    return found


def _preference(path: Path) -> tuple[bool, bool, str]:
    return path.suffix.lower() in IMAGE_SUFFIXES, path.suffix == ".jpg", path.name


def _sheets(lines: Sequence[str], annotations: Path) -> list[str]:
    """The names of the XML files that the lines of a list mean.

    A line can be the image's own name; what means no file for certain stays as it is.
    """
    sheets = [f"{line}.xml" for line in lines]
    found = find_names(annotations, sheets, {".xml"})
    if found.missing:
        plain = {sheet: f"{_without_suffix(sheet)}.xml" for sheet in found.missing}
        again = find_names(annotations, plain.values(), {".xml"})
        named = {sheet: again.taken.get(name, name) for sheet, name in plain.items() if name not in again.missing}
        found = FoundNames({**found.taken, **named})
    return [found.taken.get(sheet, sheet) for sheet in sheets]


def _without_suffix(sheet: str) -> str:
    """The name of an image from what would be its XML file: `JPEGImages/a.jpg.xml` is of `a`."""
    image = PurePosixPath(sheet.replace("\\", "/")[: -len(".xml")])
    return image.stem if image.suffix.lower() in KNOWN_SUFFIXES else image.name


def _read_image(devkit: Path, year: str, sheet: str, image: str, encoding: str | None) -> VocImage:
    annotation, file_name = f"{year}/Annotations/{sheet}", f"{year}/JPEGImages/{image}"
    try:
        content, is_guess = _parse(_inside(devkit, annotation), encoding)
        objects = tuple(_object(element) for element in content.findall("object"))
        if is_guess:
            _require_ascii(objects)
        height, width = (_pixels(content.findtext(f"size/{side}")) for side in ("height", "width"))
        sized = height > 0 and width > 0
        if not sized:
            height, width = _size_of_file(_inside(devkit, file_name))
    except _FaultError as fault:
        kind, details = fault.args
        return VocImage(annotation, file_name, fault=(kind, details))
    return VocImage(annotation, file_name, height, width, sized, objects)


def _inside(devkit: Path, name: str) -> Path:
    path = safe_join(devkit, name)
    if path is None:
        raise _FaultError("file outside the data root", f"{shorten(name)} lies outside of {devkit}")
    return path


def _require_ascii(objects: Sequence[VocObject]) -> None:
    """Names in an encoding that nobody knows would be others in the checkpoint than in the file."""
    if found := [name for name, _, _ in objects if name and not name.isascii()]:
        raise _FaultError(
            "annotation file of an unknown encoding",
            f"a class is called {escape_text(found[0])} if it is latin-1; the file declares none and is not UTF-8: set "
            "dataset.encoding to the right one, such as gbk, cp1251 or latin-1",
        )


def _parse(path: Path, encoding: str | None) -> tuple[ElementTree.Element, bool]:
    """The content of an XML file, and whether its encoding is a guess."""
    try:
        check_regular_file(path)
        data = path.read_bytes()
    except FileNotFoundError:
        raise _FaultError("missing annotation file", "no such file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise _FaultError("unreadable annotation file", str(reason)) from None
    try:
        text, is_guess = decode_xml(data, encoding)
    except (UnicodeError, LookupError) as error:
        raise _FaultError(
            "unreadable annotation file", f"not of the encoding it declares: {first_line(error)}"
        ) from None
    # Entities can blow a file of a kilobyte up to gigabytes. Given text, the parser knows no encoding to hide them in.
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise _FaultError("annotation file with a document type", "neither it nor entities are read; remove them")
    try:
        content = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise _FaultError("unreadable annotation file", f"broken XML: {first_line(error)}") from None
    if content.tag != "annotation":
        raise _FaultError("unreadable annotation file", f"it holds <{escape_text(content.tag)}>, not <annotation>")
    return content, is_guess


def _size_of_file(path: Path) -> tuple[int, int]:
    """(height, width) from the head of an image file."""
    try:
        return size_in_file(path)
    except UserError as error:
        raise _FaultError("annotation file without an image size", f"nor can the image tell it: {error}") from None


def _object(element: ElementTree.Element) -> VocObject:
    name = (element.findtext("name") or "").strip()
    difficult = (element.findtext("difficult") or "").strip()
    if difficult.lower() not in FLAGS:
        raise _FaultError("unusable annotation file", f"the difficult of an object is {shorten(difficult)}, not 0 or 1")
    return VocObject(name or None, _box(element.find("bndbox")), FLAGS[difficult.lower()])


def _box(element: ElementTree.Element | None) -> list[Any]:
    """COCO's [x, y, w, h] of corners that count pixels from 1, the last one included."""
    if element is None:
        return []
    texts = [element.findtext(corner) for corner in CORNERS]
    try:
        x1, y1, x2, y2 = corners = [_number(text or "") for text in texts]
    except ValueError:
        return texts
    if not all(map(is_finite, corners)):
        return corners
    # Corners that meet are a slip of the hand, not an object of a single pixel: a box without area.
    return [x1 - 1, y1 - 1, x2 - x1 + (x2 > x1), y2 - y1 + (y2 > y1)]


def _number(text: str) -> float:
    """A number, with the comma that some languages write in it."""
    return float(text.replace(",", ".") if text.count(",") == 1 and "." not in text else text)


def _pixels(text: str | None) -> int:
    """A side of an image; 0 where it is not one."""
    try:
        return int(_number(text or ""))
    except (ValueError, OverflowError):
        return 0
