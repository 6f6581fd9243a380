"""Photos that EXIF turns: boxes, masks and predictions are where a viewer shows them, or as the pixels are stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from e3va_cli.data.formats.ade20k import Ade20kFormat
from e3va_cli.data.formats.coco import open_coco
from e3va_cli.data.images.reading import read_image, read_image_size
from e3va_cli.data.validation.coco import check_coco_file
from e3va_cli.inference.images import to_image

Write = Callable[..., tuple[Path, Path]]
Annotate = Callable[..., dict[str, Any]]
STORED = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)


def photo(path: Path, orientation: int, pixels: np.ndarray = STORED) -> np.ndarray:
    """A lossless photo, and what a viewer shows of it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, format="WEBP", lossless=True, exif=exif)
    return np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))


def pixels(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_orientation_is_that_of_pillow(tmp_path: Path, orientation: int) -> None:
    shown = photo(tmp_path / "a.jpg", orientation)
    assert np.array_equal(pixels(read_image(tmp_path / "a.jpg")), shown), "predicted as displayed"
    assert np.array_equal(pixels(to_image(Image.open(tmp_path / "a.jpg"))), shown)
    assert read_image_size(tmp_path / "a.jpg") == shown.shape[:2]
    assert np.array_equal(pixels(read_image(tmp_path / "a.jpg", annotated=shown.shape[:2])), shown)
    as_stored = read_image(tmp_path / "a.jpg", annotated=(30, 40), orient_ambiguous=False)
    assert np.array_equal(pixels(as_stored), STORED)


@pytest.mark.parametrize("value", [0, 9, 60_000])
def test_orientations_that_do_not_exist(tmp_path: Path, value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    Image.fromarray(STORED).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels(read_image(tmp_path / "a.png")), STORED)


def album(write_coco: Write, annotate: Annotate, size: tuple[int, int], orientations: tuple[int, int]) -> Any:
    folder, file = write_coco([annotate(1, [2, 3, 10, 20]), annotate(2, [2, 3, 10, 20], image_id=5, category_id=7)])
    content = json.loads(file.read_text())
    content["images"][0] |= {"height": size[0], "width": size[1]}
    file.write_text(json.dumps(content))
    shown = [photo(folder / name, value) for name, value in zip(("a.png", "sub/b.jpg"), orientations, strict=True)]
    return folder, file, shown


def test_annotated_as_displayed(write_coco: Write, annotate: Annotate) -> None:
    folder, file, (first, second) = album(write_coco, annotate, (40, 30), (6, 3))
    data = open_coco(folder, file)
    image, target = data[0]
    assert np.array_equal(pixels(image), first) and target["masks"].shape == (1, 40, 30)
    assert target["original_size"] == (40, 30)
    assert np.array_equal(pixels(data[1][0]), second), "half a turn fits both, and is displayed"
    report = check_coco_file(folder, file)
    [note] = report.notes
    assert report.ok and (note.type, note.count) == ("image with an EXIF orientation", 2)
    assert "6; applied, as the annotations have the displayed size" in str(note.locations[0])


def test_annotated_as_stored(write_coco: Write, annotate: Annotate) -> None:
    folder, file, _ = album(write_coco, annotate, (30, 40), (6, 3))
    data = open_coco(folder, file)
    for index in (0, 1):  # that the other one is annotated as stored decides of half a turn
        assert np.array_equal(pixels(data[index][0]), STORED)
    [note] = check_coco_file(folder, file).notes
    assert "6; not applied" in str(note.locations[0]) and "unless other images" in str(note.locations[1])


def test_a_size_that_fits_neither(write_coco: Write, annotate: Annotate) -> None:
    folder, file, _ = album(write_coco, annotate, (31, 40), (6, 1))
    [problem] = check_coco_file(folder, file).problems
    assert problem.type == "size mismatch"


@pytest.mark.parametrize("displayed", [True, False])
def test_masks(tmp_path: Path, displayed: bool) -> None:
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    shown = photo(tmp_path / "images" / "a.jpg", 8)
    labels = np.random.default_rng(0).integers(0, 4, shown.shape[:2] if displayed else (30, 40), dtype=np.uint8)
    Image.fromarray(labels).save(tmp_path / "labels" / "a.png")
    folders = {"train_images": "images", "train_labels": "labels", "val_images": "images", "val_labels": "labels"}
    source = Ade20kFormat(root=str(tmp_path), num_classes=3, classes=None, **folders)
    image, target = source.open("train")[0]
    assert np.array_equal(pixels(image), shown if displayed else STORED)
    assert np.array_equal(target["semantic"].numpy(), labels)
    report = source.check("train")
    assert report.ok and "image with an EXIF orientation" in [note.type for note in report.notes]
