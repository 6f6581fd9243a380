"""Any data set of images and label maps in ADE20K's layout, for semantic segmentation.

Zhou et al., "Scene Parsing through ADE20K Dataset", CVPR 2017, https://doi.org/10.1109/CVPR.2017.544.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from e3va_cli.data.class_names import read_class_names
from e3va_cli.data.label_checks import check_label_maps
from e3va_cli.data.label_maps import LABEL_SUFFIXES, files_by_stem, label_map_faults
from e3va_cli.data.packed import PackedList
from e3va_cli.data.paths import path_inside, what_is_there
from e3va_cli.data.report import ADVICE, Finding, Place, Report
from e3va_cli.data.segmentation_transforms import SegmentationTransforms
from e3va_cli.data.source import Split, register
from e3va_cli.data.targets import IMAGE_SUFFIXES, Target, decode_image, read_image
from e3va_cli.errors import UserError
from e3va_cli.text import and_more, printable

NESTED = "ADEChallengeData2016"  # the folder in the archive that people download
CLASS_FILES = ("objectInfo150.txt", "classes.txt", "names.txt")


class SegmentationDataset(Dataset[tuple[tv_tensors.Image, Target]]):
    """Images with label maps in the order of their names; see `targets.Target`.

    Args:
        images: the folder of images
        labels: the folder of label maps, PNG files called as their images: 0 = not labelled, classes from 1
        classes: names of the labels from 1
        transforms: called with the image and the target, returns both

    Raises:
        UserError: a folder or a label map is missing, there are no images, or two of one name. When an item is read:
            a file is broken, or the label map holds colours, labels above the number of classes, or another size.
    """

    def __init__(
        self,
        images: Path,
        labels: Path,
        *,
        classes: Sequence[str],
        transforms: Callable[[tv_tensors.Image, Target], tuple[Any, Target]] | None = None,
    ) -> None:
        self.images, self.labels, self.transforms = images, labels, transforms
        self.classes = list(classes)
        self.category_ids = list(range(1, len(self.classes) + 1))
        self.dropped: dict[str, int] = {}
        self.left_out_images = 0
        self.offers = frozenset({"semantic"})
        of_images, of_labels = _one_by_stem(images, IMAGE_SUFFIXES), _one_by_stem(labels, LABEL_SUFFIXES)
        if not of_images:
            raise UserError(f"no images in {images}; {what_is_there(images / 'any')}")
        if missing := [name for stem, name in of_images.items() if stem not in of_labels]:
            raise UserError(
                f"{printable(images / missing[0])}{and_more(missing)} has no label map "
                f"{printable(Path(missing[0]).stem)}.png in {labels}; "
                f"add it, or take the image out; {ADVICE}"
            )
        self._files = PackedList((name, of_labels[stem]) for stem, name in of_images.items())

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, Target]:
        image_name, label_name = self._files[index]
        image = read_image(self.images / image_name)
        height, width = image.shape[1:]
        labels = decode_image(self.labels / label_name)
        for _, fault in label_map_faults(labels, (width, height), len(self.classes)):
            raise UserError(f"{printable(self.labels / label_name)}: {fault}; {ADVICE}")
        target: Target = {
            "image_id": index + 1,
            "semantic": tv_tensors.Mask(torch.from_numpy(np.asarray(labels).astype(np.int16))),
            "original_size": (height, width),
        }
        return (image, target) if self.transforms is None else self.transforms(image, target)


@register("ade20k")
@dataclass(frozen=True)
class Ade20kSource:
    """Both splits of a folder in ADE20K's layout; the keys of `conf/dataset/ade20k.yaml`, names relative to `root`."""

    offers: ClassVar[frozenset[str]] = frozenset({"semantic"})
    transforms: ClassVar[type[SegmentationTransforms]] = SegmentationTransforms

    root: str
    train_images: str
    train_labels: str
    val_images: str
    val_labels: str
    num_classes: int
    classes: Sequence[str] | str | None

    def open(self, split: Split, transforms: Callable[..., Any] | None = None) -> SegmentationDataset:
        """List a split's files; they are read one by one later."""
        images, labels = self._folders(split)
        if missing := [folder for folder in (images, labels) if not folder.is_dir()]:
            raise UserError(*(f"no such folder: {folder}; {what_is_there(folder)}" for folder in missing))
        return SegmentationDataset(images, labels, classes=self._class_names(), transforms=transforms)

    def check(self, split: Split, progress: Callable[[int, int], None] | None = None) -> Report:
        """Decode every image and every label map."""
        images, labels = self._folders(split)
        faults = []
        try:
            classes = self._class_names()
        except UserError as error:
            faults = [Finding("unusable class names", 1, [Place(detail=str(error))])]
            classes = self._numbered()
        report = check_label_maps(images, labels, classes, progress=progress)
        return replace(report, problems=faults + report.problems)

    def _root(self) -> Path:
        root = Path(self.root).expanduser()
        if not root.is_dir():
            raise UserError(f"no such data root: {root}; set dataset.root to the folder that holds {self.val_images}/")
        folders = (self.train_images, self.train_labels, self.val_images, self.val_labels)
        is_above = (root / NESTED).is_dir() and not any((root / folder).is_dir() for folder in folders)
        return root / NESTED if is_above else root

    def _folders(self, split: Split) -> tuple[Path, Path]:
        """The folders of images and of label maps."""
        root = self._root()
        names = {f"{split}_{kind}": getattr(self, f"{split}_{kind}") for kind in ("images", "labels")}
        for key, name in names.items():
            if path_inside(root, name) is None:
                raise UserError(f"dataset.{key}={name} lies outside of dataset.root={root}; give a folder in it")
        images, labels = (root / name for name in names.values())
        return images, labels

    def _numbered(self) -> list[str]:
        return [f"class {label}" for label in range(1, self.num_classes + 1)]

    def _class_names(self) -> list[str]:
        """As given, or else from one of the usual files in the root, or else numbers."""
        given = self.classes
        if given is None:
            root = self._root()
            given = next((str(root / name) for name in CLASS_FILES if (root / name).is_file()), None)
            if given is None:
                return self._numbered()
        names = read_class_names(given)
        if len(names) != self.num_classes:
            source = given if isinstance(given, str) else "dataset.classes"
            raise UserError(
                f"{source} names {len(names)} classes, dataset.num_classes is {self.num_classes}; "
                f"set dataset.num_classes={len(names)}, or dataset.classes to as many names"
            )
        return names


def _one_by_stem(folder: Path, suffixes: set[str]) -> dict[str, str]:
    """The name of the file of each stem; raises UserError where there are several."""
    found = files_by_stem(folder, suffixes)
    for names in found.values():
        if len(names) > 1:
            listed = printable(" and ".join(names))
            raise UserError(f"{folder} holds {listed}, which differ in the suffix alone; keep one of them")
    return {stem: names[0] for stem, names in found.items()}
