"""Whatever stands in a file, a reader gives a valid data set or one line that says why not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from e3va_cli.data.dataset import DenseDataset
from e3va_cli.data.formats.base import DatasetFormat
from e3va_cli.data.formats.coco import open_coco
from e3va_cli.data.formats.coco_file import MAX_PIXELS
from e3va_cli.data.formats.coco_segmentation import decode_counts, validate_rle
from e3va_cli.data.formats.voc import VocFormat
from e3va_cli.data.images.formats import FORMATS
from e3va_cli.data.images.reading import decode_image, image_notes, read_image, read_image_size
from e3va_cli.data.validation.coco import check_coco_file
from e3va_cli.errors import UserError
from tests.data.validation import damages

few = settings(
    max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)

NASTY: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([None, True, False, "", "11", "\x1b[2J", "\ud800", [], {}, [[]], [None], {"size": [30, 40]}]),
    st.sampled_from([0, -1, 1, 3, 5, 11, 2**31, 2**63, 10**30, 10**400, -(10**400)]),
    st.sampled_from([0.0, -0.0, 0.5, 1e-300, 1e30, 1e300, float("nan"), float("inf"), float("-inf")]),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(-100, 100), st.floats(), st.booleans()), max_size=9),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a JSON document."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in children:
        yield from places(inner, (*path, key))


@contextmanager
def built(build: Callable[[Path], None]) -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        build(Path(folder))
        yield Path(folder)


with built(damages.build_coco) as _root:
    SOUND = json.loads((_root / "instances.json").read_text())
for _entry, _counts in zip(SOUND["annotations"][:2], ([0, 1200], "04"), strict=True):
    _entry["segmentation"] = {"size": [30, 40], "counts": _counts}
PATHS = [path for path in places(SOUND) if path]


@st.composite
def documents(draw: st.DrawFn) -> Any:
    """A COCO file with up to four places changed, taken away, or given a copy."""
    document = copy.deepcopy(SOUND)
    for path in draw(st.lists(st.sampled_from(PATHS), min_size=1, max_size=4)):
        parent = document
        try:
            for key in path[:-1]:
                parent = parent[key]
            how = draw(st.sampled_from(["change", "remove", "copy"]))
            if how == "change":
                parent[path[-1]] = draw(NASTY)
            elif how == "remove":
                del parent[path[-1]]
            elif isinstance(parent, list):
                parent.append(copy.deepcopy(parent[path[-1]]))
        except (LookupError, TypeError):
            continue  # an earlier change has taken the place away
    return document


def check_items(dataset: DenseDataset) -> None:
    """All that training relies on."""
    assert dataset.classes and len(dataset.classes) == len(dataset.category_ids)
    for index in range(len(dataset)):
        image, target = dataset[index]
        height, width = image.shape[1:]
        assert target["original_size"] == (height, width)
        boxes = target["boxes"].numpy()
        assert np.isfinite(boxes).all()
        assert (boxes >= 0).all() and (boxes <= [width, height, width, height]).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert all(1 <= label <= len(dataset.classes) for label in target["labels"].tolist())
        if "masks" in target and len(boxes):
            assert target["masks"].shape == (len(boxes), height, width) and int(target["masks"].max()) <= 1


def sound_or_refused(call: Callable[[], object]) -> None:
    try:
        call()
    except UserError as error:
        for line in error.messages:
            assert line.isprintable() and len(line) < 2000


def read(opened: DenseDataset) -> None:
    check_items(opened)
    truth = opened.ground_truth()  # type: ignore[attr-defined]
    json.dumps(truth, allow_nan=False)
    ids = [entry["id"] for entry in truth["annotations"]]
    assert len(set(ids)) == len(ids) and 0 not in ids


@few
@given(documents())
def test_coco(document: Any) -> None:
    with built(damages.build_coco) as root:
        file = root / "instances.json"
        file.write_text(json.dumps(document))
        sound_or_refused(lambda: read(open_coco(root / "images", file)))
        for line in check_coco_file(root / "images", file).lines():
            assert line.isprintable() and len(line) < 2000


SHEET = damages.sheet(damages.thing(), damages.thing("<name>dog</name>", (1, 1, 9, 9), "<difficult>1</difficult>"))
SNIPPETS = ["<", ">", "&", "&#0;", "&#xD800;", "<object>", "</object>", "<bndbox>", "<name/>", "<!--", "]]>", "<size>"]
SNIPPETS += ["nan", "-1", "1e999", "9" * 400, "\x1b", "\0", "\n", "<!DOCTYPE x>", "<?xml encoding='utf-16'?>"]


@st.composite
def sheets(draw: st.DrawFn) -> bytes:
    """An XML file with some text cut out and some put in."""
    text = SHEET
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        stop = min(len(text), start + draw(st.integers(0, 20)))
        text = text[:start] + draw(st.one_of(st.sampled_from(SNIPPETS), st.text(max_size=3))) + text[stop:]
    return text.encode("utf-8", "surrogatepass")


def open_voc(root: Path) -> None:
    source: DatasetFormat = VocFormat(str(root), "train", "train", None)
    check_items(source.open("train", None))


@few
@given(sheets())
def test_voc(content: bytes) -> None:
    with built(damages.build_voc) as root:
        (root / "VOC2007/Annotations/a.xml").write_bytes(content)
        sound_or_refused(lambda: open_voc(root))
        for line in VocFormat(str(root), "train", "train", None).check("train").lines():
            assert line.isprintable() and len(line) < 2000


PICTURES = {kind: damages.bytes_of(damages.RGB, kind) for kind in FORMATS}
PICTURES["TIFF"] = damages.bytes_of(damages.RGB, "TIFF", compression="tiff_lzw")


@settings(few, max_examples=400)
@given(st.sampled_from(list(PICTURES)), st.data())
def test_images(kind: str, data: st.DataObject) -> None:
    """A few bytes changed, most of them in the head, where the sizes stand; perhaps cut short."""
    content = bytearray(PICTURES[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, 99), st.integers(0, len(content) - 1)))
        content[at] = data.draw(st.one_of(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]), st.integers(0, 255)))
    kept = data.draw(st.sampled_from([1.0, 1.0, 0.9, 0.3]))
    with TemporaryDirectory() as folder:
        file = Path(folder) / "a.png"
        file.write_bytes(content[: int(kept * len(content))])
        for reader in (decode_image, read_image, read_image_size, lambda path: list(image_notes(path))):
            sound_or_refused(lambda reader=reader: reader(file))


@few
@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_rle_there_and_back(height: int, width: int, data: st.DataObject) -> None:
    pixels = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = np.asfortranarray(np.array(pixels, dtype=np.uint8).reshape(height, width))
    text = coco_mask.encode(mask)["counts"].decode()
    runs = decode_counts(text).tolist()
    values = np.repeat(np.arange(len(runs)) % 2, runs)
    assert np.array_equal(values.reshape(width, height).T, mask)
    for counts in (text, runs):
        assert validate_rle({"size": [height, width], "counts": counts}, height, width) is None


@settings(few, max_examples=400)
@given(st.one_of(st.text(st.characters(min_codepoint=47, max_codepoint=113), max_size=9), st.lists(st.integers(-2, 9))))
def test_valid_rle_is_read_by_pycocotools(counts: Any) -> None:
    """As pycocotools decodes it: every pixel is told of, none of them twice."""
    height, width = 4, 5
    if validate_rle({"size": [height, width], "counts": counts}, height, width):
        return
    runs = counts if isinstance(counts, list) else decode_counts(counts).tolist()
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    expected = (np.repeat(np.arange(len(runs)) % 2, runs)).reshape(width, height).T
    assert np.array_equal(coco_mask.decode(rle), expected)
    if isinstance(counts, str):
        assert np.array_equal(coco_mask.decode({"size": [height, width], "counts": counts}), expected)


def test_the_largest_image_is_pillows() -> None:
    assert 2 * (Image.MAX_IMAGE_PIXELS or 0) == MAX_PIXELS
