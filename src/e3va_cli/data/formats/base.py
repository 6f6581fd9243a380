"""The base class of dataset formats, and the registry behind the `dataset=` group."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from e3va_cli.components.options import Options, option
from e3va_cli.components.registry import Registry
from e3va_cli.data.dataset import DenseDataset, check_same_classes
from e3va_cli.data.images.reading import DEFAULT_SCALING
from e3va_cli.data.transforms import Transforms
from e3va_cli.data.validation.issues import Progress, Report
from e3va_cli.errors import UserError
from e3va_cli.utils.text import truncate_list

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
CLASSES_SHOWN = 10


@dataclass(kw_only=True)
class DatasetFormat(Options):
    """A data set: its options, and opening and checking its splits.

    Attributes:
        target_types: what targets can have of boxes, masks and semantic.
        usual_classes: number of classes of the public data set in this format, for memory estimates without data.
        scaling: of images of more than 8 bits.
    """

    target_types: ClassVar[frozenset[str]]
    usual_classes: ClassVar[int]
    scaling: ClassVar[Any] = DEFAULT_SCALING

    name: str = option()
    num_classes: int | None = option(
        None, help="null: read from the annotations; memory estimates use that of the public data set", gt=0
    )
    metric: str = option(help="evaluation metric: coco, voc, voc_11_point or miou")

    @property
    def largest_image(self) -> tuple[int, int]:
        """Return height and width of the largest training image, in landscape orientation."""
        raise NotImplementedError

    def train_transforms(self) -> Transforms:
        """Return resizing and augmentation of (image, target) pairs."""
        raise NotImplementedError

    def val_transforms(self) -> Transforms:
        """Return resizing of (image, target) pairs for evaluation."""
        raise NotImplementedError

    def open(
        self, split: Split, transforms: Transforms | None = None, *, targets: Collection[str] = ...
    ) -> DenseDataset:
        """Open a split.

        Args:
            split: train or val.
            transforms: of (image, target) pairs.
            targets: what the head needs of boxes, masks and semantic; objects are not dropped for lack of others.
        """
        raise NotImplementedError

    def check(self, split: Split, progress: Progress | None = None, *, targets: Collection[str] = ...) -> Report:
        """Return all issues of a split for a head that needs `targets`."""
        raise NotImplementedError

    @property
    def planned_classes(self) -> int:
        """Return the number of classes for memory estimates without data."""
        return self.num_classes or self.usual_classes


DATASET_FORMATS: Registry[type[DatasetFormat]] = Registry("dataset")


def check_class_count(source: DatasetFormat, dataset: DenseDataset) -> None:
    """Raise UserError if `num_classes` is set and differs from the data."""
    count = len(dataset.classes)
    if source.num_classes not in (None, count):
        raise UserError(
            f"dataset.num_classes={source.num_classes}: the data has {count} classes, "
            f"{truncate_list(dataset.classes, CLASSES_SHOWN)}; remove the option"
        )


def build_datasets(
    source: DatasetFormat, *, train: bool = True, targets: Collection[str] | None = None
) -> tuple[DenseDataset | None, DenseDataset]:
    """Return the training split (None unless `train`) and the validation split, with their transforms.

    Args:
        source: the data set.
        train: whether to open the training split.
        targets: what the head needs of boxes, masks and semantic; None for all.

    Raises:
        UserError: a split cannot be read, has nothing usable, or the classes of the splits differ.
    """
    targets = source.target_types if targets is None else targets
    steps = {"val": source.val_transforms} | ({"train": source.train_transforms} if train else {})
    opened: dict[str, DenseDataset] = {}
    messages: dict[str, None] = {}  # of both splits, without duplicates
    for split in SPLITS:
        if split in steps:
            try:
                opened[split] = source.open(split, steps[split](), targets=targets)
            except UserError as error:
                messages |= dict.fromkeys(error.messages)
    if messages:
        raise UserError(*messages)
    check_class_count(source, opened["val"])
    if train:
        check_same_classes(opened["train"], opened["val"])
    return opened.get("train"), opened["val"]
