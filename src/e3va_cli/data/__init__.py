"""Data sets, what happens to their images before a step, and checks of what is wrong with them."""

from e3va_cli.data import coco, shapes
from e3va_cli.data.batch import Batch, collate
from e3va_cli.data.module import DetectionData
from e3va_cli.data.source import SPLITS, Source, Split, build_source, open_splits
from e3va_cli.data.targets import DetectionDataset, Target

__all__ = [
    "SPLITS",
    "Batch",
    "DetectionData",
    "DetectionDataset",
    "Source",
    "Split",
    "Target",
    "build_source",
    "coco",
    "collate",
    "open_splits",
    "shapes",
]
