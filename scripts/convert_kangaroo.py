"""Convert the kangaroo data set to Pascal VOC's layout, in a new folder, split into training and validation images.

    git clone https://github.com/experiencor/kangaroo
    python scripts/convert_kangaroo.py kangaroo data/kangaroo

A fifth of the images, drawn from a seed, is for validation. Images that cannot be read whole are left out, with a line
for each. Exit code 2 and one line on an error.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from e3va_cli.errors import UserError, first_line, print_errors

VAL_FRACTION = 0.2
SEED = 0


def convert(source: Path, target: Path) -> dict[str, list[str]]:
    """Write `VOC2007` with images, annotations and both lists into `target`, a new folder; return the names by split.

    Raises:
        UserError: there are no images.
        OSError: a file is missing or cannot be written, or `target` exists.
    """
    files = [file for file in sorted((source / "images").glob("*.jpg")) if is_readable(file)]
    if not files:
        raise UserError(f"{source / 'images'}: no JPEG images; use the folder of the data set")
    target.mkdir(parents=True)
    images, annotations, lists = (target / "VOC2007" / name for name in ("JPEGImages", "Annotations", "ImageSets/Main"))
    for folder in (images, annotations, lists):
        folder.mkdir(parents=True)
    for file in files:
        shutil.copyfile(file, images / file.name)
        shutil.copyfile(source / "annots" / f"{file.stem}.xml", annotations / f"{file.stem}.xml")
    splits = split_names([file.stem for file in files])
    for split, names in splits.items():
        (lists / f"{split}.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    return splits


def is_readable(file: Path) -> bool:
    """Return whether all of an image can be decoded; print why not."""
    try:
        with Image.open(file) as image:
            image.load()
    except OSError as error:
        print(f"left out {file.name}: {first_line(error)}")
        return False
    return True


def split_names(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the sorted names of `train` and `val`, drawn from a seed."""
    drawn = set(random.Random(SEED).sample(sorted(names), round(VAL_FRACTION * len(names))))
    return {"train": sorted(set(names) - drawn), "val": sorted(drawn)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, help="the folder of the data set, with images/ and annots/")
    parser.add_argument("target", type=Path, help="a new folder")
    args = parser.parse_args(arguments)
    try:
        splits = convert(args.source, args.target)
    except (UserError, OSError) as error:
        print_errors(UserError(str(error)), "convert_kangaroo.py")
        return 2
    counts = " and ".join(f"{len(names)} {split}" for split, names in splits.items())
    print(f"Kangaroos, {counts} images, are in {args.target}: dataset=voc dataset.root={args.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
