"""Folders in Pascal VOC's layout: image sets and XML annotation files.

Everingham et al., The Pascal Visual Object Classes (VOC) Challenge, IJCV 2010; see the
development kits (http://host.robots.ox.ac.uk/pascal/VOC/).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from xml.etree import ElementTree

from e3va_cli.data.file_names import ResolvedNames, resolve_names
from e3va_cli.data.formats.coco_file import is_finite
from e3va_cli.data.formats.text_encodings import decode_text, decode_xml
from e3va_cli.data.images.formats import IMAGE_SUFFIXES, KNOWN_SUFFIXES
from e3va_cli.data.images.reading import read_image_size
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
    """An `<object>`: its name or None, and COCO's [x, y, w, h], or the raw values if they are no box."""

    name: str | None
    box: list[Any]
    difficult: bool


@dataclass(frozen=True)
class VocImage:
    """The content of an XML file; file names are relative to the devkit.

    Attributes:
        has_size: whether the XML file has the size of the image; else it is read from the image file.
        error: (issue type, detail) of an invalid file, or None.
    """

    annotation: str
    file_name: str
    height: int = 0
    width: int = 0
    has_size: bool = True
    objects: tuple[VocObject, ...] = ()
    error: tuple[str, str] | None = None


class _AnnotationError(Exception):
    """An invalid XML file: issue type and detail."""


def find_devkit(root: str) -> Path:
    """Return the folder that contains VOC2007, VOC2012 or both: the root, or VOCdevkit in it.

    Raises:
        UserError: neither contains one.
    """
    given = Path(root).expanduser()
    for folder in (given, given / "VOCdevkit"):
        if any((folder / year).is_dir() for year in YEARS):
            return folder
    raise UserError(
        f"no {' or '.join(YEARS)} in {given} or in {given / 'VOCdevkit'}; {describe_directory(given / YEARS[0])}; "
        "set dataset.root to the folder that contains one of them"
    )


def list_image_sets(devkit: Path, year: str) -> list[str]:
    """Return the names of a year's image sets, short ones first: VOC has 60 more for single classes."""
    names = [path.stem for path in (devkit / year / "ImageSets" / "Main").glob("*.txt") if path.is_file()]
    return sorted(names, key=lambda name: (len(name), name))


def read_image_set(devkit: Path, year: str, name: str, encoding: str | None = None) -> list[VocImage]:
    """Read all images of an image set, in its order; `encoding` applies to files that are not UTF-8 and declare none.

    Raises:
        UserError: the list cannot be read, or JPEGImages or Annotations is missing.
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
    # List the folder once instead of once an image; VOC's own suffix comes last and wins.
    try:
        files = sorted(images.iterdir(), key=_preference)
    except OSError as error:
        raise UserError(f"cannot list {images}: {error.strerror}") from None
    file_names = {path.stem: path.name for path in files if path.suffix.lower() in KNOWN_SUFFIXES}
    entries = []
    for xml_name in _xml_names([line.strip() for line in lines if line.strip()], annotations):
        stem = xml_name[: -len(".xml")]
        entries.append(_read_image(devkit, year, xml_name, file_names.get(stem, f"{stem}.jpg"), encoding))
    return entries


def _preference(path: Path) -> tuple[bool, bool, str]:
    return path.suffix.lower() in IMAGE_SUFFIXES, path.suffix == ".jpg", path.name


def _xml_names(lines: Sequence[str], annotations: Path) -> list[str]:
    """Return the XML file of each line of an image set, which may also be the image's file name."""
    names = [f"{line}.xml" for line in lines]
    found = resolve_names(annotations, names, {".xml"})
    if found.missing:
        plain = {name: f"{_without_suffix(name)}.xml" for name in found.missing}
        again = resolve_names(annotations, plain.values(), {".xml"})
        named = {line: again.resolved.get(name, name) for line, name in plain.items() if name not in again.missing}
        found = ResolvedNames({**found.resolved, **named})
    return [found.resolved.get(name, name) for name in names]


def _without_suffix(xml_name: str) -> str:
    """Return the image's name in a line with `.xml` appended: `a` for `JPEGImages/a.jpg.xml`."""
    image = PurePosixPath(xml_name.replace("\\", "/")[: -len(".xml")])
    return image.stem if image.suffix.lower() in KNOWN_SUFFIXES else image.name


def _read_image(devkit: Path, year: str, xml_name: str, image: str, encoding: str | None) -> VocImage:
    annotation, file_name = f"{year}/Annotations/{xml_name}", f"{year}/JPEGImages/{image}"
    try:
        content, is_guess = _parse(_inside(devkit, annotation), encoding)
        objects = tuple(_object(element) for element in content.findall("object"))
        if is_guess:
            _check_ascii(objects)
        height, width = (_pixels(content.findtext(f"size/{side}")) for side in ("height", "width"))
        has_size = height > 0 and width > 0
        if not has_size:
            height, width = _size_of_file(_inside(devkit, file_name))
    except _AnnotationError as error:
        issue_type, detail = error.args
        return VocImage(annotation, file_name, error=(issue_type, detail))
    return VocImage(annotation, file_name, height, width, has_size, objects)


def _inside(devkit: Path, name: str) -> Path:
    path = safe_join(devkit, name)
    if path is None:
        raise _AnnotationError("file outside the data root", f"{shorten(name)} is outside {devkit}")
    return path


def _check_ascii(objects: Sequence[VocObject]) -> None:
    """Refuse class names whose encoding is a guess: the checkpoint would keep wrong ones."""
    if names := [name for name, _, _ in objects if name and not name.isascii()]:
        raise _AnnotationError(
            "annotation file of an unknown encoding",
            f"a class name reads {escape_text(names[0])} as latin-1, but the file is not UTF-8 and declares no "
            "encoding; set dataset.encoding, for example to gbk, cp1251 or latin-1",
        )


def _parse(path: Path, encoding: str | None) -> tuple[ElementTree.Element, bool]:
    """Return the content of an XML file, and whether its encoding is a guess."""
    try:
        check_regular_file(path)
        data = path.read_bytes()
    except FileNotFoundError:
        raise _AnnotationError("missing annotation file", "no such file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise _AnnotationError("unreadable annotation file", str(reason)) from None
    try:
        text, is_guess = decode_xml(data, encoding)
    except (UnicodeError, LookupError) as error:
        raise _AnnotationError(
            "unreadable annotation file", f"not of the encoding it declares: {first_line(error)}"
        ) from None
    # Entities can expand a file of a kilobyte to gigabytes. In decoded text no encoding can hide them.
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise _AnnotationError("annotation file with a document type", "not supported, nor are entities; remove it")
    try:
        content = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise _AnnotationError("unreadable annotation file", f"broken XML: {first_line(error)}") from None
    if content.tag != "annotation":
        raise _AnnotationError("unreadable annotation file", f"it holds <{escape_text(content.tag)}>, not <annotation>")
    return content, is_guess


def _size_of_file(path: Path) -> tuple[int, int]:
    """Return (height, width) from the header of an image file."""
    try:
        return read_image_size(path)
    except UserError as error:
        raise _AnnotationError(
            "annotation file without an image size", f"and the image cannot be read: {error}"
        ) from None


def _object(element: ElementTree.Element) -> VocObject:
    name = (element.findtext("name") or "").strip()
    difficult = (element.findtext("difficult") or "").strip()
    if difficult.lower() not in FLAGS:
        raise _AnnotationError("invalid annotation file", f"difficult of an object is {shorten(difficult)}, not 0 or 1")
    return VocObject(name or None, _box(element.find("bndbox")), FLAGS[difficult.lower()])


def _box(element: ElementTree.Element | None) -> list[Any]:
    """Return COCO's [x, y, w, h] of corners that count pixels from 1, the last one included."""
    if element is None:
        return []
    texts = [element.findtext(corner) for corner in CORNERS]
    try:
        x1, y1, x2, y2 = corners = [_number(text or "") for text in texts]
    except ValueError:
        return texts
    if not all(map(is_finite, corners)):
        return corners
    # Equal corners are an accidental click, not an object of one pixel: a box without area.
    return [x1 - 1, y1 - 1, x2 - x1 + (x2 > x1), y2 - y1 + (y2 > y1)]


def _number(text: str) -> float:
    """Parse a number, with a decimal point or comma."""
    return float(text.replace(",", ".") if text.count(",") == 1 and "." not in text else text)


def _pixels(text: str | None) -> int:
    """Parse a side of an image, 0 if it is no number."""
    try:
        return int(_number(text or ""))
    except (ValueError, OverflowError):
        return 0
