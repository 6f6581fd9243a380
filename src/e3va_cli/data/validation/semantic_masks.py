"""All issues of a folder of images with a folder of semantic masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from e3va_cli.data.file_names import match_stems
from e3va_cli.data.formats.label_encoding import LabelEncoding
from e3va_cli.data.formats.semantic_masks import MASK_SUFFIXES, files_by_stem, validate_semantic_mask
from e3va_cli.data.images.formats import IMAGE_SUFFIXES, UNSUPPORTED_SUFFIXES, conversion_hint
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
    """Decode every image and semantic mask, and count the pixels of each class.

    Args:
        images: folder.
        labels: folder of semantic masks, named as their images.
        classes: names of the labels from 1.
        encoding: of the masks.
        train: whether it is the training split, which needs two classes.
        scaling: of images of more than 8 bits.
        progress: called with the number of decoded pairs and of all pairs.
    """
    problems, notes = IssueCollector(), IssueCollector()
    of_images = _files(images, IMAGE_SUFFIXES, "image", problems)
    _check_formats(images, problems)
    of_labels = _files(labels, MASK_SUFFIXES, "semantic mask", problems)
    matched = match_stems(of_images, of_labels)
    for stem, (name, *_) in of_images.items():
        if stem not in matched:
            problems.add("missing semantic mask", Location(name, detail=f"no {stem}.png in {labels}"))
        elif matched[stem] != stem:
            notes.add(
                "semantic mask name differs from its image", Location(name, detail=f"{of_labels[matched[stem]][0]}")
            )
    used = set(matched.values())
    for stem, (name, *_) in of_labels.items():
        if stem not in used:
            notes.add("semantic mask without an image", Location(name))
    pairs = [(names[0], of_labels[matched[stem]][0]) for stem, names in of_images.items() if stem in matched]
    survey = _check_pairs(images, labels, pairs, (encoding, scaling), problems, notes, progress)
    pixels = survey.pixels
    if reason := survey.nothing_to_learn(classes, train=train):
        problems.add("nothing to learn" if train else "nothing to measure", Location(detail=reason))
    elif reason := survey.background_warning:
        notes.add("unlabeled pixels", Location(detail=reason))
    for label, name in enumerate(classes, start=1):
        if not pixels[label] and pairs:
            notes.add("class without pixels", Location(detail=f"{name} (label {label})"))
    return Report(
        source=str(images),
        problems=list(problems),
        notes=list(notes),
        totals={
            "images": len(of_images),
            "semantic masks": len(of_labels),
            "classes": len(classes),
            "labeled pixels": int(pixels[1:].sum()),
            "unlabeled pixels": int(pixels[0]),
        },
        per_class={name: int(count) for name, count in zip(classes, pixels[1:], strict=True)},
        unit="pixels",
    )


def _files(folder: Path, suffixes: set[str], noun: str, problems: IssueCollector) -> dict[str, list[str]]:
    """Return `files_by_stem`; a missing or empty folder and files of the same stem are problems."""
    if not folder.is_dir():
        problems.add(f"no such folder of {noun}s", Location(str(folder)))
        return {}
    files = files_by_stem(folder, suffixes)
    if not files:
        problems.add(f"folder without {noun}s", Location(str(folder)))
    for names in files.values():
        if len(names) > 1:
            problems.add(f"several {noun}s of the same name", Location(detail=", ".join(names)))
    return files


def _check_formats(images: Path, problems: IssueCollector) -> None:
    """Report images of unsupported formats."""
    for path in sorted(images.iterdir()) if images.is_dir() else ():
        if (name := UNSUPPORTED_SUFFIXES.get(path.suffix.lower())) and path.is_file():
            problems.add("unsupported image format", Location(path.name, detail=f"{name}: {conversion_hint(name)}"))


def _check_pairs(
    images: Path,
    labels: Path,
    pairs: Sequence[tuple[str, str]],
    reading: tuple[LabelEncoding, IntensityScaling],
    problems: IssueCollector,
    notes: IssueCollector,
    progress: Callable[[int, int], None] | None,
) -> LabelSurvey:
    """Decode the pairs, and count the pixels of each label."""
    survey = LabelSurvey(reading[0])
    for pair in threaded_map(lambda pair: _check_pair(images, labels, pair, *reading), pairs, progress):
        for collector, issues in ((problems, pair.problems), (notes, pair.notes)):
            for issue_type, location in issues:
                collector.add(issue_type, location)
        if pair.counts is not None:
            survey.add(*pair.counts)
    return survey


@dataclass
class _Pair:
    """Issues of an image and its semantic mask, and the result of `count_labels`."""

    counts: tuple[np.ndarray, list[int], int] | None = None
    problems: list[tuple[str, Location]] = field(default_factory=list)
    notes: list[tuple[str, Location]] = field(default_factory=list)


def _check_pair(
    images: Path, labels: Path, names: tuple[str, str], encoding: LabelEncoding, scaling: IntensityScaling
) -> _Pair:
    image_name, label_name = names
    result = _Pair()
    mask = size = None
    try:
        mask = decode_image(labels / label_name)
        size = (mask.height, mask.width)
    except UserError as error:
        result.problems.append(("unreadable semantic mask", Location(label_name, detail=str(error))))
    try:
        raw = read_raw(images / image_name)
        # A wrong size is an issue of the mask, below.
        issues = [one for one in pixel_problems(raw, size, scaling) if one[0] != "size mismatch"]
        result.problems += [(issue_type, Location(image_name, detail=text)) for issue_type, text in issues]
        notes = [*pixel_notes(raw, size, scaling), *file_notes(images / image_name, images)]
        result.notes += [(issue_type, Location(image_name, detail=text)) for issue_type, text in notes]
        height, width = raw.displayed(size).shape[1:]
    except UserError as error:
        result.problems.append(("unreadable image", Location(image_name, detail=str(error))))
        height, width = size or (0, 0)
    if mask is None:
        return result
    errors = dict(validate_semantic_mask(mask, (width, height), encoding))
    result.problems += [(issue_type, Location(label_name, detail=text)) for issue_type, text in errors.items()]
    if not encoding.reads(mask):
        return result
    result.counts = count_labels(encoding.keys_of(mask), encoding)
    if not result.problems and not result.counts[0][1:].any():
        result.notes.append(("image without labeled pixels", Location(label_name)))
    return result
