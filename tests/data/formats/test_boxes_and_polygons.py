"""Some objects have a box, some a polygon, some both: what is trained on, and what counts by pycocotools."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from e3va_cli.data.formats.coco import CocoDetection, open_coco
from e3va_cli.data.validation.coco import check_coco_file
from e3va_cli.evaluation.base import build_evaluator
from e3va_cli.models.heads import Detections

Write = Callable[..., tuple[Path, Path]]
Annotate = Callable[..., dict[str, Any]]
TRIANGLE = [21.0, 4.5, 37.0, 6.0, 25.5, 20.0]
RING = np.zeros((30, 40), np.uint8)
RING[5:15, 3:12] = 1


@pytest.fixture
def mixed(write_coco: Write, annotate: Annotate) -> tuple[Path, Path]:
    """Of nine objects, five have boxes alone, two a polygon alone, one an RLE alone, one both; two are in image 5."""
    rle = coco_mask.encode(np.asfortranarray(RING))
    rle = {"size": rle["size"], "counts": rle["counts"].decode()}
    return write_coco(
        [
            annotate(1, [2, 3, 10, 20]),
            *(annotate(2 + k, [3 * k, 2 * k, 9, 8], segmentation=[None, []][k % 2]) for k in range(4)),
            annotate(6, [1, 1, 12, 9], segmentation=None, image_id=5, category_id=7),
            annotate(7, [0, 0, 0, 0], bbox=None, area=None, segmentation=[TRIANGLE]),
            annotate(8, [0, 0, 0, 0], bbox=[], area=None, segmentation=[TRIANGLE], category_id=7),
            annotate(9, [0, 0, 0, 0], bbox=None, area=None, segmentation=rle, image_id=5),
        ]
    )


def found_by(data: CocoDetection, truth: list[dict[str, Any]], jitter: float = 1) -> dict[int, Detections]:
    """Boxes of all annotated objects, up to `jitter` pixels beside them."""
    random = np.random.default_rng(0)
    found = {}
    for image in (11, 5):
        objects = [entry for entry in truth if entry["image_id"] == image]
        boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (entry["bbox"] for entry in objects)])
        boxes = boxes + torch.from_numpy(random.uniform(-jitter, jitter, boxes.shape).astype(np.float32))
        scores = torch.from_numpy(random.random(len(objects)).astype(np.float32))
        labels = torch.tensor([data.category_ids.index(entry["category_id"]) + 1 for entry in objects])
        masks = torch.ones(len(objects), 1, 28, 28)
        found[image] = Detections(boxes.float(), scores, labels, masks, (30, 40))
    return found


def ours(data: CocoDetection, found: dict[int, Detections], kinds: list[str]) -> Any:
    evaluator = build_evaluator("coco", data, kinds)
    for image, detections in found.items():
        evaluator.update(detections, {"image_id": image, "original_size": (30, 40)})
    return evaluator, evaluator.compute()


def pycocotools(truth: list[dict[str, Any]], results: list[dict[str, Any]], kind: str) -> float:
    coco = COCO()
    images = [{"id": number, "height": 30, "width": 40} for number in (11, 5)]
    coco.dataset = {"images": images, "annotations": truth, "categories": [{"id": 3}, {"id": 7}]}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


def by_hand(*, masks: bool) -> list[dict[str, Any]]:
    """The annotations as pycocotools has to see them, written without the reader.

    It ignores objects beyond its largest area, which are no crowds: a detection takes one only where it matches it.
    """
    rle = coco_mask.encode(np.asfortranarray(RING))
    triangle = [21.0, 4.5, 16.0, 15.5]
    rows: list[tuple[int, int, list[float], Any]] = [
        (11, 3, [2, 3, 10, 20], [[2, 3, 12, 3, 12, 23, 2, 23]]),
        *((11, 3, [3 * k, 2 * k, 9, 8], None) for k in range(4)),
        (5, 7, [1, 1, 12, 9], None),
        (11, 3, triangle, [TRIANGLE]),
        (11, 7, triangle, [TRIANGLE]),
        (5, 3, [3, 5, 9, 10], rle),
    ]
    truth = []
    for number, (image, category, (x, y, w, h), segmentation) in enumerate(rows, start=1):
        lacks = segmentation is None
        outline = [[x, y, x + w, y, x + w, y + h, x, y + h]] if lacks else segmentation
        encoded = outline
        if isinstance(outline, list):
            encoded = coco_mask.merge(coco_mask.frPyObjects([[float(v) for v in p] for p in outline], 30, 40))
        area = float(coco_mask.area(encoded)) if not lacks else w * h
        entry = {"id": number, "image_id": image, "category_id": category, "bbox": [x, y, w, h], "area": area}
        if masks and lacks:
            entry["area"] = 1e12
        truth.append({**entry, "segmentation": encoded, "iscrowd": 0})
    return truth


def test_a_head_without_masks_trains_on_all(mixed: tuple[Path, Path]) -> None:
    data = open_coco(*mixed, targets={"boxes"})
    assert data.dropped == {} and data.notes == []
    assert sum(len(target["boxes"]) for _, target in data) == 9
    assert all("masks" not in target for _, target in data)
    boxes = data[0][1]["boxes"].tolist()
    assert boxes[5] == boxes[6] == [21, 4.5, 37, 20] and data[1][1]["boxes"].tolist()[1] == [3, 5, 12, 15]
    report = check_coco_file(*mixed, targets={"boxes"})
    assert report.ok and report.per_class == {"dog": 7, "cat": 2}


def test_a_head_with_masks_warns_about_dropped_objects(mixed: tuple[Path, Path]) -> None:
    data = open_coco(*mixed)
    assert data.dropped == {"no usable mask": 5}
    assert "5 of 9 objects have no mask" in data.notes[0] and "head=retinanet" in data.notes[0]
    assert sum(len(target["boxes"]) for _, target in data) == 4
    for _, target in data:
        assert len(target["masks"]) == len(target["boxes"])
    [problem] = check_coco_file(*mixed).problems
    assert (problem.type, problem.count) == ("annotation without a mask", 5)


@pytest.mark.parametrize("kinds", [["boxes"], ["boxes", "masks"]])
def test_evaluation_is_that_of_pycocotools(mixed: tuple[Path, Path], kinds: list[str]) -> None:
    """Also where one data set serves two heads, whichever it was opened for."""
    truth = by_hand(masks="masks" in kinds)
    for targets in (["boxes"], ["boxes", "masks"]):
        data = open_coco(*mixed, targets=targets)
        evaluator, results = ours(data, found_by(data, truth), kinds)
        found = [one for of_image in evaluator.predictions.values() for one in of_image]
        for kind, name in (("bbox", "box"), ("segm", "mask"))[: len(kinds)]:
            left_out = {"bbox": "segmentation", "segm": "bbox"}[kind]
            expected = pycocotools(truth, [{k: v for k, v in one.items() if k != left_out} for one in found], kind)
            assert results[name]["AP"] == pytest.approx(expected, abs=1e-9) and 0 < expected < 1


def test_dropped_objects_are_ignored_in_evaluation(mixed: tuple[Path, Path]) -> None:
    """A perfect detector of what is trained on has an AP of 1, whatever it finds of the rest."""
    data = open_coco(*mixed)
    for skipped in (set(), {2, 3, 6}):
        truth = [entry for entry in by_hand(masks=True) if entry["id"] not in skipped]
        exact = found_by(data, truth, jitter=0)
        evaluator = build_evaluator("coco", data, ["boxes", "masks"])
        evaluator.iou_types = ["box"]
        for image, detections in exact.items():
            evaluator.update(detections, {"image_id": image, "original_size": (30, 40)})
        assert evaluator.compute()["box"]["AP"] == pytest.approx(1)
