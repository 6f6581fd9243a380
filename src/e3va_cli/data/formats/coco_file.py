"""COCO annotation files: reading them, and the errors of their entries."""

import json
from collections import Counter, defaultdict
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard

from pycocotools import mask as coco_mask

from e3va_cli.data.formats.coco_segmentation import to_rle
from e3va_cli.data.formats.coco_values import Entry, normalize_annotations, normalize_categories, normalize_images
from e3va_cli.data.paths import describe_directory, safe_join
from e3va_cli.data.validation.issues import ADVICE
from e3va_cli.errors import UserError
from e3va_cli.utils.text import escape_text, is_printable_name, more_suffix, shorten

Box = tuple[float, float, float, float]

FLOAT32_MAX = 3e38
MAX_ID = 2**63 - 1
ROUNDING_PIXELS = 1  # annotation tools round the edges of boxes outwards
NO_BOXES: tuple[Any, ...] = (None, [], [0, 0, 0, 0])  # what tools write for objects with a mask only
MAX_PIXELS = 178_956_970  # of an image that Pillow reads


@dataclass(frozen=True)
class CocoFile:
    """The three lists of a COCO annotation file, their entries unchecked; other formats are converted to this one."""

    images: list[Entry]
    annotations: list[Entry]
    categories: list[Entry]


def coco_paths(root: Path, images: str, annotations: str) -> tuple[Path, Path]:
    """Return the image folder and annotation file of a split, both given relative to the root.

    Raises:
        UserError: one of them does not exist.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"no such data root: {root}; set dataset.root to the folder of images and annotations")
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
    """Read an annotation file; numbers written as text or floats are converted.

    Raises:
        UserError: it is missing, not JSON, or lacks one of COCO's three lists; one line for each error.
    """
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_unique_keys)
    except OSError as error:
        raise UserError(f"cannot read the annotation file {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {escape_text(error)}") from None
    except _DuplicateKeyError as error:
        raise UserError(f"{path} is ambiguous: {error}; keep one of them") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a COCO file: it holds {_json_type(content)}, not an object")
    errors = []
    for key in ("images", "annotations", "categories"):
        if key not in content:
            errors.append(f"it has no {key!r}")
        elif not isinstance(content[key], list):
            errors.append(f"{key!r} is {_json_type(content[key])}, not a list")
        elif wrong := [i for i, entry in enumerate(content[key]) if not isinstance(entry, dict)]:
            errors.append(f"{key}[{wrong[0]}] is not an object{more_suffix(wrong)}")
    if errors:
        raise UserError(*(f"{path} is not a COCO file: {error}" for error in errors))
    normalize_images(content["images"])
    normalize_annotations(content["annotations"])
    normalize_categories(content["categories"])
    return CocoFile(content["images"], content["annotations"], content["categories"])


def rename_images(coco: CocoFile, names: Mapping[str, str]) -> CocoFile:
    """Return the annotations with file names replaced by `names`."""
    if not names:
        return coco
    images = [{**image, "file_name": names.get(image["file_name"], image["file_name"])} for image in coco.images]
    return replace(coco, images=images)


def check_entries(coco: CocoFile, images: Path, name: str) -> None:
    """Check what `CocoDetection` relies on: valid entries, unique ids, file names inside the folder `images`.

    Raises:
        UserError: an entry is invalid, an id is not unique, or a list is empty; one line for each type of error.
    """
    errors: dict[str, list[str]] = defaultdict(list)
    for key, entries, validate in (
        ("images", coco.images, validate_image),
        ("categories", coco.categories, validate_category),
        ("annotations", coco.annotations, validate_iscrowd),
    ):
        for i, entry in enumerate(entries):
            if error := validate(entry):
                errors[f"invalid {key}"].append(f"{key}[{i}]: {error}")
        if key == "annotations":
            continue
        ids = Counter(entry["id"] for entry in entries if is_integer(entry.get("id")))
        for number, count in ids.items():
            if count > 1:
                errors[f"duplicate {key}"].append(f"{count} {key} have the id {number}")
        if not entries:
            errors[f"no {key}"].append(f"{key!r} is empty")
    for image in coco.images:
        file_name = image.get("file_name")
        if isinstance(file_name, str) and safe_join(images, file_name) is None:
            which = f"{shorten(file_name)} (id {shorten(image.get('id'))})"
            errors["outside"].append(f"the image {which} is outside {images}")
    if errors:
        raise UserError(*(f"{name}: {one[0]}{more_suffix(one)}; {ADVICE}" for one in errors.values()))


def validate_image(image: Entry) -> str | None:
    """Return the error of an entry of `images`, or None."""
    if error := _validate_id(image.get("id")):
        return error
    if not is_printable_name(image.get("file_name")):
        return f"file_name is {shorten(image.get('file_name'))}, not a name"
    for side in ("height", "width"):
        if not is_integer(image.get(side)) or image[side] < 1:
            return f"{side} is {shorten(image.get(side))}, not a number of pixels"
    if image["height"] * image["width"] > MAX_PIXELS:
        return f"{image['width']}x{image['height']} pixels exceed the limit of {MAX_PIXELS:,}"
    return None


def validate_category(category: Entry) -> str | None:
    """Return the error of an entry of `categories`, or None."""
    if error := _validate_id(category.get("id")):
        return error
    if not is_printable_name(category.get("name")):
        return f"name is {shorten(category.get('name'))}, not a name"
    return None


def validate_iscrowd(annotation: Entry) -> str | None:
    """Return the error of an annotation's `iscrowd`, or None."""
    if annotation.get("iscrowd") in (None, 0, 1):
        return None
    return f"iscrowd is {shorten(annotation['iscrowd'])}, not 0 or 1"


def _validate_id(number: object) -> str | None:
    if is_integer(number):
        return None
    too_long = isinstance(number, int) and not isinstance(number, bool)
    return f"id is {shorten(number)}, not {'a 64-bit' if too_long else 'an'} integer"


def is_known_id(number: object, known: Container[int]) -> TypeGuard[int | float]:
    """Return whether an annotation's `image_id` or `category_id` is known; 11.0 is 11."""
    return isinstance(number, int | float) and not isinstance(number, bool) and number in known


def read_box(annotation: Entry) -> Box | None:
    """Return COCO's (x, y, w, h) in pixels, None unless `bbox` is four finite numbers."""
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(is_finite(number) for number in box):
        return None
    x, y, w, h = map(float, box)
    return x, y, w, h


def box_of(annotation: Entry, segmentation: Any, height: int, width: int) -> Box | None:
    """Return the box of an annotation, or of its mask if it has none; None if it has neither.

    Args:
        annotation: of an image of height x width pixels.
        segmentation: the result of `usable_segmentation`.
    """
    if annotation.get("bbox") not in NO_BOXES or segmentation is None:
        return read_box(annotation)
    if isinstance(segmentation, list):
        xs, ys = (list(chain.from_iterable(polygon[axis::2] for polygon in segmentation)) for axis in (0, 1))
        return float(min(xs)), float(min(ys)), float(max(xs) - min(xs)), float(max(ys) - min(ys))
    x, y, w, h = coco_mask.toBbox(to_rle(segmentation, height, width)).tolist()
    return x, y, w, h


def exceeds_image(box: Box, height: int, width: int) -> bool:
    """Return whether a box exceeds the image by more than the rounding of annotation tools."""
    x, y, w, h = box
    return min(x, y) < -ROUNDING_PIXELS or x + w > width + ROUNDING_PIXELS or y + h > height + ROUNDING_PIXELS


def clip_box(box: Box, height: int, width: int) -> Box:
    """Return COCO's (x, y, w, h) as corners (x1, y1, x2, y2), clipped to the image."""
    x, y, w, h = box
    return (
        min(max(x, 0), width),
        min(max(y, 0), height),
        min(max(x + w, 0), width),
        min(max(y + h, 0), height),
    )


def validate_box(box: Box | None, height: int, width: int) -> str | None:
    """Return why a box cannot be trained on, or None."""
    if box is None:
        return "box is not four finite numbers"
    if box[2] <= 0 or box[3] <= 0:
        return "box without area"
    x1, y1, x2, y2 = clip_box(box, height, width)
    if x2 <= x1 or y2 <= y1:
        return "box outside the image"
    if x2 - x1 < 1 or y2 - y1 < 1:
        return "box smaller than one pixel"
    return None


def is_integer(value: object) -> bool:
    """Return whether a JSON value is a 64-bit integer."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_ID


def is_finite(value: object) -> bool:
    """Return whether a JSON value is a finite float32; Python's JSON also reads NaN and Infinity."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < FLOAT32_MAX


def is_area(value: object) -> bool:
    """Return whether a JSON value is a finite number of at least 0."""
    return is_finite(value) and value >= 0  # type: ignore[operator]


class _DuplicateKeyError(Exception):
    """A JSON object has a key twice."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> Entry:
    entry = dict(pairs)
    if len(entry) < len(pairs):
        key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _DuplicateKeyError(f"an object has {shorten(key)} twice")
    return entry


def _json_type(value: object) -> str:
    names = {list: "a list", dict: "an object", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
