"""Data sets, what happens to their images before a step, and checks of what is wrong with them."""

from e3va_cli.data.collate import Batch, collate
from e3va_cli.data.datamodule import DenseData, LoaderOptions
from e3va_cli.data.dataset import DenseDataset, DetectionDataset, Target
from e3va_cli.data.formats import ade20k, coco, shapes, voc
from e3va_cli.data.formats.base import (
    SOURCES,
    SPLITS,
    Source,
    Split,
    open_splits,
)

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
