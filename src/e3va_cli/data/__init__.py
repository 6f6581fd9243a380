"""Data sets in several formats, their transforms and loaders, and their validation."""

from e3va_cli.data.collate import Batch, collate
from e3va_cli.data.datamodule import DenseDataModule, LoaderOptions
from e3va_cli.data.dataset import DenseDataset, DetectionDataset, Target
from e3va_cli.data.formats import ade20k, coco, shapes, voc
from e3va_cli.data.formats.base import (
    DATASET_FORMATS,
    SPLITS,
    DatasetFormat,
    Split,
    build_datasets,
)

__all__ = [
    "DATASET_FORMATS",
    "SPLITS",
    "Batch",
    "DatasetFormat",
    "DenseDataModule",
    "DenseDataset",
    "DetectionDataset",
    "LoaderOptions",
    "Split",
    "Target",
    "ade20k",
    "build_datasets",
    "coco",
    "collate",
    "shapes",
    "voc",
]
