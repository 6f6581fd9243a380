"""What can be wrong with a data set, as a table: a small valid one, what spoils it, and what is to come of it.

A line of the table says what `e3va check-data` has to print, and what training has to do: `TRAINS` on all of it,
`drops` an object with a reason that is counted, `stops` with one line. Adding a kind of damage is adding a line.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

Spoil = Callable[[Path], object]
NAN, INF = float("nan"), float("inf")
NESTED = "six hundred lists in each other"  # written as such; Python's own writer may not go so deep


class Outcome(NamedTuple):
    """What training does, and the reason that it gives."""

    does: str
    reason: str = ""


class Damage(NamedTuple):
    """One kind of damage: `says` is what a line of `check-data` contains, None where it finds nothing to tell."""

    name: str
    spoil: Spoil
    says: str | None
    training: Outcome


TRAINS = Outcome("trains")


def drops(reason: str) -> Outcome:
    return Outcome("drops", reason)


def stops(reason: str) -> Outcome:
    return Outcome("stops", reason)


def pixels(height: int = 30, width: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


# Sound data sets, each with a file outside that nobody may open


def build_coco(root: Path) -> None:
    """Images 11 (a.png) and 5 (sub/b.jpg) of 40 x 30 pixels; dogs (3) 1 and 2 in the first, a cat (7) in the other."""
    (root / "images/sub").mkdir(parents=True)
    Image.fromarray(pixels()).save(root / "images/a.png")
    Image.fromarray(pixels()).save(root / "images/sub/b.jpg")
    content = {
        "images": [
            {"id": 11, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 5, "file_name": "sub/b.jpg", "width": 40, "height": 30},
        ],
        "annotations": [annotation(1), annotation(2), annotation(3, image_id=5, category_id=7)],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
    }
    (root / "instances.json").write_text(json.dumps(content))


def annotation(number: int, **keys: Any) -> dict[str, Any]:
    square = [2, 3, 12, 3, 12, 23, 2, 23]
    entry = {"id": number, "image_id": 11, "category_id": 3, "bbox": [2, 3, 10, 20], "segmentation": [square]}
    return {**entry, "area": 200, "iscrowd": 0, **keys}


def build_voc(root: Path) -> None:
    """Images a and b of 40 x 30 pixels, each with a person."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / "VOC2007" / folder).mkdir(parents=True)
    for name in "ab":
        Image.fromarray(pixels()).save(root / f"VOC2007/JPEGImages/{name}.jpg")
        (root / f"VOC2007/Annotations/{name}.xml").write_text(sheet(thing()))
    (root / "VOC2007/ImageSets/Main/train.txt").write_text("a\nb\n")


def thing(name: str = "<name>person</name>", corners: Sequence[object] = (3, 4, 12, 23), more: str = "") -> str:
    sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=False)
    box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    return f"<object>{name}{more}<bndbox>{box}</bndbox></object>"


def sheet(*things: str, size: str = "<size><width>40</width><height>30</height></size>") -> str:
    return f"<annotation>{size}{''.join(things)}</annotation>"


def build_ade(root: Path) -> None:
    """Images a and b of 40 x 30 pixels with semantic masks of three classes."""
    for folder in ("images/training", "annotations/training"):
        (root / folder).mkdir(parents=True)
    for name in "ab":
        Image.fromarray(pixels()).save(root / f"images/training/{name}.jpg")
        Image.fromarray(labels()).save(root / f"annotations/training/{name}.png")


def labels() -> np.ndarray:
    return np.arange(1200, dtype=np.uint8).reshape(30, 40) % 4


# What spoils a file


def replaced(name: str, content: bytes | str) -> Spoil:
    return lambda root: (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(name: str, part: float) -> Spoil:
    def spoil(root: Path) -> None:
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[: int(part * len(content))])

    return spoil


def gone(name: str) -> Spoil:
    return lambda root: (root / name).unlink()


def folder(name: str) -> Spoil:
    return lambda root: ((root / name).unlink(), (root / name).mkdir())


def pipe(name: str) -> Spoil:
    return lambda root: ((root / name).unlink(), os.mkfifo(root / name))


def link(name: str, target: str) -> Spoil:
    return lambda root: ((root / name).unlink(), (root / name).symlink_to(target))


def drawn(name: str, picture: Image.Image, kind: str = "PNG", **options: Any) -> Spoil:
    return lambda root: picture.save(root / name, format=kind, **options)


# What spoils a COCO file

NO_BOX = "box is not four finite numbers"
NO_MASK = drops("no usable mask")
JSON = "instances.json"


def document(change: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(root: Path) -> None:
        file = root / "instances.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content).replace(json.dumps(NESTED), 600 * "[" + 600 * "]"))

    return spoil


def of_key(key: str, value: Any) -> Spoil:
    return document(lambda content: content.update({key: value}))


def first(key: str, **values: Any) -> Spoil:
    return document(lambda content: content[key][0].update(values))


def without(key: str, name: str) -> Spoil:
    return document(lambda content: content[key][0].pop(name))


def more(key: str, entry: dict[str, Any]) -> Spoil:
    return document(lambda content: content[key].append(entry))


def box(*values: Any) -> Spoil:
    return first("annotations", bbox=list(values))


def mask(value: Any) -> Spoil:
    return first("annotations", segmentation=value)


def rle(**values: Any) -> Spoil:
    return mask({"size": [30, 40], "counts": [0, 1200], **values})


def text_of(old: str, new: str) -> Spoil:
    """Exchanges text in the file, for what Python's `json` would not write."""

    def spoil(root: Path) -> None:
        text = (root / "instances.json").read_text()
        assert old in text
        (root / "instances.json").write_text(text.replace(old, new, 1))

    return spoil


def latin(root: Path) -> None:
    (root / JSON).write_bytes((root / JSON).read_bytes().replace(b"dog", b"d\xf6g"))


def recoded(name: str, encoding: str) -> Spoil:
    return lambda root: (root / name).write_bytes((root / name).read_text().encode(encoding))


def name_through_link(root: Path) -> None:
    """`sub/../secret.png` is in the folder by its letters, and outside for a system that follows the link first."""
    (root / "images/sub/b.jpg").rename(root / "images/b.jpg")
    (root / "images/sub").rmdir()
    (root / "images/sub").symlink_to(root.parent / "outside/folder")
    document(lambda content: content["images"][1].update(file_name="sub/../secret.png"))(root)


COCO_FILE = [
    Damage("empty file", replaced(JSON, ""), "is not JSON", stops("is not JSON")),
    Damage("cut in the middle", cut(JSON, 0.5), "is not JSON", stops("is not JSON")),
    Damage("a web page", replaced(JSON, "<html>404</html>"), "is not JSON", stops("is not JSON")),
    Damage("a picture", replaced(JSON, b"\x89PNG\r\n\xff\xfe"), "is not JSON", stops("is not JSON")),
    Damage("text in latin-1", latin, "is not JSON", stops("is not JSON")),
    Damage("nested 100,000 deep", replaced(JSON, "[" * 100_000), "is not JSON", stops("is not JSON")),
    Damage("a number of 5,000 digits", text_of('"id": 11', f'"id": {"9" * 5000}'), "is not JSON", stops("not JSON")),
    Damage("a key twice", text_of('"iscrowd": 0', '"iscrowd": 0, "iscrowd": 1'), "'iscrowd' twice", stops("twice")),
    Damage("a list twice", text_of('"images":', '"images": [], "images":'), "'images' twice", stops("twice")),
    Damage("a list at the top", replaced(JSON, "[]"), "it holds a list", stops("it holds a list")),
    Damage("null at the top", replaced(JSON, "null"), "it holds null", stops("it holds null")),
    Damage("no images key", document(lambda c: c.pop("images")), "it has no 'images'", stops("no 'images'")),
    Damage("images null", of_key("images", None), "'images' is null", stops("'images' is null")),
    Damage("annotations an object", of_key("annotations", {}), "is an object, not a list", stops("is an object")),
    Damage("categories a text", of_key("categories", "dog"), "'categories' is a string", stops("is a string")),
    Damage("an entry that is a number", more("images", 7), "images[2] is not an object", stops("images[2] is not")),  # type: ignore[arg-type]
    Damage("no images", of_key("images", []), "unknown image id", stops("'images' is empty")),
    Damage("no annotations", of_key("annotations", []), "image without objects: 2", stops("no annotations")),
    Damage("no categories", of_key("categories", []), "unknown category id: 3", stops("'categories' is empty")),
    Damage("the file a folder", folder(JSON), "no annotation file", stops("no annotation file")),
    Damage("the file a pipe", pipe(JSON), "no annotation file", stops("no annotation file")),
    Damage("the file a link to itself", link(JSON, JSON), "no annotation file", stops("no annotation file")),
    Damage("no folder of images", lambda root: (root / "images").rename(root / "x"), "no folder", stops("no folder")),
]
COCO_ENTRIES = [
    # images
    Damage("image id a number in text", first("images", id="11"), None, TRAINS),
    Damage("image id a text", first("images", id="a11"), "id is 'a11'", stops("id is 'a11'")),
    Damage("image id true", first("images", id=True), "id is True", stops("id is True")),
    Damage("image id null", first("images", id=None), "id is None", stops("id is None")),
    Damage("image id missing", without("images", "id"), "id is None", stops("id is None")),
    Damage("image id a float", first("images", id=11.0), None, TRAINS),
    Damage("image id a fraction", first("images", id=11.5), "id is 11.5", stops("id is 11.5")),
    Damage("image id a list", first("images", id=[11]), "id is [11]", stops("id is [11]")),
    Damage("image id of 31 digits", first("images", id=10**30), "id is 1000", stops("id is 1000")),
    Damage("image id nested 600 deep", first("images", id=NESTED), "id is [[[", stops("id is [[[")),
    Damage("image id of a million items", first("images", id=[0] * 10**6), "id is [0, 0", stops("id is [0")),
    Damage("image id twice", first("images", id=5), "duplicate image id: 1", stops("2 images have the id 5")),
    Damage("file name twice", first("images", file_name="sub/b.jpg"), "duplicate file name: 1", TRAINS),
    Damage("no file name", without("images", "file_name"), "file_name is None", stops("file_name is None")),
    Damage("file name empty", first("images", file_name=""), "file_name is ''", stops("file_name is ''")),
    Damage("file name a number", first("images", file_name=7), "file_name is 7", stops("file_name is 7")),
    Damage("file name upwards", first("images", file_name="../../outside/secret.png"), "outside", stops("is outside")),
    Damage("file name absolute", first("images", file_name="/etc/passwd"), "outside", stops("is outside")),
    Damage("file name upwards through a link", name_through_link, "missing image: 1", stops("no such image")),
    Damage("file name with a zero byte", first("images", file_name="a\0.png"), "file_name is 'a\\x00", stops("a\\x00")),
    Damage("file name with a line break", first("images", file_name="a\nb.png"), "file_name is 'a\\nb", stops("a\\nb")),
    Damage("file name with half a letter", first("images", file_name="\ud800.png"), "\\ud800", stops("\\ud800")),
    Damage(
        "file name of 5,000 letters", first("images", file_name="a" * 5000), "missing image", stops("no such image")
    ),
    Damage("file name a folder", first("images", file_name="sub"), "unreadable image: 1", stops("not a file")),
    Damage("file name an address", first("images", file_name="http://x/a"), "missing image", stops("no such image")),
    Damage("no such image", gone("images/a.png"), "missing image: 1", stops("no such image")),
    Damage("height 0", first("images", height=0), "height is 0", stops("height is 0")),
    Damage("height negative", first("images", height=-30), "height is -30", stops("height is -30")),
    Damage("height a number in text", first("images", height="30"), None, TRAINS),
    Damage("height a text", first("images", height="30px"), "height is '30px'", stops("height is '30px'")),
    Damage("height a fraction", first("images", height=30.5), "height is 30.5", stops("height is 30.5")),
    Damage("height missing", without("images", "height"), "height is None", stops("height is None")),
    Damage("height of 31 digits", first("images", height=10**30), "height is 1000", stops("height is 1000")),
    Damage("100,000 x 100,000", first("images", height=10**5, width=10**5), "exceed", stops("100000x100000")),
    Damage(
        "height and width exchanged",
        first("images", height=40, width=30),
        "size mismatch: 1",
        stops("30x40 are annotated"),
    ),
    # categories
    Damage("category id a number in text", first("categories", id="7"), None, TRAINS),
    Damage("category id a text", first("categories", id="x7"), "id is 'x7'", stops("id is 'x7'")),
    Damage("category name a number", first("categories", name=7), None, TRAINS),
    Damage("category id twice", first("categories", id=3), "duplicate category id: 1", stops("2 categories have")),
    Damage("category id of 31 digits", first("categories", id=10**30), "id is 1000", stops("id is 1000")),
    Damage("category name twice", first("categories", name="dog"), "duplicate category name: 1", TRAINS),
    Damage("no category name", without("categories", "name"), "name is None", stops("name is None")),
    Damage("category name a list", first("categories", name=["cat"]), "name is ['cat']", stops("['cat']")),
    Damage("category name that moves the cursor", first("categories", name="\x1b[2J"), "\\x1b[2J", stops("\\x1b[2J")),
    Damage("category name with half a letter", first("categories", name="\udfff"), "\\udfff", stops("\\udfff")),
    Damage("category name like markup", first("categories", name="[/red]"), None, TRAINS),
    # annotations
    Damage("unknown image", first("annotations", image_id=99), "unknown image id: 1", drops("unknown image id")),
    Damage("image of a number in text", first("annotations", image_id="11"), None, TRAINS),
    Damage("image of a text", first("annotations", image_id="a11"), "image id 'a11'", drops("unknown image id")),
    Damage("image of true", first("annotations", image_id=True), "image id True", drops("unknown image id")),
    Damage("image of null", first("annotations", image_id=None), "image id None", drops("unknown image id")),
    Damage("image of NaN", first("annotations", image_id=NAN), "image id nan", drops("unknown image id")),
    Damage("image nested 600 deep", first("annotations", image_id=NESTED), "[[[", drops("unknown image id")),
    Damage("image 11.0", first("annotations", image_id=11.0), None, TRAINS),
    Damage("unknown category", first("annotations", category_id=9), "category id 9", drops("unknown category id")),
    Damage("category of a list", first("annotations", category_id=[3]), "id [3]", drops("unknown category id")),
    Damage("no category", without("annotations", "category_id"), "id None", drops("unknown category id")),
    Damage("annotation id twice", first("annotations", id=2), "duplicate annotation id: 1", TRAINS),
    Damage("annotation id a text", first("annotations", id="one"), "annotation without an id: 1", TRAINS),
    Damage("annotation id of 31 digits", first("annotations", id=10**30), "annotation without an id: 1", TRAINS),
    Damage("no annotation id", without("annotations", "id"), "annotation without an id: 1", TRAINS),
    Damage(
        "crowd of a text", first("annotations", iscrowd="no"), "iscrowd is neither 0 nor 1: 1", stops("is 'no', not 0")
    ),
    Damage(
        "crowd of a list", first("annotations", iscrowd=[0]), "iscrowd is neither 0 nor 1: 1", stops("is [0], not 0")
    ),
    Damage("crowd in text", first("annotations", iscrowd="1"), None, drops("crowd")),
    Damage("crowd true", first("annotations", iscrowd=True), None, drops("crowd")),
    Damage("no crowd in text", first("annotations", iscrowd="0"), None, TRAINS),
    Damage("no crowd false", first("annotations", iscrowd=False), None, TRAINS),
    Damage("area a number in text", first("annotations", area="200"), None, TRAINS),
    Damage("area NaN", first("annotations", area=NAN), "area is not a number: 1", TRAINS),
    Damage("area a text", first("annotations", area="big"), "area is not a number: 1", TRAINS),
    Damage("area negative", first("annotations", area=-1), "area is not a number: 1", TRAINS),
]
COCO_SHAPES = [
    Damage("no box", without("annotations", "bbox"), None, TRAINS),
    Damage("box null", first("annotations", bbox=None), None, TRAINS),
    Damage("box of zeros", box(0, 0, 0, 0), None, TRAINS),
    Damage("neither box nor mask", first("annotations", bbox=None, segmentation=[]), NO_BOX, drops(NO_BOX)),
    Damage("box a text", first("annotations", bbox="2 3 10 20"), NO_BOX, drops(NO_BOX)),
    Damage("box an object", first("annotations", bbox={"x": 1}), NO_BOX, drops(NO_BOX)),
    Damage("box of three numbers", box(2, 3, 10), NO_BOX, drops(NO_BOX)),
    Damage("box of numbers in text", box("2", "3", "10.0", "2e1"), None, TRAINS),
    Damage("box of texts", box("2", "3", "ten", "20"), NO_BOX, drops(NO_BOX)),
    Damage("box of truth values", box(True, True, True, True), NO_BOX, drops(NO_BOX)),
    Damage("box of lists", box([2], [3], [10], [20]), NO_BOX, drops(NO_BOX)),
    Damage("box nested 600 deep", box(NESTED, 3, 10, 20), NO_BOX, drops(NO_BOX)),
    Damage("box with NaN", box(NAN, 3, 10, 20), NO_BOX, drops(NO_BOX)),
    Damage("box with infinity", box(2, 3, INF, 20), NO_BOX, drops(NO_BOX)),
    Damage("box with 1e999", text_of("[2, 3, 10, 20]", "[2, 3, 1e999, 20]"), NO_BOX, drops(NO_BOX)),
    Damage("box with 10^400", box(2, 3, 10**400, 20), NO_BOX, drops(NO_BOX)),
    Damage("box with 1e300", box(2, 3, 1e300, 20), NO_BOX, drops(NO_BOX)),
    Damage("box of negative width", box(12, 3, -10, 20), "box without area: 1", drops("box without area")),
    Damage("box of no height", box(2, 3, 10, 0), "box without area: 1", drops("box without area")),
    Damage("box beside the image", box(50, 3, 10, 20), "box outside the image: 1", drops("box outside the image")),
    Damage("box above the image", box(2, -30, 10, 20), "box outside the image: 1", drops("box outside the image")),
    Damage("box half outside", box(35, 3, 10, 20), "box partly outside the image: 1", TRAINS),
    Damage("box as large as a float", box(-1e37, -1e37, 2e37, 2e37), "box partly outside the image: 1", TRAINS),
    Damage(
        "box of half a pixel", box(2, 3, 0.5, 20), "box smaller than one pixel: 1", drops("box smaller than one pixel")
    ),
    Damage("polygon of two points", mask([[1, 2, 3, 4]]), "fewer than 3 points: 1", NO_MASK),
    Damage("polygon of an odd length", mask([[1, 2, 3, 4, 5, 6, 7]]), "malformed polygon", NO_MASK),
    Damage("polygon of numbers in text", mask([["2", "3", "12", "3", "12", "23"]]), None, TRAINS),
    Damage("polygon of texts", mask([["a", "2"] * 3]), "malformed polygon", NO_MASK),
    Damage("polygon of truth values", mask([[True] * 6]), "malformed polygon", NO_MASK),
    Damage("polygon with NaN", mask([[1, 2, 3, 4, 5, NAN]]), "malformed polygon", NO_MASK),
    Damage("polygon with 1e30", mask([[1, 2, 3, 4, 5, 1e30]]), "malformed polygon", NO_MASK),
    Damage("polygon with 10^400", mask([[1, 2, 3, 4, 5, 10**400]]), "malformed polygon", NO_MASK),
    Damage("polygon of 80 GB", mask([[-9e5, 0, 9e5, 9] * 999]), "malformed polygon", NO_MASK),
    Damage("polygon of polygons", mask([[[1, 2, 3, 4, 5, 6]]]), "malformed polygon", NO_MASK),
    Damage("polygon nested 600 deep", mask(NESTED), "malformed polygon", NO_MASK),
    Damage("polygon beside the polygons", mask([1, 2, 3, 4, 5, 6]), "malformed polygon", NO_MASK),
    Damage("no polygons", mask([]), "annotation without a mask: 1", NO_MASK),
    Damage("mask null", mask(None), "annotation without a mask: 1", NO_MASK),
    Damage("mask a file name", mask("mask.png"), "neither polygons nor RLE: 1", NO_MASK),
    Damage("mask a number", mask(7), "neither polygons nor RLE: 1", NO_MASK),
    Damage("RLE of another size", rle(size=[40, 30]), "RLE of another size than the image: 1", NO_MASK),
    Damage("RLE of a huge size", rle(size=[10**9, 10**9]), "RLE of another size than the image: 1", NO_MASK),
    Damage("RLE of a size in texts", rle(size=["30", "40"]), "malformed RLE: 1", NO_MASK),
    Damage("RLE without counts", mask({"size": [30, 40]}), "malformed RLE: 1", NO_MASK),
    Damage("RLE too short", rle(counts=[0, 7]), "malformed RLE: 1", NO_MASK),
    Damage("RLE with a negative run", rle(counts=[-1, 1201]), "malformed RLE: 1", NO_MASK),
    Damage("RLE whose sum overflows", rle(counts=[2**63 - 1, 2**63 - 1, 1202]), "malformed RLE", NO_MASK),
    Damage("RLE with fractions", rle(counts=[0.5, 1199.5]), "malformed RLE: 1", NO_MASK),
    Damage("RLE nested 600 deep", rle(counts=NESTED), "malformed RLE: 1", NO_MASK),
    Damage("RLE text without an end", rle(counts="oooo"), "malformed RLE: 1", NO_MASK),
    Damage("RLE text of other letters", rle(counts="\x01\u00e4"), "malformed RLE: 1", NO_MASK),
    Damage("RLE text too long", rle(counts="9" * 10**6), "malformed RLE: 1", NO_MASK),
]
COCO_SOUND = [
    Damage("UTF-8 with a byte order mark", recoded(JSON, "utf-8-sig"), None, TRAINS),
    Damage("UTF-16", recoded(JSON, "utf-16"), None, TRAINS),
]


# Images: file a.png of the COCO data set, of 40 x 30 pixels in its annotations

A = "images/a.png"
RGB = Image.fromarray(pixels())
SECOND: dict[str, Any] = {"save_all": True, "append_images": [Image.fromarray(255 - pixels())]}


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int) -> bytes:
    """A valid head of a gray PNG of that size, and next to no pixels."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")


def bytes_of(picture: Image.Image, kind: str, **options: Any) -> bytes:
    stream = BytesIO()
    picture.save(stream, format=kind, **options)
    return stream.getvalue()


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


def oriented(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def resized(width: int, height: int) -> Spoil:
    def spoil(root: Path) -> None:
        Image.fromarray(pixels(height, width)).save(root / A)
        outline = [0, 0, width, 0, width, height, 0, height]
        first("images", width=width, height=height)(root)
        document(lambda content: content["annotations"].pop(1))(root)
        first("annotations", bbox=[0, 0, width, height], segmentation=[outline])(root)

    return spoil


PNG, JPEG = bytes_of(RGB, "PNG"), bytes_of(RGB, "JPEG")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\nshowpage\n"
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="30"/>'
SVG_UNSUPPORTED = "SVG files are not supported"
EPS_UNSUPPORTED = "PDF or PostScript files are not supported"
UNREADABLE = "unreadable image: 1"
DEEP = "image of more than 8 bits: 1"
CANNOT = stops("cannot read the image")
IMAGES = [
    Damage("image of no bytes", replaced(A, ""), UNREADABLE, CANNOT),
    Damage("PNG cut short", replaced(A, PNG[:-600]), UNREADABLE, CANNOT),
    Damage("JPEG cut short", replaced(A, JPEG[:-200]), UNREADABLE, CANNOT),
    Damage("head of a PNG alone", replaced(A, PNG[:40]), UNREADABLE, CANNOT),
    Damage("PNG with a wrong checksum", replaced(A, flipped(PNG, 20)), UNREADABLE, CANNOT),
    Damage("PNG with a wrong byte", replaced(A, flipped(PNG, 100)), UNREADABLE, CANNOT),
    Damage("a web page as image", replaced(A, "<html>404</html>"), "not an image", stops("not an image")),
    Damage("SVG", replaced(A, SVG), SVG_UNSUPPORTED, stops(SVG_UNSUPPORTED)),
    Damage("EPS, which is a program", replaced(A, EPS), EPS_UNSUPPORTED, stops(EPS_UNSUPPORTED)),
    Damage("an image a folder", folder(A), UNREADABLE, stops("not a file")),
    Damage("an image a pipe", pipe(A), UNREADABLE, stops("not a file")),
    Damage("an image a device", link(A, "/dev/zero"), UNREADABLE, stops("not a file")),
    Damage("an image a link to itself", link(A, "a.png"), UNREADABLE, CANNOT),
    Damage("an image a link to nothing", link(A, "nothing.png"), "missing image: 1", stops("no such image")),
    Damage("link to an image in the root", link(A, "sub/b.jpg"), None, TRAINS),
    Damage("image of another size", drawn(A, RGB.resize((30, 30))), "size mismatch: 1", stops("has 30x30 pixels")),
    Damage("60,000 x 60,000 in 1 kB", replaced(A, png_of(60_000, 60_000)), UNREADABLE, stops("too large")),
    Damage("1 x 1 pixels", resized(1, 1), None, TRAINS),
    Damage("3,000 x 1 pixels", resized(3000, 1), None, TRAINS),
    Damage("1 x 3,000 pixels", resized(1, 3000), None, TRAINS),
    Damage("CMYK", drawn(A, RGB.convert("CMYK"), "JPEG"), None, TRAINS),
    Damage("YCbCr", drawn(A, RGB.convert("YCbCr"), "TIFF"), None, TRAINS),
    Damage("LAB", drawn(A, Image.new("LAB", (40, 30)), "TIFF"), None, TRAINS),
    Damage("grey", drawn(A, RGB.convert("L")), None, TRAINS),
    Damage("grey of 16 bits", drawn(A, Image.fromarray(np.full((30, 40), 40_000, np.uint16))), DEEP, TRAINS),
    Damage("grey of 32 bits", drawn(A, Image.fromarray(np.full((30, 40), -5, np.int32)), "TIFF"), DEEP, TRAINS),
    Damage("grey of floats", drawn(A, Image.new("F", (40, 30), 0.5), "TIFF"), DEEP, TRAINS),
    Damage("grey of no number", drawn(A, Image.new("F", (40, 30), NAN), "TIFF"), DEEP, TRAINS),
    Damage("black and white", drawn(A, RGB.convert("1")), None, TRAINS),
    Damage("palette", drawn(A, RGB.quantize(16)), None, TRAINS),
    Damage("palette with transparency", drawn(A, RGB.quantize(16), transparency=b"\0\x80"), None, TRAINS),
    Damage("grey with transparency", drawn(A, RGB.convert("LA")), None, TRAINS),
    Damage("colours with transparency", drawn(A, RGB.convert("RGBA")), None, TRAINS),
    Damage("turned by EXIF", drawn(A, RGB, "JPEG", exif=oriented(6)), "EXIF orientation: 1", TRAINS),
    Damage("upside down by EXIF", drawn(A, RGB, exif=oriented(3)), "EXIF orientation: 1", TRAINS),
    Damage("broken EXIF", drawn(A, RGB, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff"), None, TRAINS),
    Damage("animated GIF", drawn(A, RGB, "GIF", **SECOND), "animated image: 1", TRAINS),
    Damage("animated PNG", drawn(A, RGB, **SECOND), "animated image: 1", TRAINS),
    Damage("animated WebP", drawn(A, RGB, "WEBP", **SECOND), "animated image: 1", TRAINS),
    Damage("TIFF of two pages", drawn(A, RGB, "TIFF", **SECOND), "animated image: 1", TRAINS),
    Damage("bytes after the image", replaced(A, PNG + b"\0" * 100), None, TRAINS),
    Damage("suffix of another kind", replaced(A, JPEG), None, TRAINS),
]


def linked_out(root: Path) -> None:
    """As people do who keep images on another disk; not what a file name can do."""
    link(A, "../../elsewhere/a.png")(root)
    (root.parent / "elsewhere").mkdir()
    Image.fromarray(pixels()).save(root.parent / "elsewhere/a.png")


IMAGES.append(Damage("link out of the root", linked_out, "link to a file outside the folder of images: 1", TRAINS))

# Pascal VOC's XML

XML, LIST, PHOTO = "VOC2007/Annotations/a.xml", "VOC2007/ImageSets/Main/train.txt", "VOC2007/JPEGImages/a.jpg"
LOL = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
LAUGHS = f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY l0 "ha">{LOL}]>' + sheet(thing("<name>&l9;</name>"))
EXTERNAL = '<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>' + sheet(thing("<name>&e;</name>"))
PARAMETERS = '<!DOCTYPE x SYSTEM "../../../outside/evil.dtd">' + sheet(thing())
DEEP = "<object>" * 10**5 + "</object>" * 10**5
PERSON = thing()
BEAR = sheet(thing("<name>b\xe4r</name>"))
OWNER = sheet("<owner><name>V\xe1zquez</name></owner>", thing())
HIDDEN = b'<?xml version="1.0" encoding="utf-7"?>' + LAUGHS.partition("?>")[2].encode("utf-7")
DOCTYPE, BROKEN = "annotation file with a document type", "unreadable annotation file"


def declared(encoding: str, name: str, says: str | None = None) -> bytes:
    """An XML file in an encoding, which it declares unless it `says` another."""
    text = f'<?xml version="1.0" encoding="{says or encoding}"?>' + sheet(thing(f"<name>{name}</name>"))
    return text.encode(encoding)


def objects(*things: str) -> Spoil:
    return replaced(XML, sheet(PERSON, *things))


def size(width: object, height: object) -> Spoil:
    return replaced(XML, sheet(PERSON, size=f"<size><width>{width}</width><height>{height}</height></size>"))


def no_size(root: Path) -> None:
    replaced(XML, sheet(PERSON, size=""))(root)


def no_size_and(spoil: Spoil) -> Spoil:
    return lambda root: (no_size(root), spoil(root))


VOC = [
    Damage("XML of no bytes", replaced(XML, ""), f"{BROKEN}: 1", stops("broken XML")),
    Damage("XML cut short", cut(XML, 0.7), f"{BROKEN}: 1", stops("broken XML")),
    Damage("XML that is a picture", replaced(XML, b"\x89PNG\0\xff"), f"{BROKEN}: 1", stops("broken XML")),
    Damage("XML that is a web page", replaced(XML, "<html/>"), "it holds <html>", stops("it holds <html>")),
    Damage("XML in UTF-16", recoded(XML, "utf-16"), None, TRAINS),
    Damage("XML in who knows what", replaced(XML, BEAR.encode("latin-1")), "unknown encoding: 1", stops("dataset.enc")),
    Damage("XML in GBK, declared", replaced(XML, declared("gbk", "\u718a")), None, TRAINS),
    Damage(
        "XML of another encoding than declared",
        replaced(XML, declared("gbk", "\u718a", "ascii")),
        BROKEN,
        stops("ot of the enc"),
    ),
    Damage("XML of no encoding", replaced(XML, declared("utf-8", "a", "klingon")), BROKEN, stops("klingon")),
    Damage("XML of rot13", replaced(XML, declared("utf-8", "a", "rot13")), BROKEN, stops("rot13")),
    Damage("another word in latin-1", replaced(XML, OWNER.encode("latin-1")), None, TRAINS),
    Damage("a billion laughs in UTF-16", replaced(XML, LAUGHS.encode("utf-16")), f"{DOCTYPE}: 1", stops(DOCTYPE)),
    Damage("a billion laughs in UTF-7", replaced(XML, HIDDEN), f"{DOCTYPE}: 1", stops(DOCTYPE)),
    Damage("difficult true", objects(thing(more="<difficult>True</difficult>")), None, drops("difficult")),
    Damage("difficult unspecified", objects(thing(more="<difficult>Unspecified</difficult>")), None, TRAINS),
    Damage("difficult maybe", objects(thing(more="<difficult>maybe</difficult>")), "is 'maybe'", stops("is 'maybe'")),
    Damage("corners with commas", objects(thing(corners=("3,5", "4", "12,25", "23"))), None, TRAINS),
    Damage("XML with a byte order mark", recoded(XML, "utf-8-sig"), None, TRAINS),
    Damage("a billion laughs", replaced(XML, LAUGHS), f"{DOCTYPE}: 1", stops(DOCTYPE)),
    Damage("an external entity", replaced(XML, EXTERNAL), f"{DOCTYPE}: 1", stops(DOCTYPE)),
    Damage("an external document type", replaced(XML, PARAMETERS), f"{DOCTYPE}: 1", stops(DOCTYPE)),
    Damage("XML nested 100,000 deep", replaced(XML, "<annotation>" * 10**5), f"{BROKEN}: 1", stops("broken XML")),
    Damage("objects nested 100,000 deep", objects(DEEP), "object without a name: 1", drops("object without a name")),
    Damage("no XML", gone(XML), "missing annotation file: 1", stops("no such file")),
    Damage("XML a folder", folder(XML), f"{BROKEN}: 1", stops("not a file")),
    Damage("XML a pipe", pipe(XML), f"{BROKEN}: 1", stops("not a file")),
    Damage("XML a link to itself", link(XML, "a.xml"), f"{BROKEN}: 1", stops(BROKEN)),
    Damage("no size", no_size, "size taken from the image file: 1", TRAINS),
    Damage("size 0", size(0, 0), "size taken from the image file: 1", TRAINS),
    Damage("size a text", size("x", "nan"), "size taken from the image file: 1", TRAINS),
    Damage("size 1e300", size("1e300", 9), "width is 1000", stops("width is 1000")),
    Damage("another size", size(30, 40), "size mismatch: 1", stops("30x40 are annotated")),
    Damage("no name", objects(thing("")), "object without a name: 1", drops("object without a name")),
    Damage("name of blanks", objects(thing("<name> </name>")), "without a name: 1", drops("object without a name")),
    Damage("name of two lines", objects(thing("<name>a\nb</name>")), "name is 'a\\nb'", stops("name is 'a\\nb'")),
    Damage("no corners", objects(thing(corners=())), NO_BOX, drops(NO_BOX)),
    Damage("three corners", objects(thing(corners=(1, 2, 3))), NO_BOX, drops(NO_BOX)),
    Damage("corners of texts", objects(thing(corners=("a", 2, 3, 4))), NO_BOX, drops(NO_BOX)),
    Damage("corners with NaN", objects(thing(corners=("nan", 2, 9, 9))), NO_BOX, drops(NO_BOX)),
    Damage("corners with 1e999", objects(thing(corners=(1, 2, "1e999", 9))), NO_BOX, drops(NO_BOX)),
    Damage("corners of no size", objects(thing(corners=(5, 5, 5, 9))), "without area: 1", drops("box without area")),
    Damage("corners exchanged", objects(thing(corners=(9, 9, 5, 5))), "without area: 1", drops("box without area")),
    Damage("corners outside", objects(thing(corners=(50, 5, 60, 9))), "box outside", drops("box outside the image")),
    Damage("list of names upwards", replaced(LIST, "a\n../../../outside/x\n"), "outside", stops("is outside")),
    Damage("list of absolute names", replaced(LIST, "a\n/etc/x\n"), "missing annotation file", stops("no such file")),
    Damage("list in latin-1", replaced(LIST, b"a\n\xff\n"), "cannot read the list", stops("cannot read the list")),
    Damage("list without names", replaced(LIST, "\n\n"), "0 images", stops("'images' is empty")),
    Damage("list a folder", folder(LIST), "no ImageSets/Main", stops("no ImageSets/Main")),
    Damage("list a pipe", pipe(LIST), "no ImageSets/Main", stops("no ImageSets/Main")),
    Damage("list a link to itself", link(LIST, "train.txt"), "no ImageSets/Main", stops("no ImageSets/Main")),
    Damage("no photo", gone(PHOTO), "missing image: 1", stops("no such image")),
    Damage("photo a pipe", pipe(PHOTO), UNREADABLE, stops("not a file")),
    Damage("no size, photo a pipe", no_size_and(pipe(PHOTO)), "without an image size: 1", stops("not a file")),
    Damage("no size, photo EPS", no_size_and(replaced(PHOTO, EPS)), "without an image size: 1", stops(EPS_UNSUPPORTED)),
]


# ADE20K's semantic masks

MAP, IMAGE, NAMES = "annotations/training/a.png", "images/training/a.jpg", "classes.txt"
GRAY = Image.fromarray(labels())
COLORS = "semantic mask in colors: 1"
ABOVE = "label above the number of classes: 1"


def label_map(*values: float, dtype: type = np.uint8, kind: str = "PNG") -> Spoil:
    """The first labels become `values`."""
    array = labels().astype(dtype)
    array[0, : len(values)] = values
    return drawn(MAP, Image.fromarray(array), kind)


def wider(array: np.ndarray) -> Spoil:
    return drawn(MAP, Image.fromarray(array))


def with_palette() -> Image.Image:
    picture = GRAY.convert("P")
    picture.putdata(labels().ravel().tolist())
    picture.putpalette([7, 7, 7, 250, 0, 0, 9, 9, 250, 0, 250, 0])
    return picture


def emptied(name: str) -> Spoil:
    return lambda root: [file.unlink() for file in (root / name).iterdir()]


def undecodable(root: Path) -> None:
    for folder_, name in (("images", b"\xff\n.jpg"), ("annotations", b"\xfe\x1b[2J.png")):
        (root / folder_ / "training" / os.fsdecode(name)).write_bytes(b"nothing")


LABEL_MAPS = [
    Damage("label map of no bytes", replaced(MAP, ""), "unreadable semantic mask: 1", CANNOT),
    Damage("label map cut short", cut(MAP, 0.5), "unreadable semantic mask: 1", CANNOT),
    Damage("label map a text", replaced(MAP, "0 1 2"), "not an image", stops("not an image")),
    Damage("label map a folder", folder(MAP), "missing semantic mask: 1", stops("has no semantic mask")),
    Damage("label map a pipe", pipe(MAP), "missing semantic mask: 1", stops("has no semantic mask")),
    Damage("label map a link to itself", link(MAP, "a.png"), "missing semantic mask: 1", stops("has no semantic mask")),
    Damage("no label map", gone(MAP), "missing semantic mask: 1", stops("has no semantic mask")),
    Damage("semantic mask in colors", drawn(MAP, GRAY.convert("RGB")), COLORS, stops("mode RGB")),
    Damage("label map in CMYK", drawn(MAP, GRAY.convert("CMYK"), "JPEG"), COLORS, stops("mode CMYK")),
    Damage("label map with transparency", drawn(MAP, GRAY.convert("LA")), COLORS, stops("mode LA")),
    Damage("label map of one bit", drawn(MAP, Image.fromarray(labels() > 0)), None, TRAINS),
    Damage("label map of floats", label_map(0.5, dtype=np.float32, kind="TIFF"), COLORS, stops("mode F")),
    Damage("label map with a palette", drawn(MAP, with_palette()), None, TRAINS),
    Damage("label map of 16 bits", label_map(3, dtype=np.uint16), None, TRAINS),
    Damage("label map of 32 bits", label_map(3, dtype=np.int32, kind="TIFF"), None, TRAINS),
    Damage("a label too many", label_map(4), ABOVE, stops("the largest label is 4")),
    Damage("unlabelled as 255", label_map(255), None, TRAINS),
    Damage("unlabelled as 254", label_map(254), ABOVE, stops("the largest label is 254")),
    Damage("label 60,000", label_map(60_000, dtype=np.uint16), ABOVE, stops("the largest label is 60000")),
    Damage("label 2^31 - 1", label_map(2**31 - 1, dtype=np.int32, kind="TIFF"), ABOVE, stops("is 2147483647")),
    Damage("negative label", label_map(-1, dtype=np.int32, kind="TIFF"), "negative label: 1", stops("label is -1")),
    Damage("nothing labelled", wider(np.zeros((30, 40), np.uint8)), "image without labeled pixels: 1", TRAINS),
    Damage("label map of another size", wider(np.zeros((40, 30), np.uint8)), "size mismatch: 1", stops("has 30x40")),
    Damage("label map of 1 pixel", wider(np.ones((1, 1), np.uint8)), "size mismatch: 1", stops("has 1x1")),
    Damage("label map of 60,000 x 60,000", replaced(MAP, png_of(60_000, 60_000)), "too large", stops("too large")),
    Damage("labels in a JPEG", drawn(MAP, GRAY, "JPEG"), "JPEG semantic mask: 1", stops("save it as PNG")),
    Damage("label map turned by EXIF", drawn(MAP, GRAY, exif=oriented(6)), None, TRAINS),
    Damage("image cut short", cut(IMAGE, 0.5), UNREADABLE, CANNOT),
    Damage("image a pipe", pipe(IMAGE), "semantic mask without an image: 1", TRAINS),
    Damage("image a link to itself", link(IMAGE, "a.jpg"), "semantic mask without an image: 1", TRAINS),
    Damage("image turned by EXIF", drawn(IMAGE, RGB, "JPEG", exif=oriented(6)), "EXIF orientation: 1", TRAINS),
    Damage("animated image", drawn(IMAGE, RGB, "GIF", **SECOND), "animated image: 1", TRAINS),
    Damage("images of one name", drawn("images/training/a.png", RGB), "several images", stops("only in the suffix")),
    Damage("names of no encoding", undecodable, "missing semantic mask: 1", stops("has no semantic mask")),
    Damage("no images at all", emptied("images/training"), "folder without images: 1", stops("no images")),
    Damage("too few names of classes", replaced(NAMES, "sky\nroad\n"), "invalid class names: 1", stops("2 classes")),
    Damage("names of classes in latin-1", replaced(NAMES, b"\xff\nb\nc"), "invalid class names: 1", stops("UTF-8")),
    Damage("names that move the cursor", replaced(NAMES, "\x1b[2J\nb\nc"), "invalid class names", stops("\\x1b[2J")),
]
