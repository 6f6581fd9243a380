"""Finds every problem of a folder of images with a folder of label maps at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from e3va_cli.data.file_names import match_stems
from e3va_cli.data.formats.label_encoding import LabelEncoding
from e3va_cli.data.formats.semantic_masks import MASK_SUFFIXES, files_by_stem, validate_semantic_mask
from e3va_cli.data.images.formats import IMAGE_SUFFIXES, UNSUPPORTED_SUFFIXES, remedy
from e3va_cli.data.images.intensity import IntensityScaling
from e3va_cli.data.images.reading import DEFAULT_SCALING, decode_image, read_raw
from e3va_cli.data.validation.coco import threaded_map
from e3va_cli.data.validation.images import file_notes, pixel_notes, pixel_problems
from e3va_cli.data.validation.issues import IssueCollector, Location, Report
from e3va_cli.data.validation.label_survey import LabelSurvey, count_labels
from e3va_cli.errors import UserError


def check_semantic_masks(
    images: Path,
    labels: Path,
    classes: Sequence[str],
    encoding: LabelEncoding,
    *,
    train: bool = True,
    scaling: IntensityScaling = DEFAULT_SCALING,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Decodes every image and every label map, and counts the pixels of each class.

    Args:
        images: the folder of images
        labels: the folder of label maps, each called as its image
        classes: names of the labels from 1
        encoding: of the label maps
        train: whether it is the training split, in which two classes have to occur
        scaling: of images of more than 8 bits
        progress: called now and then with the number of pairs decoded, and of all pairs
    """
    problems, notes = IssueCollector(), IssueCollector()
    of_images = _files(images, IMAGE_SUFFIXES, "image", problems)
    _check_formats(images, problems)
    of_labels = _files(labels, MASK_SUFFIXES, "label map", problems)
    matched = match_stems(of_images, of_labels)
    for stem, (name, *_) in of_images.items():
        if stem not in matched:
            problems.add("missing label map", Location(name, detail=f"no {stem}.png in {labels}"))
        elif matched[stem] != stem:
            notes.add(
                "label map not called quite as its image", Location(name, detail=f"{of_labels[matched[stem]][0]}")
            )
    used = set(matched.values())
    for stem, (name, *_) in of_labels.items():
        if stem not in used:
            notes.add("label map without an image", Location(name))
    pairs = [(names[0], of_labels[matched[stem]][0]) for stem, names in of_images.items() if stem in matched]
    survey = _check_pairs(images, labels, pairs, (encoding, scaling), problems, notes, progress)
    pixels = survey.pixels
    if reason := survey.nothing_to_learn(classes, train=train):
        problems.add("nothing to learn" if train else "nothing to measure", Location(detail=reason))
    elif reason := survey.maybe_background:
        notes.add("pixels that are not labelled", Location(detail=reason))
    for label, name in enumerate(classes, start=1):
        if not pixels[label] and pairs:
            notes.add("class without any pixel", Location(detail=f"{name} (label {label})"))
    return Report(
        source=str(images),
        problems=list(problems),
        notes=list(notes),
        totals={
            "images": len(of_images),
            "label maps": len(of_labels),
            "classes": len(classes),
            "labelled pixels": int(pixels[1:].sum()),
            "unlabelled pixels": int(pixels[0]),
        },
        per_class={name: int(count) for name, count in zip(classes, pixels[1:], strict=True)},
        unit="pixels",
    )


def _files(folder: Path, suffixes: set[str], kind: str, problems: IssueCollector) -> dict[str, list[str]]:
    """As `files_by_stem`; a missing folder, an empty one and several files of one stem are problems."""
    if not folder.is_dir():
        problems.add(f"no such folder of {kind}s", Location(str(folder)))
        return {}
    found = files_by_stem(folder, suffixes)
    if not found:
        problems.add(f"folder without {kind}s", Location(str(folder)))
    for names in found.values():
        if len(names) > 1:
            problems.add(f"several {kind}s of one name", Location(detail=", ".join(names)))
    return found


def _check_formats(images: Path, problems: IssueCollector) -> None:
    """Images of formats that are not read here are problems."""
    for path in sorted(images.iterdir()) if images.is_dir() else ():
        if (kind := UNSUPPORTED_SUFFIXES.get(path.suffix.lower())) and path.is_file():
            problems.add("image that cannot be read here", Location(path.name, detail=f"{kind}: {remedy(kind)}"))


def _check_pairs(
    images: Path,
    labels: Path,
    pairs: Sequence[tuple[str, str]],
    reading: tuple[LabelEncoding, IntensityScaling],
    problems: IssueCollector,
    notes: IssueCollector,
    progress: Callable[[int, int], None] | None,
) -> LabelSurvey:
    """Decodes the pairs, and counts the pixels of each label."""
    survey = LabelSurvey(reading[0])
    for pair in threaded_map(lambda pair: _look_at(images, labels, pair, *reading), pairs, progress):
        for told, found in ((problems, pair.problems), (notes, pair.notes)):
            for kind, location in found:
                told.add(kind, location)
        if pair.counts is not None:
            survey.add(*pair.counts)
    return survey


@dataclass
class _Pair:
    """What an image and its label map tell: problems and notes with their places, and the counts of its pixels."""

    counts: tuple[np.ndarray, list[int], int] | None = None
    problems: list[tuple[str, Location]] = field(default_factory=list)
    notes: list[tuple[str, Location]] = field(default_factory=list)


def _look_at(
    images: Path, labels: Path, names: tuple[str, str], encoding: LabelEncoding, scaling: IntensityScaling
) -> _Pair:
    image_name, label_name = names
    found = _Pair()
    label_map = size = None
    try:
        label_map = decode_image(labels / label_name)
        size = (label_map.height, label_map.width)
    except UserError as error:
        found.problems.append(("unreadable label map", Location(label_name, detail=str(error))))
    try:
        raw = read_raw(images / image_name)
        # A size that is wrong is the label map's, below.
        told = [one for one in pixel_problems(raw, size, scaling) if one[0] != "size mismatch"]
        found.problems += [(kind, Location(image_name, detail=text)) for kind, text in told]
        notes = [*pixel_notes(raw, size, scaling), *file_notes(images / image_name, images)]
        found.notes += [(kind, Location(image_name, detail=text)) for kind, text in notes]
        height, width = raw.displayed(size).shape[1:]
    except UserError as error:
        found.problems.append(("unreadable image", Location(image_name, detail=str(error))))
        height, width = size or (0, 0)
    if label_map is None:
        return found
    errors = dict(validate_semantic_mask(label_map, (width, height), encoding))
    found.problems += [(kind, Location(label_name, detail=text)) for kind, text in errors.items()]
    if not encoding.reads(label_map):
        return found
    found.counts = count_labels(encoding.keys_of(label_map), encoding)
    if not found.problems and not found.counts[0][1:].any():
        found.notes.append(("image wholly unlabelled", Location(label_name)))
    return found
