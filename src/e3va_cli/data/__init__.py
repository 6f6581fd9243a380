"""Data sets, what happens to their images before a step, and checks of what is wrong with them."""

from e3va_cli.data import ade20k, coco, shapes, voc
from e3va_cli.data.batch import Batch, collate
from e3va_cli.data.module import DenseData, LoaderOptions
from e3va_cli.data.source import (
    SOURCES,
    SPLITS,
    Source,
    Split,
    open_splits,
)
from e3va_cli.data.targets import DenseDataset, DetectionDataset, Target

__all__ = [
    "SOURCES",
    "SPLITS",
    "Batch",
    "DenseData",
    "DenseDataset",
    "DetectionDataset",
    "LoaderOptions",
    "Source",
    "Split",
    "Target",
    "ade20k",
    "coco",
    "collate",
    "open_splits",
    "shapes",
    "voc",
]
