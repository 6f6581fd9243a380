"""Images and semantic masks in ADE20K's layout; see `label_encoding.py`.

Zhou et al., "Scene Parsing through ADE20K Dataset", CVPR 2017, https://doi.org/10.1109/CVPR.2017.544.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from e3va_cli.components.options import Condition, option
from e3va_cli.data.dataset import Target
from e3va_cli.data.file_names import likely_name, match_stems
from e3va_cli.data.fingerprint import Fingerprint, digest, sample_file_sizes
from e3va_cli.data.formats.base import DATASET_FORMATS, DatasetFormat, Split
from e3va_cli.data.formats.class_names import read_class_names
from e3va_cli.data.formats.held_back import HeldBackOptions
from e3va_cli.data.formats.label_encoding import LabelEncoding, label_encoding
from e3va_cli.data.formats.semantic_masks import MASK_SUFFIXES, files_by_stem, validate_semantic_mask
from e3va_cli.data.images.formats import IMAGE_SUFFIXES, describe_unsupported
from e3va_cli.data.images.intensity import ImageFileOptions, IntensityScaling
from e3va_cli.data.images.reading import DEFAULT_SCALING, decode_image, read_header, read_image
from e3va_cli.data.paths import describe_directory, safe_join
from e3va_cli.data.segmentation_transforms import SegmentationTransforms
from e3va_cli.data.serialized_list import SerializedList
from e3va_cli.data.validation.image_survey import survey_images
from e3va_cli.data.validation.issues import ADVICE, Issue, Location, Progress, Report
from e3va_cli.data.validation.label_survey import survey_masks
from e3va_cli.data.validation.semantic_masks import check_semantic_masks
from e3va_cli.errors import UserError
from e3va_cli.utils.text import escape_text, more_suffix

SEMANTIC = frozenset({"semantic"})
NESTED = "ADEChallengeData2016"  # the top folder of the official archive
CLASS_FILES = ("objectInfo150.txt", "classes.txt", "names.txt")


class SegmentationDataset(Dataset[tuple[tv_tensors.Image, Target]]):
    """Images with semantic masks in the order of their names; see `dataset.Target`.

    Args:
        images: folder.
        labels: folder of semantic masks, named as their images.
        classes: names of the labels from 1.
        encoding: of the masks.
        train: whether it is the training split, which needs two classes.
        select: returns those of the (image, mask) names that belong to the split; all by default.
        scaling: of images of more than 8 bits.
        transforms: of (image, target) pairs.

    Raises:
        UserError: a folder or mask is missing, there are no images or several of one name, or too few classes occur.
            On access to an item: a file is corrupt, or the mask has another size or values without a class.
    """

    def __init__(
        self,
        images: Path,
        labels: Path,
        *,
        classes: Sequence[str],
        encoding: LabelEncoding,
        train: bool = True,
        select: Callable[[list[tuple[str, str]]], list[tuple[str, str]]] = list,
        scaling: IntensityScaling = DEFAULT_SCALING,
        transforms: Callable[[tv_tensors.Image, Target], tuple[Any, Target]] | None = None,
    ) -> None:
        self.images, self.labels, self.transforms = images, labels, transforms
        self.classes = list(classes)
        self.encoding, self.scaling = encoding, scaling
        self.category_ids = list(encoding.category_ids)
        self.dropped: dict[str, int] = {}
        self.num_filtered_images = 0
        self.target_types = SEMANTIC
        of_images, of_labels = _one_by_stem(images, IMAGE_SUFFIXES), _one_by_stem(labels, MASK_SUFFIXES)
        unread = describe_unsupported(os.listdir(images))  # noqa: PTH208 (a Path for each of many costs seconds)
        if not of_images:
            raise UserError(f"no images in {images}; {unread or describe_directory(images / 'any')}")
        matched = match_stems(of_images, of_labels)
        if missing := [name for stem, name in of_images.items() if stem not in matched]:
            wanted = f"{Path(missing[0]).stem}.png"
            likely = likely_name(wanted, of_labels.values())
            raise UserError(
                f"{escape_text(images / missing[0])}{more_suffix(missing)} has no semantic mask "
                f"{escape_text(wanted)} in {labels}"
                f"{f' (perhaps {escape_text(likely)})' if likely else ''}; add it, or remove the image; {ADVICE}"
            )
        self._files = SerializedList(select([(name, of_labels[matched[stem]]) for stem, name in of_images.items()]))
        masks = survey_masks(labels, [name for _, name in self._files], encoding, needed=2 if train else 1)
        if reason := masks.nothing_to_learn(self.classes, train=train):
            raise UserError(f"{labels}: {reason}; {ADVICE}")
        self.notes = [f"{labels}: {reason}"] if (reason := masks.background_warning) else []
        self.notes += [f"{images}: without {unread}"] if unread else []
        headers = survey_images(len(self), self._file_and_size)
        self._orient_ambiguous = headers.orient_ambiguous
        self.notes += headers.notes(str(images), scaling)

    def __len__(self) -> int:
        return len(self._files)

    def fingerprint(self) -> Fingerprint:
        """See `DenseDataset`."""
        sizes = sample_file_sizes(len(self), lambda index: self.images / self._files[index][0])
        of_labels = sample_file_sizes(len(self), lambda index: self.labels / self._files[index][1])
        images, labels = zip(*self._files, strict=True)
        return Fingerprint(len(self), digest(images, sizes), digest(labels, of_labels))

    def _file_and_size(self, index: int) -> tuple[Path, tuple[int, int]]:
        """Return the path of an image, and the (H, W) of its mask."""
        image_name, label_name = self._files[index]
        return self.images / image_name, read_header(self.labels / label_name).size

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, Target]:
        image_name, label_name = self._files[index]
        mask = decode_image(self.labels / label_name)
        annotated = (mask.height, mask.width)
        image = read_image(self.images / image_name, self.scaling, annotated, orient_ambiguous=self._orient_ambiguous)
        height, width = image.shape[1:]
        for _, error in validate_semantic_mask(mask, (width, height), self.encoding):
            raise UserError(f"{escape_text(self.labels / label_name)}: {error}; {ADVICE}")
        labels = self.encoding.encode(self.encoding.keys_of(mask))
        target: Target = {
            "image_id": index + 1,
            "semantic": tv_tensors.Mask(torch.from_numpy(labels.astype(np.int16))),
            "original_size": (height, width),
        }
        return (image, target) if self.transforms is None else self.transforms(image, target)


@DATASET_FORMATS.register("ade20k")
@dataclass
class Ade20kFormat(HeldBackOptions, ImageFileOptions, SegmentationTransforms, DatasetFormat):
    """Folders of images and semantic masks, relative to `root`."""

    target_types: ClassVar[frozenset[str]] = SEMANTIC
    usual_classes: ClassVar[int] = 150

    root: str = option(help="folder that contains the four below, or ADEChallengeData2016")
    train_images: str = option(help="folder")
    train_labels: str = option(help="folder")
    val_images: str = option(help="folder")
    val_labels: str = option(help="folder")
    num_classes: int | None = option(None, help="null: the number of entries in label_map, or of class names", gt=0)
    classes: Any = option(
        None,
        help="names, or a text file of them; null: objectInfo150.txt, classes.txt or names.txt in root, or numbers",
    )
    reduce_zero_label: bool = option(
        True,
        help="0 is unlabeled and classes start at 1; false: classes start at 0, for example with a background",
        legacy_value=True,
        conditions=(Condition("label_map", lambda value: value is None, "which defines the classes"),),
    )
    ignore_index: Any = option(
        None,
        help="unlabeled values, or colors as [[r,g,b]]; null: 255, unless it is a class",
        legacy_value=None,
    )
    label_map: Any = option(
        None,
        help="value or [r,g,b] of each class, for example [0,255], or a file of lines NAME:R,G,B (CVAT's labelmap.txt)",
        legacy_value=None,
    )

    def open(
        self, split: Split, transforms: Callable[..., Any] | None = None, *, targets: Collection[str] = SEMANTIC
    ) -> SegmentationDataset:
        """Open a split; its files are read on access."""
        images, labels = self._folders(split)
        if missing := [folder for folder in (images, labels) if not folder.is_dir()]:
            raise UserError(*(f"no such folder: {folder}; {describe_directory(folder)}" for folder in missing))
        encoding = self._encoding(self._given_names())
        return SegmentationDataset(
            images,
            labels,
            classes=self._class_names(encoding),
            encoding=encoding,
            train=split == "train",
            select=partial(self.select, split),
            scaling=self.scaling,
            transforms=transforms,
        )

    def check(self, split: Split, progress: Progress | None = None, *, targets: Collection[str] = SEMANTIC) -> Report:
        """Decode every image and every semantic mask."""
        images, labels = self._folders(split)
        errors, names = [], None
        try:
            names = self._given_names()
        except UserError as error:
            errors = [Issue("invalid class names", 1, [Location(detail=str(error))])]
        encoding = self._encoding(names)
        classes = self._numbered(encoding)
        try:
            classes = self._class_names(encoding) if not errors else classes
        except UserError as error:
            errors = [Issue("invalid class names", 1, [Location(detail=str(error))])]
        report = check_semantic_masks(
            images, labels, classes, encoding, train=split == "train", scaling=self.scaling, progress=progress
        )
        return replace(report, problems=errors + report.problems)

    def _root(self) -> Path:
        root = Path(self.root).expanduser()
        if not root.is_dir():
            raise UserError(f"no such data root: {root}; set dataset.root to the folder that holds {self.val_images}/")
        folders = (self.train_images, self.train_labels, self.val_images, self.val_labels)
        is_above = (root / NESTED).is_dir() and not any((root / folder).is_dir() for folder in folders)
        return root / NESTED if is_above else root

    def _folders(self, split: Split) -> tuple[Path, Path]:
        """Return the folders of images and of semantic masks."""
        split = self.source_of(split)
        root = self._root()
        names = {key: getattr(self, key) for key in (f"{split}_images", f"{split}_labels")}
        for key, name in names.items():
            if safe_join(root, name) is None:
                raise UserError(f"dataset.{key}={name} is outside dataset.root={root}; set it to a folder inside")
        images, labels = (root / name for name in names.values())
        return images, labels

    def _encoding(self, names: Sequence[str] | None) -> LabelEncoding:
        """Return the encoding; without `num_classes` and `label_map` there are as many classes as names."""
        number = self.num_classes
        if number is None and self.label_map is None and names is not None:
            number = len(names)
        return label_encoding(
            num_classes=number,
            reduce_zero_label=self.reduce_zero_label,
            ignore_index=self.ignore_index,
            label_map=self.label_map,
            root=self._root(),
        )

    def _numbered(self, encoding: LabelEncoding) -> list[str]:
        return encoding.names or [f"class {number}" for number in encoding.category_ids]

    def _source_of_names(self) -> Sequence[str] | str | None:
        if self.classes is not None:
            return self.classes
        root = self._root()
        return next((str(root / name) for name in CLASS_FILES if (root / name).is_file()), None)

    def _given_names(self) -> list[str] | None:
        """Return the names in the option, or in one of the usual files in the root."""
        given = self._source_of_names()
        return None if given is None else read_class_names(given)

    def _class_names(self, encoding: LabelEncoding) -> list[str]:
        """Return the given names, or those of the `label_map` file, or numbers."""
        if self.classes is None and encoding.names:
            return encoding.names
        names = self._given_names()
        if names is None:
            return self._numbered(encoding)
        if len(names) != encoding.num_classes:
            given = self._source_of_names()
            source = given if isinstance(given, str) else "dataset.classes"
            actual, remedy = f"dataset.num_classes is {encoding.num_classes}", f"dataset.num_classes={len(names)}"
            if self.label_map is not None:
                actual, remedy = f"dataset.label_map has {encoding.num_classes}", "dataset.label_map to as many entries"
            raise UserError(
                f"{source} names {len(names)} classes, {actual}; set {remedy}, or dataset.classes to as many names"
            )
        return names


def _one_by_stem(folder: Path, suffixes: set[str]) -> dict[str, str]:
    """Return the file of each stem; raise UserError for stems with several files."""
    files = files_by_stem(folder, suffixes)
    for names in files.values():
        if len(names) > 1:
            listed = escape_text(" and ".join(names))
            raise UserError(f"{folder}: {listed} differ only in the suffix; keep one of them")
    return {stem: names[0] for stem, names in files.items()}
