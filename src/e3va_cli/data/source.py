"""The one protocol of data sets, and the registry that the `dataset=` option chooses from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeVar

from e3va_cli.data.report import Report
from e3va_cli.data.targets import DetectionDataset, require_same_classes
from e3va_cli.data.transforms import train_transforms, val_transforms

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
RESIZING = ("train_short_sides", "val_short_side", "max_size", "flip")  # keys that every data set has


class Source(Protocol):
    """Where the splits of a data set come from; made of the keys of its YAML."""

    def open(self, split: Split, transforms: Callable[..., Any] | None) -> DetectionDataset:
        """A split, with `transforms` applied to its (image, target) pairs."""
        ...

    def check(self, split: Split, progress: Callable[[int, int], None] | None) -> Report:
        """Everything that is wrong with a split; `progress(done, total)` is called now and then."""
        ...


SourceClass = TypeVar("SourceClass", bound=Callable[..., Source])
SOURCES: dict[str, Callable[..., Source]] = {}


def register(name: str) -> Callable[[SourceClass], SourceClass]:
    """Make a data set choosable as `dataset=name`."""

    def add(source: SourceClass) -> SourceClass:
        SOURCES[name] = source
        return source

    return add


def build_source(config: dict[str, Any]) -> Source:
    """The source of a plain `dataset` configuration."""
    options = {key: value for key, value in config.items() if key not in (*RESIZING, "name")}
    return SOURCES[config["name"]](**options)


def open_splits(config: dict[str, Any], *, train: bool = True) -> tuple[DetectionDataset | None, DetectionDataset]:
    """The training split (None unless wanted) and the validation split, resized and augmented as configured.

    Raises:
        UserError: a split cannot be read, holds nothing usable, or the two disagree about classes.
    """
    source = build_source(config)
    val = source.open("val", val_transforms(short_side=config["val_short_side"], max_size=config["max_size"]))
    if not train:
        return None, val
    augment = train_transforms(
        short_sides=config["train_short_sides"], max_size=config["max_size"], flip=config["flip"]
    )
    training = source.open("train", augment)
    require_same_classes(training, val)
    return training, val
