"""Options of data sets, their transforms, and loading."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class DatasetConfig:
    """Images, their classes, and how results are measured; each format has options of its own."""

    name: str = MISSING
    num_classes: int | None = None
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
class ImageFilesConfig:
    """Images that are read from files under `root`; file and folder names are relative to it."""

    root: str = MISSING
    intensity_range: list[float] | None = None
    intensity_percentiles: list[float] = MISSING


@dataclass
class CocoConfig(ImageFilesConfig, DetectionConfig):
    """A data set in COCO's format."""

    train_images: str = MISSING
    train_annotations: str = MISSING
    val_images: str = MISSING
    val_annotations: str = MISSING
    use_iscrowd: bool = MISSING
    filter_empty: bool = False


@dataclass
class VocConfig(ImageFilesConfig, DetectionConfig):
    """A data set in Pascal VOC's layout; `classes` is null, a list of names, or a file of them."""

    train_set: str | None = None
    val_set: str | None = None
    classes: Any = None
    encoding: str | None = None
    filter_empty: bool = False


@dataclass
class Ade20kConfig(ImageFilesConfig, DatasetConfig):
    """Images with label maps; `classes` as for VOC."""

    train_images: str = MISSING
    train_labels: str = MISSING
    val_images: str = MISSING
    val_labels: str = MISSING
    classes: Any = None
    reduce_zero_label: bool = MISSING
    ignore_index: Any = None
    label_map: Any = None
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
