"""Masks drawn at the size that is trained on: those of the whole image, resized, without its memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F  # noqa: N812

from e3va_cli.data.encoded_masks import EncodedMasks
from e3va_cli.data.formats.coco import open_coco
from e3va_cli.data.transforms import DetectionTransforms

SIZE = (300, 410)


def blobs(count: int = 6) -> list[list[float]]:
    random = np.random.default_rng(0)
    angles = np.linspace(0, 2 * np.pi, 25)[:-1]
    found = []
    for _ in range(count):
        center = random.uniform([60, 60], [350, 240])
        radius = random.uniform(15, 55) * random.uniform(0.8, 1.2, 24)
        found.append((center + radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)).ravel().tolist())
    return found


def whole(polygon: list[float]) -> np.ndarray:
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([polygon], *SIZE)))


def as_rle(mask: np.ndarray, kind: str) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask))
    if kind == "text":
        return {"size": rle["size"], "counts": rle["counts"].decode()}
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    return {"size": list(SIZE), "counts": np.diff([0, *edges.tolist(), flat.size]).tolist()}  # begins with a run of 0


@pytest.mark.parametrize("kind", ["text", "list"])
@pytest.mark.parametrize("size", [SIZE, (150, 205), (77, 103), (600, 820), (1, 1)])
def test_run_lengths_are_those_of_torchvisions_resize(kind: str, size: tuple[int, int]) -> None:
    masks = np.stack([whole(polygon) for polygon in blobs()])
    drawn = EncodedMasks([as_rle(mask, kind) for mask in masks], SIZE).at(size)
    expected = F.resize(tv_tensors.Mask(torch.from_numpy(masks)), list(size))
    assert type(drawn) is tv_tensors.Mask and drawn.dtype == torch.uint8 and drawn.shape == expected.shape
    assert (drawn != expected).float().mean() < 1e-3  # where a pixel lies between two, float32 decides


@pytest.mark.parametrize("size", [SIZE, (150, 205), (77, 103), (600, 820)])
def test_polygons_overlap_the_resized_masks(size: tuple[int, int]) -> None:
    polygons = blobs()
    drawn = EncodedMasks([[polygon] for polygon in polygons], SIZE).at(size).bool()
    masks = torch.from_numpy(np.stack([whole(polygon) for polygon in polygons]))
    expected = F.resize(tv_tensors.Mask(masks), list(size)).bool()
    ious = (drawn & expected).sum((1, 2)) / (drawn | expected).sum((1, 2))
    assert ious.min() >= (1 if size == SIZE else 0.75)  # nearest pixels shift an edge by up to one
    exact = []
    for polygon in polygons:  # by another program, at eight times the size
        canvas = Image.new("1", (8 * size[1], 8 * size[0]))
        scale = np.array([size[1] / SIZE[1], size[0] / SIZE[0]]) * 8
        ImageDraw.Draw(canvas).polygon([tuple(p) for p in np.array(polygon).reshape(-1, 2) * scale], fill=1)
        exact.append(np.asarray(canvas).sum() / 64)
    assert drawn.sum((1, 2)).numpy() == pytest.approx(np.array(exact), rel=0.1)


def test_empty_segmentations() -> None:
    empty = {"size": list(SIZE), "counts": [SIZE[0] * SIZE[1]]}
    assert EncodedMasks([empty], SIZE).at((20, 30)).sum() == 0
    assert EncodedMasks([], SIZE).at((20, 30)).shape == (0, 20, 30)


@pytest.fixture
def large(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """An image of 1500 x 1000 pixels with 150 objects, whose masks at that size take 215 MiB."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (1500, 1000), (30, 90, 150)).save(tmp_path / "images" / "a.jpg")
    annotations = []
    for number in range(150):
        x, y = 100 * (number % 15) + 10, 100 * (number // 15) + 10
        polygon = [x, y, x + 80, y, x + 80, y + 70, x, y + 70]
        entry = {"id": number + 1, "image_id": 1, "category_id": 1, "bbox": [x, y, 80, 70], "segmentation": [polygon]}
        annotations.append({**entry, "area": 5600, "iscrowd": 0})
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 1500, "height": 1000}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cell"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    return lambda transforms: open_coco(tmp_path / "images", tmp_path / "a.json", transforms=transforms)


def test_a_large_image_of_many_objects_takes_the_memory_of_the_resized_one(large: Callable[..., Any]) -> None:
    transforms = DetectionTransforms(train_short_sides=[100], val_short_side=100, max_size=150, flip=1.0)
    for split in (transforms.train_transforms(), transforms.val_transforms()):
        data = large(split)
        tracemalloc.start()
        image, target = data[0]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert image.shape == (3, 100, 150) and peak < 30 * 2**20
        if split is not None and isinstance(target["masks"], torch.Tensor):
            assert target["masks"].shape == (150, 100, 150)
            for (x1, y1, x2, y2), mask in zip(target["boxes"].tolist(), target["masks"], strict=True):
                rows, columns = (mask.any(axis).nonzero().flatten() for axis in (1, 0))
                ends = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert np.abs(np.array(ends) - [x1, y1, x2, y2]).max() <= 1
    assert isinstance(target["masks"], EncodedMasks) and len(target["masks"]) == 150
    assert large(None)[0][1]["masks"].shape == (150, 1000, 1500)
