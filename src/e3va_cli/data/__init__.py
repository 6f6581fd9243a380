"""Data sets, what happens to their images before a step, and checks of what is wrong with them."""

from e3va_cli.data import ade20k, coco, shapes, voc
from e3va_cli.data.batch import Batch, collate
from e3va_cli.data.module import DenseData
from e3va_cli.data.source import (
    SOURCES,
    SPLITS,
    Source,
    Split,
    build_source,
    build_transforms,
    open_splits,
    planned_classes,
)
from e3va_cli.data.targets import DenseDataset, DetectionDataset, Target

__all__ = [
    "SOURCES",
    "SPLITS",
    "Batch",
    "DenseData",
    "DenseDataset",
    "DetectionDataset",
    "Source",
    "Split",
    "Target",
    "ade20k",
    "build_source",
    "build_transforms",
    "coco",
    "collate",
    "open_splits",
    "planned_classes",
    "shapes",
    "voc",
]
