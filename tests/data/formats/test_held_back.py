"""Validation images held back from the training images, in each format whose images are files."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from e3va_cli.data import build_datasets
from e3va_cli.errors import UserError

COUNT = 10
XML = (
    "<annotation><filename>{name}.png</filename><size><width>32</width><height>24</height><depth>3</depth></size>"
    "<object><name>thing</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>20</xmax><ymax>20</ymax></bndbox></object>"
    "</annotation>"
)


def image(path: Path, values: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((24, 32, 3), 90, np.uint8) if values is None else values).save(path)


def write_ade20k(root: Path) -> None:
    labels = np.tile(np.uint8([1, 2]), (24, 16))
    for number in range(COUNT):
        image(root / f"images/training/{number}.png")
        image(root / f"annotations/training/{number}.png", labels)


def write_voc(root: Path) -> None:
    year = root / "VOC2007"
    for folder in ("Annotations", "ImageSets/Main"):
        (year / folder).mkdir(parents=True)
    for number in range(COUNT):
        image(year / f"JPEGImages/{number}.png")
        (year / f"Annotations/{number}.xml").write_text(XML.format(name=number))
    (year / "ImageSets/Main/train.txt").write_text("".join(f"{number}\n" for number in range(COUNT)))


def write_coco(root: Path) -> None:
    for number in range(COUNT):
        image(root / f"train2017/{number}.png")
    content = {
        "images": [{"id": n, "file_name": f"{n}.png", "height": 24, "width": 32} for n in range(COUNT)],
        "annotations": [
            {"id": n + 1, "image_id": n, "category_id": 1, "bbox": [2, 2, 18, 18], "area": 324, "iscrowd": 0}
            for n in range(COUNT)
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (root / "annotations").mkdir()
    (root / "annotations/instances_train2017.json").write_text(json.dumps(content))


FORMATS = {"ade20k": (write_ade20k, ["dataset.num_classes=2"]), "voc": (write_voc, []), "coco": (write_coco, [])}


def files(dataset) -> set[str]:
    if hasattr(dataset, "_files"):
        return {name for name, _ in dataset._files}
    return {Path(name).name for name in dataset._file_names}


@pytest.mark.parametrize("name", FORMATS)
def test_the_splits_are_parts_of_the_training_images(config, tmp_path, name):
    write, options = FORMATS[name]
    write(tmp_path)
    overrides = [f"dataset={name}", f"dataset.root={tmp_path}", "dataset.val_fraction=0.3", *options]
    train, val = build_datasets(config(*overrides).dataset)
    assert (len(train), len(val)) == (7, 3)
    assert files(train) | files(val) == {f"{number}.png" for number in range(COUNT)}
    assert files(val) == files(build_datasets(config(*overrides).dataset, train=False)[1])
    assert not train.dropped and not val.dropped
    assert [one["image_id"] for one in (val[0][1], val[2][1])] and len(files(val)) == 3


def test_too_few_images_to_split(config, tmp_path):
    write_coco(tmp_path)
    source = config("dataset=coco", f"dataset.root={tmp_path}", "dataset.val_fraction=0.01").dataset
    with pytest.raises(UserError, match=r"dataset.val_fraction=0.01: 10 images cannot be split"):
        build_datasets(source)
