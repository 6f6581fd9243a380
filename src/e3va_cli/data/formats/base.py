"""The one protocol of data sets, and the registry that the `dataset=` option chooses from."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from e3va_cli.components.options import Options, option
from e3va_cli.components.registry import Registry
from e3va_cli.data.dataset import DenseDataset, check_same_classes
from e3va_cli.data.images.reading import DEFAULT_SCALING
from e3va_cli.data.transforms import Transforms
from e3va_cli.data.validation.issues import Report
from e3va_cli.errors import UserError
from e3va_cli.utils.text import truncate_list

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
CLASSES_SHOWN = 10


@dataclass(kw_only=True)
class DatasetFormat(Options):
    """A data set: the options of its group, and what can be done with the files that they name.

    Attributes:
        offers: the most that its targets can hold, of boxes, masks and semantic.
        usual_classes: of the public data set in this format, for memory plans, which read no files.
        scaling: how images of more than 8 bits are read.
    """

    target_types: ClassVar[frozenset[str]]
    usual_classes: ClassVar[int]
    scaling: ClassVar[Any] = DEFAULT_SCALING

    name: str = option()
    num_classes: int | None = option(
        None, help="null: that of the annotations, or, for a memory plan, of the format's public data set", above=0
    )
    metric: str = option(help="coco, voc, voc_11_point or miou: what results are measured by")

    @property
    def largest_image(self) -> tuple[int, int]:
        """Height and width of the largest image that training can meet, lying on its side."""
        raise NotImplementedError

    def train_transforms(self) -> Transforms:
        """Resizing and augmentation of (image, target) pairs."""
        raise NotImplementedError

    def val_transforms(self) -> Transforms:
        """Resizing to one size."""
        raise NotImplementedError

    def open(
        self, split: Split, transforms: Transforms | None = None, *, targets: Collection[str] = ...
    ) -> DenseDataset:
        """Return a split, with `transforms` applied to its (image, target) pairs.

        Of `targets`, what a head needs of boxes, masks and semantic: nothing is left out for lack of another.
        """
        raise NotImplementedError

    def check(
        self, split: Split, progress: Callable[[int, int], None] | None = None, *, targets: Collection[str] = ...
    ) -> Report:
        """Return all that is wrong with a split for a head that needs `targets`; `progress(done, total)` is called."""
        raise NotImplementedError

    @property
    def planned_classes(self) -> int:
        """The number of classes that a plan, which reads no files, takes."""
        return self.num_classes or self.usual_classes


DATASET_FORMATS: Registry[type[DatasetFormat]] = Registry("dataset")


def check_class_count(source: DatasetFormat, dataset: DenseDataset) -> None:
    """Raise UserError unless the configured number of classes is that of the data, or none."""
    count = len(dataset.classes)
    if source.num_classes not in (None, count):
        raise UserError(
            f"dataset.num_classes={source.num_classes}: the data has {count} classes, "
            f"{truncate_list(dataset.classes, CLASSES_SHOWN)}; leave the option out, which changes nothing of that"
        )


def build_datasets(
    source: DatasetFormat, *, train: bool = True, targets: Collection[str] | None = None
) -> tuple[DenseDataset | None, DenseDataset]:
    """Return the training split (None unless wanted) and the validation split, resized and augmented as configured.

    Args:
        source: the data set.
        train: whether both are wanted.
        targets: what a head needs, of boxes, masks and semantic; None for all that there is.

    Raises:
        UserError: a split cannot be read, holds nothing usable, or the two disagree about classes.
    """
    wanted = source.target_types if targets is None else targets
    steps = {"val": source.val_transforms} | ({"train": source.train_transforms} if train else {})
    opened: dict[str, DenseDataset] = {}
    mistakes: dict[str, None] = {}  # of both splits, each once
    for split in SPLITS:
        if split in steps:
            try:
                opened[split] = source.open(split, steps[split](), targets=wanted)
            except UserError as error:
                mistakes |= dict.fromkeys(error.messages)
    if mistakes:
        raise UserError(*mistakes)
    check_class_count(source, opened["val"])
    if train:
        check_same_classes(opened["train"], opened["val"])
    return opened.get("train"), opened["val"]
