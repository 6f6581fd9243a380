"""A COCO annotation file: reading it, and what can be wrong with its entries."""

import json
from collections import Counter, defaultdict
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from math import isfinite
from pathlib import Path
from typing import Any, TypeGuard

from pycocotools import mask as coco_mask

from e3va_cli.data.formats.coco_values import normalize_annotations, normalize_categories, normalize_images
from e3va_cli.data.formats.rle import rle_fault
from e3va_cli.data.paths import describe_directory, safe_join
from e3va_cli.data.validation.issues import ADVICE
from e3va_cli.errors import UserError
from e3va_cli.utils.text import escape_text, is_printable_name, more_suffix, shorten

Entry = dict[str, Any]
Box = tuple[float, float, float, float]

# pycocotools keeps 80 bytes for each pixel along the edges of a polygon.
FARTHEST_COORDINATE = 1e6
LONGEST_OUTLINE = 4e6
FLOAT32_MAX = 3e38
LARGEST_ID = 2**63 - 1
ROUNDING_PIXELS = 1  # annotation tools round the edges of boxes outwards
NO_BOXES: tuple[Any, ...] = (None, [], [0, 0, 0, 0])  # what tools write where only a mask was drawn
MOST_PIXELS = 178_956_970  # of an image that Pillow reads


@dataclass(frozen=True)
class CocoFile:
    """The three lists of a COCO annotation file; nothing is known yet of what their entries hold.

    Other formats are turned into one, so that boxes are checked, drawn and evaluated in one way.
    """

    images: list[Entry]
    annotations: list[Entry]
    categories: list[Entry]


def coco_paths(root: Path, images: str, annotations: str) -> tuple[Path, Path]:
    """The folder of images and the annotation file of a split, both given relative to the root.

    Raises:
        UserError: one of them does not exist; says what is there instead.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(
            f"no such data root: {root}; set dataset.root to the folder that holds the images and annotations"
        )
    folder, file = root / images, root / annotations
    missing = []
    if not folder.is_dir():
        missing.append(f"no folder of images {folder}; {describe_directory(folder)}")
    if not file.is_file():
        missing.append(f"no annotation file {file}; {describe_directory(file)}")
    if missing:
        raise UserError(*missing)
    return folder, file


def read_coco(path: Path) -> CocoFile:
    """Reads the annotation file, and numbers in it that are written as text or fractions.

    Raises:
        UserError: it is missing, not JSON, or without COCO's three lists of objects; one line for each.
    """
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_object)
    except OSError as error:
        raise UserError(f"cannot read the annotation file {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {escape_text(error)}") from None
    except _AmbiguousError as error:
        raise UserError(f"{path} is ambiguous: {error}; keep one of them") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a COCO file: it holds {_article(content)}, not an object")
    problems = []
    for key in ("images", "annotations", "categories"):
        if key not in content:
            problems.append(f"it has no {key!r}")
        elif not isinstance(content[key], list):
            problems.append(f"{key!r} is {_article(content[key])}, not a list")
        elif wrong := [i for i, entry in enumerate(content[key]) if not isinstance(entry, dict)]:
            problems.append(f"{key}[{wrong[0]}] is not an object{more_suffix(wrong)}")
    if problems:
        raise UserError(*(f"{path} is not a COCO file: {problem}" for problem in problems))
    normalize_images(content["images"])
    normalize_annotations(content["annotations"])
    normalize_categories(content["categories"])
    return CocoFile(content["images"], content["annotations"], content["categories"])


def rename_images(coco: CocoFile, names: Mapping[str, str]) -> CocoFile:
    """The same annotations of images with other file names, those that `names` has."""
    if not names:
        return coco
    images = [{**image, "file_name": names.get(image["file_name"], image["file_name"])} for image in coco.images]
    return replace(coco, images=images)


def require_sound(coco: CocoFile, images: Path, name: str) -> None:
    """Makes sure that an index can be built of images in that folder, annotated in what `name` tells of.

    Raises:
        UserError: an entry cannot be used, an id is not unique, or a list is empty; one line for each kind.
    """
    faults: dict[str, list[str]] = defaultdict(list)
    for key, entries, fault_of in (
        ("images", coco.images, image_fault),
        ("categories", coco.categories, category_fault),
        ("annotations", coco.annotations, crowd_fault),
    ):
        for i, entry in enumerate(entries):
            if fault := fault_of(entry):
                faults[f"unusable {key}"].append(f"{key}[{i}]: {fault}")
        if key == "annotations":
            continue
        ids = Counter(entry["id"] for entry in entries if is_whole(entry.get("id")))
        for number, count in ids.items():
            if count > 1:
                faults[f"duplicate {key}"].append(f"{count} {key} have the id {number}")
        if not entries:
            faults[f"no {key}"].append(f"{key!r} is empty")
    for image in coco.images:
        file_name = image.get("file_name")
        if isinstance(file_name, str) and safe_join(images, file_name) is None:
            which = f"{shorten(file_name)} (id {shorten(image.get('id'))})"
            faults["outside"].append(f"the image {which} lies outside of {images}")
    if faults:
        raise UserError(*(f"{name}: {found[0]}{more_suffix(found)}; {ADVICE}" for found in faults.values()))


def image_fault(image: Entry) -> str | None:
    """What keeps an entry of `images` from being used, or None."""
    if fault := _id_fault(image.get("id")):
        return fault
    if not is_printable_name(image.get("file_name")):
        return f"the file_name is {shorten(image.get('file_name'))}, not a name"
    for side in ("height", "width"):
        if not is_whole(image.get(side)) or image[side] < 1:
            return f"the {side} is {shorten(image.get(side))}, not a number of pixels"
    if image["height"] * image["width"] > MOST_PIXELS:
        return f"{image['width']}x{image['height']} pixels are more than the {MOST_PIXELS:,} that are read"
    return None


def category_fault(category: Entry) -> str | None:
    """What keeps an entry of `categories` from being used, or None."""
    if fault := _id_fault(category.get("id")):
        return fault
    if not is_printable_name(category.get("name")):
        return f"the name is {shorten(category.get('name'))}, not a name"
    return None


def crowd_fault(annotation: Entry) -> str | None:
    """What keeps the `iscrowd` of an annotation from being understood, or None."""
    if annotation.get("iscrowd") in (None, 0, 1):
        return None
    return f"the iscrowd is {shorten(annotation['iscrowd'])}, not 0 or 1"


def _id_fault(number: object) -> str | None:
    if is_whole(number):
        return None
    too_long = isinstance(number, int) and not isinstance(number, bool)
    return f"the id is {shorten(number)}, not a whole number{' of 64 bits' if too_long else ''}"


def refers(number: object, known: Container[int]) -> TypeGuard[int | float]:
    """Whether an annotation's `image_id` or `category_id` is one of those that are known; 11.0 is 11."""
    return isinstance(number, int | float) and not isinstance(number, bool) and number in known


def read_box(annotation: Entry) -> Box | None:
    """COCO's (x, y, w, h) in pixels, or None where `bbox` is not four finite numbers."""
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(is_finite(number) for number in box):
        return None
    x, y, w, h = map(float, box)
    return x, y, w, h


def box_of(annotation: Entry, segmentation: Any, height: int, width: int) -> Box | None:
    """The box of an annotation, or where it has none that of its mask; None where there is neither.

    Args:
        annotation: of an image of height x width pixels.
        segmentation: its usable part, of `usable_segmentation`.
    """
    if annotation.get("bbox") not in NO_BOXES or segmentation is None:
        return read_box(annotation)
    if isinstance(segmentation, list):
        xs, ys = (list(chain.from_iterable(polygon[axis::2] for polygon in segmentation)) for axis in (0, 1))
        return float(min(xs)), float(min(ys)), float(max(xs) - min(xs)), float(max(ys) - min(ys))
    x, y, w, h = coco_mask.toBbox(encoded(segmentation, height, width)).tolist()
    return x, y, w, h


def encoded(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """pycocotools' RLE of polygons or of either kind of RLE, sound ones only."""
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return segmentation


def reaches_out(box: Box, height: int, width: int) -> bool:
    """Whether a box leaves the image by more than what annotation tools round."""
    x, y, w, h = box
    return min(x, y) < -ROUNDING_PIXELS or x + w > width + ROUNDING_PIXELS or y + h > height + ROUNDING_PIXELS


def clip_box(box: Box, height: int, width: int) -> Box:
    """COCO's (x, y, w, h) as the corners (x1, y1, x2, y2), moved into the image."""
    x, y, w, h = box
    return (
        min(max(x, 0), width),
        min(max(y, 0), height),
        min(max(x + w, 0), width),
        min(max(y + h, 0), height),
    )


def box_fault(box: Box | None, height: int, width: int) -> str | None:
    """What keeps a box from being trained on, or None."""
    if box is None:
        return "box not of four finite numbers"
    if box[2] <= 0 or box[3] <= 0:
        return "box without area"
    x1, y1, x2, y2 = clip_box(box, height, width)
    if x2 <= x1 or y2 <= y1:
        return "box outside the image"
    if x2 - x1 < 1 or y2 - y1 < 1:
        return "box under one pixel"
    return None


def segmentation_faults(segmentation: Any, height: int, width: int) -> list[str]:
    """All that is wrong with a segmentation; one without any content has no fault, it is no mask."""
    if not segmentation:
        return []
    if isinstance(segmentation, dict):
        fault = rle_fault(segmentation, height, width)
        return [fault] if fault else []
    if not isinstance(segmentation, list):
        return ["segmentation neither polygons nor RLE"]
    return [fault for polygon in segmentation if (fault := _polygon_fault(polygon))]


def usable_segmentation(segmentation: Any, height: int, width: int) -> Any:
    """The segmentation without its unusable polygons, for pycocotools; None where nothing is left."""
    if isinstance(segmentation, list):
        return [polygon for polygon in segmentation if not _polygon_fault(polygon)] or None
    return None if segmentation_faults(segmentation, height, width) else segmentation or None


def is_whole(value: object) -> bool:
    """Whether a JSON value can be an id or a number of pixels."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_ID


def is_finite(value: object) -> bool:
    """Whether a JSON value is a number that float32 holds; Python's JSON also knows NaN and Infinity."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < FLOAT32_MAX


def is_area(value: object) -> bool:
    """Whether a JSON value can be a number of pixels that an object covers."""
    return is_finite(value) and value >= 0  # type: ignore[operator]


def _polygon_fault(polygon: object) -> str | None:
    if not isinstance(polygon, list) or len(polygon) % 2:
        return "malformed polygon"
    if not set(map(type, polygon)) <= {int, float}:
        return "malformed polygon"
    if len(polygon) < 6:
        return "polygon with fewer than 3 points"
    # A NaN that max() passes over shows in the sum; a COCO file has tens of millions of coordinates.
    extent = max(map(abs, polygon))
    sound = extent < FARTHEST_COORDINATE and isfinite(sum(polygon))
    # No edge is longer than twice the extent, which spares nearly all polygons the sum.
    sound = sound and (extent * len(polygon) < LONGEST_OUTLINE or _outline(polygon) < LONGEST_OUTLINE)
    return None if sound else "malformed polygon"


def _outline(polygon: list[float]) -> float:
    """The pixels along its edges."""
    points = list(zip(polygon[::2], polygon[1::2], strict=True))
    return sum(max(abs(x2 - x1), abs(y2 - y1)) for (x1, y1), (x2, y2) in pairwise([*points, points[0]]))


class _AmbiguousError(Exception):
    """A JSON object has two values of one key."""


def _object(pairs: list[tuple[str, Any]]) -> Entry:
    found = dict(pairs)
    if len(found) < len(pairs):
        key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _AmbiguousError(f"an object has {shorten(key)} twice")
    return found


def _article(value: object) -> str:
    names = {list: "a list", dict: "an object", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
