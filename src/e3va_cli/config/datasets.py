"""Options of data sets, their transforms, and loading."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class DatasetConfig:
    """Images, their classes, and how results are measured; each format has options of its own."""

    name: str = MISSING
    num_classes: int = MISSING
    metric: str = MISSING


@dataclass
class DetectionConfig(DatasetConfig):
    """Images with boxes, resized by their sides."""

    train_short_sides: list[int] = MISSING
    val_short_side: int = MISSING
    max_size: int = MISSING
    flip: float = MISSING
    crop_probability: float = 0.0
    crop_short_sides: list[int] = field(default_factory=list)
    crop_range: list[int] = field(default_factory=list)


@dataclass
class ShapesConfig(DetectionConfig):
    """Images generated from a seed."""

    image_size: int = MISSING
    train_images: int = MISSING
    val_images: int = MISSING
    seed: int = MISSING


@dataclass
class CocoConfig(DetectionConfig):
    """A data set in COCO's format; file and folder names are relative to `root`."""

    root: str = MISSING
    train_images: str = MISSING
    train_annotations: str = MISSING
    val_images: str = MISSING
    val_annotations: str = MISSING
    filter_empty: bool = False


@dataclass
class VocConfig(DetectionConfig):
    """A data set in Pascal VOC's layout; `classes` is null, a list of names, or a file of them."""

    root: str = MISSING
    train_set: str | None = None
    val_set: str | None = None
    classes: Any = None
    filter_empty: bool = False


@dataclass
class Ade20kConfig(DatasetConfig):
    """Images with label maps; folder names are relative to `root`, `classes` as for VOC."""

    root: str = MISSING
    train_images: str = MISSING
    train_labels: str = MISSING
    val_images: str = MISSING
    val_labels: str = MISSING
    classes: Any = None
    short_side: int = MISSING
    max_size: int = MISSING
    scales: list[float] = MISSING
    crop_size: int = MISSING
    crop_one_class: float = MISSING
    flip: float = MISSING
    distort: bool = MISSING


@dataclass
class DataConfig:
    """Loading of batches."""

    batch_size: int = MISSING
    val_batch_size: int = MISSING
    num_workers: int = MISSING
