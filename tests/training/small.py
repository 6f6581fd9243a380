"""The smallest runs of training, and what they leave."""

import csv
from pathlib import Path

from tests.conftest import QUICK

# Four steps of two images of 64 pixels an epoch, and an evaluation of two batches.
SMALL = [
    *QUICK,
    "head=retinanet",
    "head.fpn_channels=32",
    "dataset.image_size=64",
    "dataset.train_short_sides=[64]",
    "dataset.val_short_side=64",
    "dataset.max_size=64",
]


def rows(folder: Path) -> list[dict[str, str]]:
    """The history of a run."""
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def last(folder: Path) -> Path:
    """The last checkpoint of a run."""
    return folder / "checkpoints" / "last.ckpt"
