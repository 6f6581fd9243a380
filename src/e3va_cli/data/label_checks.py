"""Finds every problem of a folder of images with a folder of label maps at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from e3va_cli.data.checks import IMAGE_SUFFIXES, IMAGES_AT_ONCE, THREADS
from e3va_cli.data.label_maps import LABEL_SUFFIXES, files_by_stem, label_map_faults
from e3va_cli.data.report import Findings, Place, Report
from e3va_cli.data.targets import decode_image
from e3va_cli.errors import UserError

Faults = list[tuple[str, Place]]  # kinds, and where


def check_label_maps(
    images: Path, labels: Path, classes: Sequence[str], *, progress: Callable[[int, int], None] | None = None
) -> Report:
    """Decodes every image and every label map, and counts the pixels of each class.

    Args:
        images: the folder of images
        labels: the folder of label maps, each called as its image
        classes: names of the labels from 1
        progress: called now and then with the number of pairs decoded, and of all pairs
    """
    problems, notes = Findings(), Findings()
    of_images = _files(images, IMAGE_SUFFIXES, "image", problems)
    of_labels = _files(labels, LABEL_SUFFIXES, "label map", problems)
    for stem, (name, *_) in of_images.items():
        if stem not in of_labels:
            problems.add("missing label map", Place(name, detail=f"no {stem}.png in {labels}"))
    for stem, (name, *_) in of_labels.items():
        if stem not in of_images:
            notes.add("label map without an image", Place(name))
    pairs = [(names[0], of_labels[stem][0]) for stem, names in of_images.items() if stem in of_labels]
    pixels = _check_pairs(images, labels, pairs, len(classes), problems, notes, progress)
    for label, name in enumerate(classes, start=1):
        if not pixels[label] and pairs:
            notes.add("class without any pixel", Place(detail=f"{name} (label {label})"))
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


def _files(folder: Path, suffixes: set[str], kind: str, problems: Findings) -> dict[str, list[str]]:
    """As `files_by_stem`; a missing folder, an empty one and several files of one stem are problems."""
    if not folder.is_dir():
        problems.add(f"no such folder of {kind}s", Place(str(folder)))
        return {}
    found = files_by_stem(folder, suffixes)
    if not found:
        problems.add(f"folder without {kind}s", Place(str(folder)))
    for names in found.values():
        if len(names) > 1:
            problems.add(f"several {kind}s of one name", Place(detail=", ".join(names)))
    return found


def _check_pairs(
    images: Path,
    labels: Path,
    pairs: Sequence[tuple[str, str]],
    num_classes: int,
    problems: Findings,
    notes: Findings,
    progress: Callable[[int, int], None] | None,
) -> np.ndarray:
    """Decodes the pairs in a few threads; returns the number of pixels [K + 1] of each label, from 0."""
    pixels = np.zeros(num_classes + 1, dtype=np.int64)
    with ThreadPoolExecutor(THREADS) as threads:
        for start in range(0, len(pairs), IMAGES_AT_ONCE):
            batch = pairs[start : start + IMAGES_AT_ONCE]
            found = threads.map(lambda pair: _look_at(images / pair[0], labels / pair[1], num_classes), batch)
            for done, ((_, name), (faults, counts)) in enumerate(zip(batch, found, strict=True), start=start + 1):
                for kind, place in faults:
                    problems.add(kind, place)
                if not faults and not counts[1:].any():
                    notes.add("image wholly unlabelled", Place(name))
                pixels += counts
                if progress and (done % 32 == 0 or done == len(pairs)):
                    progress(done, len(pairs))
    return pixels


def _look_at(image_file: Path, label_file: Path, num_classes: int) -> tuple[Faults, np.ndarray]:
    """All faults of a pair, and the number of pixels of each label up to `num_classes`."""
    counts = np.zeros(num_classes + 1, dtype=np.int64)
    faults: Faults = []
    image, labels = (_decoded(file, kind, faults) for file, kind in ((image_file, "image"), (label_file, "label map")))
    if labels is None:
        return faults, counts
    found = list(label_map_faults(labels, image.size if image else labels.size, num_classes))
    if not any(kind == "label map in colours" for kind, _ in found):
        counts += np.bincount(np.asarray(labels).ravel(), minlength=len(counts))[: len(counts)]
    return faults + [(kind, Place(label_file.name, detail=detail)) for kind, detail in found], counts


def _decoded(file: Path, kind: str, faults: Faults) -> Image.Image | None:
    try:
        return decode_image(file)
    except UserError as error:
        faults.append((f"unreadable {kind}", Place(file.name, detail=str(error))))
        return None
