"""The one protocol of data sets, and the registry that the `dataset=` option chooses from."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Any, ClassVar, Literal, Protocol, TypeVar, cast

from e3va_cli.data.report import Report
from e3va_cli.data.targets import DenseDataset, require_same_classes
from e3va_cli.data.transforms import SplitTransforms, Transforms
from e3va_cli.errors import UserError
from e3va_cli.text import first_few

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
CLASSES_SHOWN = 10


class Source(Protocol):
    """Where the splits of a data set come from; made of the keys of its YAML.

    Attributes:
        offers: the most that its targets can hold, of boxes, masks and semantic.
        transforms: what its images go through.
        usual_classes: of the public data set in this format, for memory plans, which read no files.
    """

    offers: ClassVar[frozenset[str]]
    transforms: ClassVar[type[SplitTransforms]]
    usual_classes: ClassVar[int]

    def open(self, split: Split, transforms: Transforms | None, *, targets: Collection[str] = ...) -> DenseDataset:
        """A split, with `transforms` applied to its (image, target) pairs.

        Of `targets`, what a head needs of boxes, masks and semantic: nothing is left out for lack of another.
        """
        ...

    def check(
        self, split: Split, progress: Callable[[int, int], None] | None, *, targets: Collection[str] = ...
    ) -> Report:
        """All that is wrong with a split for a head that needs `targets`; `progress(done, total)` is called."""
        ...


SourceClass = TypeVar("SourceClass", bound=type[Any])
SOURCES: dict[str, type[Any]] = {}


def register(name: str) -> Callable[[SourceClass], SourceClass]:
    """Make a data set choosable as `dataset=name`; its class is a dataclass of keys of its YAML."""

    def add(source: SourceClass) -> SourceClass:
        SOURCES[name] = source
        return source

    return add


def _made_of(kind: type[Any], config: dict[str, Any]) -> Any:
    """A dataclass filled with those keys of `config` that it has."""
    return kind(**{field.name: config[field.name] for field in fields(kind) if field.name in config})


def build_source(config: dict[str, Any]) -> Source:
    """The source of a plain `dataset` configuration."""
    return cast("Source", _made_of(SOURCES[config["name"]], config))


def build_transforms(config: dict[str, Any]) -> SplitTransforms:
    """The transforms of a plain `dataset` configuration."""
    return cast("SplitTransforms", _made_of(SOURCES[config["name"]].transforms, config))


def require_class_count(config: dict[str, Any], dataset: DenseDataset) -> None:
    """Raises UserError unless a plain `dataset` configuration has the number of classes of the data, or none."""
    given, count = config["num_classes"], len(dataset.classes)
    if given not in (None, count):
        raise UserError(
            f"dataset.num_classes={given}: the data has {count} classes, {first_few(dataset.classes, CLASSES_SHOWN)}; "
            "leave the option out, which changes nothing of that"
        )


def planned_classes(config: dict[str, Any]) -> int:
    """The number of classes that a plan, which reads no files, takes for a plain `dataset` configuration."""
    return int(config["num_classes"] or SOURCES[config["name"]].usual_classes)


def open_splits(
    config: dict[str, Any], *, train: bool = True, targets: Collection[str] | None = None
) -> tuple[DenseDataset | None, DenseDataset]:
    """The training split (None unless wanted) and the validation split, resized and augmented as configured.

    Args:
        config: a plain `dataset` configuration.
        train: whether both are wanted.
        targets: what a head needs, of boxes, masks and semantic; None for all that there is.

    Raises:
        UserError: a split cannot be read, holds nothing usable, or the two disagree about classes.
    """
    source, transforms = build_source(config), build_transforms(config)
    wanted = source.offers if targets is None else targets
    steps = {"val": transforms.val} | ({"train": transforms.train} if train else {})
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
    require_class_count(config, opened["val"])
    if train:
        require_same_classes(opened["train"], opened["val"])
    return opened.get("train"), opened["val"]
