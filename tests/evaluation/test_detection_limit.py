"""Images of more objects than 100, COCO's number, or than the head gives: AP as pycocotools has it at that number."""

from __future__ import annotations

import contextlib
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from e3va_cli.evaluation.average_precision import AveragePrecision
from e3va_cli.evaluation.detection_limit import detection_limit_warning
from e3va_cli.models.heads import Detections, HeadOptions
from tests.components import options_of

SIDE = 640
COUNT = 400


def grid() -> np.ndarray:
    """400 boxes (x, y, w, h) that do not touch."""
    x, y = np.meshgrid(np.arange(20) * 32.0, np.arange(20) * 32.0)
    return np.stack([x.ravel() + 2, y.ravel() + 2, np.full(COUNT, 24.0), np.full(COUNT, 20.0)], 1)


def truth() -> dict:
    """An image of 400 objects, and one of three."""
    boxes = [(1, box) for box in grid().tolist()] + [(2, box) for box in grid()[:3].tolist()]
    annotations = [
        {"id": n, "image_id": image, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for n, (image, box) in enumerate(boxes, start=1)
    ]
    images = [{"id": number, "height": SIDE, "width": SIDE} for number in (1, 2)]
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cell"}]}


def found(limit: int, seed: int | None = None) -> dict[int, Detections]:
    """The best of all objects that a head gives, exact or with noise."""
    random = np.random.default_rng(seed)
    results = {}
    for image, count in ((1, COUNT), (2, 3)):
        boxes = grid()[:count]
        if seed is not None:
            boxes = boxes + random.uniform(-3, 3, boxes.shape)
        scores = np.sort(random.random(count))[::-1][:limit].astype(np.float32)
        corners = np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])[:limit]
        labels = torch.ones(len(scores), dtype=torch.int64)
        results[image] = Detections(
            torch.from_numpy(corners).float(), torch.from_numpy(scores.copy()), labels, None, (SIDE, SIDE)
        )
    return results


def measured(results: dict[int, Detections]) -> tuple[dict, AveragePrecision]:
    evaluator = AveragePrecision(truth(), [1], ["box"])
    for image, detections in results.items():
        evaluator.update(detections, {"image_id": image, "original_size": (SIDE, SIDE)})
    return evaluator.compute()["box"], evaluator


def reference(evaluator: AveragePrecision, most: int) -> dict[str, float]:
    coco = COCO()
    coco.dataset = truth()
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(
            coco, coco.loadRes([one for image in evaluator.predictions.values() for one in image]), "bbox"
        )
        evaluation.params.maxDets = [1, 100, most]
        evaluation.evaluate()
        evaluation.accumulate()
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    return {
        "AP": precision[:, :, :, 0, -1].mean(),
        "AP50": precision[0, :, :, 0, -1].mean(),
        "AR100": recall[:, :, 0, 1].mean(),
    }


def test_a_perfect_detector_of_400_objects() -> None:
    at_400, _ = measured(found(400))
    assert at_400["AP"] == pytest.approx(1)
    at_100, evaluator = measured(found(100))
    assert at_100["AP"] == pytest.approx(reference(evaluator, 101)["AP"]) and at_100["AP"] < 0.3


@pytest.mark.parametrize("limit", [100, 150, 400])
def test_ap_is_that_of_pycocotools_at_the_heads_limit(limit: int) -> None:
    ours, evaluator = measured(found(limit, seed=0))
    expected = reference(evaluator, max(101, limit))
    assert {name: ours[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    assert 0.05 < ours["AP"] < 0.9


def head_options(name: str, **options: Any) -> HeadOptions:
    head: HeadOptions = options_of("head", name=name, **options)
    return head


def dataset(*counts: int) -> SimpleNamespace:
    return SimpleNamespace(objects_per_image=np.array(counts))


def test_warning_names_the_option_and_value() -> None:
    note = detection_limit_warning(dataset(3, 400, 120, 0), head_options("retinanet", detections_per_image=100))
    assert "2 of 4 images have more than head.detections_per_image=100 objects (up to 400)" in note
    assert f"at most {100 * 203 / 523:.1f} %" in note and note.endswith("set head.detections_per_image=400")
    note = detection_limit_warning(dataset(101), head_options("mask_rcnn", box={"detections_per_image": 100}))
    assert note.endswith("set head.box.detections_per_image=101")


def test_no_warning_below_the_limit() -> None:
    assert detection_limit_warning(dataset(3, 400), head_options("retinanet", detections_per_image=400)) is None
    assert detection_limit_warning(dataset(3, 400), head_options("upernet")) is None
    assert detection_limit_warning(SimpleNamespace(), head_options("retinanet", detections_per_image=1)) is None
