"""All issues of a detection data set, in COCO's format or converted to it."""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from e3va_cli.data.dataset import DETECTION
from e3va_cli.data.file_names import ResolvedNames, resolve_names
from e3va_cli.data.formats.coco_file import (
    CocoFile,
    box_of,
    exceeds_image,
    is_area,
    is_integer,
    is_known_id,
    read_coco,
    validate_box,
    validate_category,
    validate_image,
)
from e3va_cli.data.formats.coco_objects import crowd_warning, crowds_as_objects
from e3va_cli.data.formats.coco_segmentation import usable_segmentation, validate_segmentation
from e3va_cli.data.formats.coco_values import Entry
from e3va_cli.data.images.formats import KNOWN_SUFFIXES
from e3va_cli.data.images.intensity import IntensityScaling
from e3va_cli.data.images.reading import DEFAULT_SCALING, read_raw
from e3va_cli.data.paths import safe_join
from e3va_cli.data.validation.images import FileIssues, file_notes, pixel_notes, pixel_problems
from e3va_cli.data.validation.issues import IssueCollector, Location, Progress, Report
from e3va_cli.errors import UserError
from e3va_cli.utils.text import shorten

Item = TypeVar("Item")
Result = TypeVar("Result")

THREADS = min(8, (os.cpu_count() or 1) + 1)
CHUNK = 512  # items, whose results are in memory at once
PROGRESS_INTERVAL = 32  # items


def check_coco_file(
    images: Path,
    annotations: Path,
    *,
    targets: Collection[str] = DETECTION,
    scaling: IntensityScaling = DEFAULT_SCALING,
    use_iscrowd: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Check a COCO file and its folder of images, including images that it does not list; see `check_coco`."""
    problems, notes = IssueCollector(), IssueCollector()
    try:
        coco = read_coco(annotations)
    except UserError as error:
        for message in error.messages:
            problems.add("invalid annotation file", Location(annotations.name, detail=message))
        coco = CocoFile([], [], [])
    if not use_iscrowd:
        coco = crowds_as_objects(coco)
    elif warning := crowd_warning(coco):
        problems.add("many crowds", Location(annotations.name, detail=warning))
    name = str(annotations)
    return check_coco(
        coco,
        images,
        name=name,
        targets=targets,
        scaling=scaling,
        list_unlisted=True,
        problems=problems,
        notes=notes,
        progress=progress,
    )


def check_coco(
    coco: CocoFile,
    images: Path,
    *,
    name: str,
    ignored: str = "crowds",
    targets: Collection[str] = DETECTION,
    scaling: IntensityScaling = DEFAULT_SCALING,
    list_unlisted: bool = False,
    problems: IssueCollector | None = None,
    notes: IssueCollector | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check the annotations, and decode every image that they list.

    Args:
        coco: the annotations.
        images: the folder that file names are relative to.
        name: of the annotations in the report.
        ignored: name of objects with `iscrowd` in the report.
        targets: what the head needs of boxes and masks.
        scaling: of images of more than 8 bits.
        list_unlisted: whether to note images in the folder that are not listed.
        problems: of earlier checks; extended in place.
        notes: likewise.
        progress: called with the number of decoded images and of all images.
    """
    problems = IssueCollector() if problems is None else problems
    notes = IssueCollector() if notes is None else notes
    _check_categories(coco, problems)
    _check_image_entries(coco, images, problems)
    if images.is_dir():
        found = _find_files(coco, images, notes)
        if list_unlisted:
            _note_unlisted(coco, found, images, notes)
        _check_files(coco, found, images, scaling, problems, notes, progress)
    else:
        problems.add("no such folder of images", Location(str(images)))
    per_category = _check_annotations(coco, problems, notes, masks="masks" in targets)
    _note_empty(coco, per_category, notes)
    categories = sorted((c for c in coco.categories if not validate_category(c)), key=lambda c: c["id"])
    per_class: Counter[str] = Counter()
    for category in categories:
        per_class[category["name"]] += per_category[category["id"]]
    return Report(
        source=name,
        problems=list(problems),
        notes=list(notes),
        totals={
            "images": len(coco.images),
            "annotations": len(coco.annotations),
            ignored: sum(bool(annotation.get("iscrowd")) for annotation in coco.annotations),
            "classes": len(coco.categories),
        },
        per_class=dict(per_class),
    )


def _check_categories(coco: CocoFile, problems: IssueCollector) -> None:
    for i, category in enumerate(coco.categories):
        if error := validate_category(category):
            problems.add("invalid category", Location(detail=f"categories[{i}]: {error}"))
    for number, count in _repeated(coco.categories, "id"):
        problems.add("duplicate category id", Location(detail=f"{count} categories have the id {number}"))
    for name, count in _repeated(coco.categories, "name"):
        problems.add("duplicate category name", Location(detail=f"{count} categories are called {name}"))


def _check_image_entries(coco: CocoFile, folder: Path, problems: IssueCollector) -> None:
    for i, image in enumerate(coco.images):
        location = _location(image)
        if error := validate_image(image):
            problems.add(
                "invalid image entry", Location(location.file, location.image_id, detail=f"images[{i}]: {error}")
            )
        if location.file and safe_join(folder, location.file) is None:
            problems.add("file outside the folder of images", location)
    for number, count in _repeated(coco.images, "id"):
        problems.add("duplicate image id", Location(image_id=number, detail=f"{count} times"))
    for name, count in _repeated(coco.images, "file_name"):
        problems.add("duplicate file name", Location(name, detail=f"{count} times"))


def _check_annotations(coco: CocoFile, problems: IssueCollector, notes: IssueCollector, *, masks: bool) -> Counter[int]:
    """Check each annotation; return the number of objects by category id, without crowds."""
    images = {image["id"]: image for image in coco.images if is_integer(image.get("id"))}
    categories = {category["id"]: category for category in coco.categories if is_integer(category.get("id"))}
    has_masks = masks and any(a.get("segmentation") for a in coco.annotations if not a.get("iscrowd"))
    per_category: Counter[int] = Counter()
    for annotation in coco.annotations:
        image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
        image = images[image_id] if is_known_id(image_id, images) else None
        where = _location(image or {})
        number = annotation.get("id")
        location = Location(where.file, where.image_id, number if is_integer(number) else None)
        if image is None:
            detail = f"image id {shorten(image_id)}"
            problems.add("unknown image id", Location(annotation_id=location.annotation_id, detail=detail))
        if not is_known_id(category_id, categories):
            problems.add("unknown category id", replace(location, detail=f"category id {shorten(category_id)}"))
        elif not annotation.get("iscrowd"):
            per_category[int(category_id)] += 1
        if (crowd := annotation.get("iscrowd")) not in (None, 0, 1):
            problems.add("iscrowd is neither 0 nor 1", replace(location, detail=shorten(crowd)))
        if (area := annotation.get("area")) is not None and not is_area(area):
            notes.add("area is not a number", replace(location, detail=f"{shorten(area)}; recomputed"))
        if image is not None and not validate_image(image):
            _check_shape(annotation, image, location, has_masks, problems)
    if missing := sum(not is_integer(annotation.get("id")) for annotation in coco.annotations):
        problems.add("annotation without an id", Location(detail=f"{missing} of {len(coco.annotations)}"))
    for number, count in _repeated(coco.annotations, "id"):
        problems.add("duplicate annotation id", Location(annotation_id=number, detail=f"{count} times"))
    return per_category


def _check_shape(
    annotation: Entry, image: Entry, location: Location, has_masks: bool, problems: IssueCollector
) -> None:
    height, width = image["height"], image["width"]
    segmentation = annotation.get("segmentation")
    box = box_of(annotation, usable_segmentation(segmentation, height, width), height, width)
    at = replace(location, detail=f"box {shorten(annotation.get('bbox'))}")
    size = f"image {width}x{height}"
    if error := validate_box(box, height, width):
        problems.add(error, at)
    elif box is not None and exceeds_image(box, height, width):
        problems.add("box partly outside the image", replace(at, detail=f"{at.detail}, {size}"))
    for error in dict.fromkeys(validate_segmentation(segmentation, height, width)):
        problems.add(error, location)
    if has_masks and not segmentation:
        problems.add("annotation without a mask", location)


def _check_files(
    coco: CocoFile,
    names: ResolvedNames,
    folder: Path,
    scaling: IntensityScaling,
    problems: IssueCollector,
    notes: IssueCollector,
    progress: Progress | None,
) -> None:
    """Decode each listed image."""
    listed = [image for image in coco.images if _location(image).file and safe_join(folder, image["file_name"])]
    checked = threaded_map(lambda image: _check_file(image, names, folder, scaling), listed, progress)
    for image, results in zip(listed, checked, strict=True):
        for collector, issues in zip((problems, notes), results, strict=True):
            for issue_type, detail in issues:
                collector.add(issue_type, replace(_location(image), detail=detail))


def threaded_map(
    function: Callable[[Item], Result], items: Sequence[Item], progress: Progress | None
) -> Iterator[Result]:
    """Yield the results of a function in the order of the items, computed in threads (Pillow decodes without the GIL).

    Args:
        function: of one item.
        items: to apply it to.
        progress: called with the number of finished items and of all items.
    """
    with ThreadPoolExecutor(THREADS) as threads:
        for start in range(0, len(items), CHUNK):
            for done, result in enumerate(threads.map(function, items[start : start + CHUNK]), start=start + 1):
                if progress and (done % PROGRESS_INTERVAL == 0 or done == len(items)):
                    progress(done, len(items))
                yield result


def _check_file(
    entry: Entry, names: ResolvedNames, folder: Path, scaling: IntensityScaling
) -> tuple[FileIssues, FileIssues]:
    """Return the problems of an image file, and the notes on it."""
    name: str = entry["file_name"]
    if name in names.missing:
        likely = names.missing[name]
        return [("missing image", f"perhaps {likely}" if likely else None)], []
    path = safe_join(folder, names.resolved.get(name, name))
    assert path is not None
    try:
        raw = read_raw(path)
    except UserError as error:
        missing = isinstance(error.__cause__, FileNotFoundError)
        return [("missing image", None) if missing else ("unreadable image", str(error))], []
    annotated = None if validate_image(entry) else (entry["height"], entry["width"])
    problems = pixel_problems(raw, annotated, scaling)
    return problems, [*pixel_notes(raw, annotated, scaling), *file_notes(path, folder)]


def _find_files(coco: CocoFile, folder: Path, notes: IssueCollector) -> ResolvedNames:
    """Return the files of the listed images; note those whose name differs from the listed one."""
    found = resolve_names(folder, [name for image in coco.images if (name := _location(image).file)], KNOWN_SUFFIXES)
    for name, file in found.resolved.items():
        notes.add("file name differs from the listed one", Location(name, detail=f"{file} is used"))
    return found


def _note_unlisted(coco: CocoFile, found: ResolvedNames, folder: Path, notes: IssueCollector) -> None:
    names = [name for image in coco.images if (name := _location(image).file)]
    listed = {safe_join(folder, found.resolved.get(name, name)) for name in names}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix.lower() in KNOWN_SUFFIXES and safe_join(folder, name) not in listed:
            notes.add("image file without an annotation entry", Location(name))


def _note_empty(coco: CocoFile, per_category: Counter[int], notes: IssueCollector) -> None:
    used = {a["image_id"] for a in coco.annotations if isinstance(a.get("image_id"), int | float)}
    for image in coco.images:
        if is_integer(image.get("id")) and image["id"] not in used:
            notes.add("image without objects", _location(image))
    for category in coco.categories:
        if not validate_category(category) and not per_category[category["id"]]:
            notes.add("class without objects", Location(detail=f"{category['name']} (id {category['id']})"))


def _location(image: Entry) -> Location:
    name, number = image.get("file_name"), image.get("id")
    return Location(name if isinstance(name, str) and name else None, number if is_integer(number) else None)


def _repeated(entries: list[Entry], key: str) -> Iterator[tuple[Any, int]]:
    """Return values of the key that occur more than once, with their counts."""
    values = Counter(entry[key] for entry in entries if isinstance(entry.get(key), int | str))
    return ((value, count) for value, count in values.items() if count > 1)
