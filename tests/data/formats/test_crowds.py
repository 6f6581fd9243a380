"""What CVAT exports: each brush mask with `iscrowd` 1 and an RLE."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from e3va_cli.data.formats.coco import open_coco
from e3va_cli.data.formats.coco_file import coco_paths
from e3va_cli.data.validation.coco import check_coco_file

Write = Callable[..., tuple[Path, Path]]
Annotate = Callable[..., dict[str, Any]]


def brush(annotate: Annotate, number: int, x: int, **keys: Any) -> dict[str, Any]:
    mask = np.zeros((30, 40), np.uint8)
    mask[4:14, x : x + 8] = 1
    edges = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=0, append=0))
    counts = np.diff([0, *edges.tolist(), mask.size]).tolist()
    rle = {"size": [30, 40], "counts": counts if counts[-1] else counts[:-1]}
    return annotate(number, [x, 4, 8, 10], iscrowd=1, segmentation=rle, **keys)


@pytest.fixture
def exported(write_coco: Write, annotate: Annotate) -> tuple[Path, Path]:
    brushed = [brush(annotate, 10 + k, 9 * k) for k in range(3)]
    return write_coco([*brushed, annotate(1, [2, 3, 10, 20]), annotate(2, [5, 5, 9, 9], image_id=5, category_id=7)])


def test_brush_masks_are_reported_with_cause(exported: tuple[Path, Path]) -> None:
    report = check_coco_file(*exported)
    assert [problem.type for problem in report.problems] == ["many crowds"]
    detail = str(report.problems[0].locations[0])
    assert "3 of 5 annotations have iscrowd 1" in detail and "CVAT" in detail
    assert "dataset.use_iscrowd=false" in detail
    data = open_coco(*exported)
    assert data.dropped == {"crowd": 3} and "dataset.use_iscrowd=false" in data.notes[0]


def test_use_iscrowd_false_makes_them_objects(exported: tuple[Path, Path]) -> None:
    data = open_coco(*exported, use_iscrowd=False)
    assert data.dropped == {} and data.notes == []
    _, target = data[0]
    assert target["boxes"].tolist()[:3] == [[0, 4, 8, 14], [9, 4, 17, 14], [18, 4, 26, 14]]
    assert target["masks"].sum((1, 2)).tolist() == [80, 80, 80, 200]
    truth = data.ground_truth()["annotations"]
    assert [entry["iscrowd"] for entry in truth] == [0] * 5
    assert [coco_mask.area(coco_mask.frPyObjects(e["segmentation"], 30, 40)) for e in truth[:3]] == [80] * 3
    report = check_coco_file(*exported, use_iscrowd=False)
    assert report.ok and report.totals["crowds"] == 0 and report.per_class == {"dog": 4, "cat": 1}


def test_no_warning_about_coco_crowds(coco_tiny: Path) -> None:
    for split in ("train2017", "val2017"):
        paths = coco_paths(coco_tiny, split, f"annotations/instances_{split}.json")
        assert not any("crowd" in note for note in open_coco(*paths).notes)
        assert "many crowds" not in [problem.type for problem in check_coco_file(*paths).problems]
