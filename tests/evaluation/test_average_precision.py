import contextlib
import io

import numpy as np
import pycocotools.mask as rle
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from e3va_cli.data.formats.shapes import OUTLINES, Shapes
from e3va_cli.evaluation import AveragePrecision
from e3va_cli.models.heads import Detections

IDS = [3, 7, 8, 20, 90]  # not contiguous


def of(image):
    return {"image_id": image, "original_size": (128, 128)}


def truth_and_findings(images=12, seed=0):
    """Ground truth with odd category ids and a crowd, and noisy findings on it."""
    dataset = Shapes("val", images=images, size=128, seed=seed)
    truth = dataset.ground_truth()
    for annotation in truth["annotations"]:
        annotation["category_id"] = IDS[annotation["category_id"] - 1]
    for category, identity in zip(truth["categories"], IDS, strict=True):
        category["id"] = identity
    truth["annotations"][3]["iscrowd"] = 1
    generator = torch.Generator().manual_seed(seed)
    findings = {}
    for index in range(images):
        _, target = dataset[index]
        boxes = torch.cat([target["boxes"], target["boxes"]]).float()
        boxes = boxes + torch.randn(boxes.shape, generator=generator) * 2
        boxes = torch.stack(
            [boxes[:, 0::2].min(1)[0], boxes[:, 1::2].min(1)[0], boxes[:, 0::2].max(1)[0], boxes[:, 1::2].max(1)[0]], 1
        ).clamp(0, 128)
        labels = torch.cat([target["labels"], torch.randint(1, 6, target["labels"].shape, generator=generator)])
        scores = torch.rand(len(boxes), generator=generator)
        masks = torch.rand(len(boxes), 1, 28, 28, generator=generator) * 0.5 + 0.42
        findings[target["image_id"]] = Detections(boxes, scores, labels, masks, (128, 128))
    return truth, findings


def pycocotools_stats(truth, findings, kind):
    results = []
    for image, found in findings.items():
        for box, score, label, mask in zip(found.boxes, found.scores, found.labels, found.paste_masks(), strict=True):
            x1, y1, x2, y2 = box.double().tolist()
            result = {"image_id": image, "category_id": IDS[label - 1], "score": score.item()}
            if kind == "bbox":
                result["bbox"] = [x1, y1, x2 - x1, y2 - y1]
            else:
                result["segmentation"] = rle.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
            results.append(result)
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = truth
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(results), kind)
        evaluation.params.imgIds = sorted(findings)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("part", [12, 5])
def test_equals_pycocotools(part):
    truth, findings = truth_and_findings()
    findings = dict(list(findings.items())[:part])  # only the images given count
    metric = AveragePrecision(truth, IDS, ("box", "mask"))
    for image, found in findings.items():
        metric.update(found, of(image))
    results = metric.compute()
    for kind, iou in (("box", "bbox"), ("mask", "segm")):
        reference = pycocotools_stats(truth, findings, iou)
        names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
        for name, value in zip(names, reference.stats[:6], strict=True):
            assert (results[kind][name] if results[kind][name] is not None else -1) == pytest.approx(value, abs=1e-6)
        assert results[kind]["AR100"] == pytest.approx(reference.stats[8], abs=1e-6)
        assert 0.05 < results[kind]["AP50"] < 0.95
        precision = reference.eval["precision"]
        for k, name in enumerate(["circle", "square", "triangle", "star", "ring"]):
            of_class = precision[:, :, k, 0, -1]
            assert results[kind]["per_class"][name] == pytest.approx(of_class[of_class > -1].mean(), abs=1e-6)


def test_no_detections_are_zero_and_no_objects_are_none():
    truth, findings = truth_and_findings(images=3)
    nothing = Detections(
        torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 1, 28, 28), (128, 128)
    )
    metric = AveragePrecision(truth, IDS, ("box", "mask"))
    for image in findings:
        metric.update(nothing, of(image))
    assert metric.compute()["box"]["AP"] == 0.0
    metric = AveragePrecision({**truth, "annotations": []}, IDS, ("box",))
    for image, found in findings.items():
        metric.update(found, of(image))
    assert metric.compute()["box"]["AP"] is None


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_no_detections_equal_pycocotools(kind):
    """Only the second of two images is given: its objects are small, of some classes, and one is a crowd."""
    truth, _ = truth_and_findings(images=2)
    given = [a for a in truth["annotations"] if a["image_id"] == 2]
    given[0] |= {"iscrowd": 1, "category_id": IDS[0]}
    for annotation in given[1:]:
        annotation |= {"area": 100.0, "category_id": IDS[1]}
    metric = AveragePrecision(truth, IDS, (kind,))
    metric.update(
        Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), torch.zeros(0, 1, 28, 28), (128, 128)), of(2)
    )
    found = metric.compute()[kind]
    assert found.pop("per_class") == {name: 0.0 if name == "square" else None for name in OUTLINES}
    with contextlib.redirect_stdout(io.StringIO()):
        reference, nothing = COCO(), COCO()
        reference.dataset, nothing.dataset = truth, {**truth, "annotations": []}
        reference.createIndex(), nothing.createIndex()
        evaluation = COCOeval(reference, nothing, {"box": "bbox", "mask": "segm"}[kind])
        evaluation.params.imgIds = [2]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert [-1 if value is None else value for value in found.values()] == [*evaluation.stats[:6], evaluation.stats[8]]


def test_masks_are_kept_as_rle():
    truth, findings = truth_and_findings(images=2)
    metric = AveragePrecision(truth, IDS, ("box", "mask"))
    for image, found in findings.items():
        metric.update(found, of(image))
    assert all(isinstance(r["segmentation"]["counts"], bytes) for found in metric.predictions.values() for r in found)
    metric.reset()
    assert metric.predictions == {}


@pytest.mark.parametrize(("ignored", "expected"), [("ignore", 0.5), ("iscrowd", 1.0)])
def test_an_ignored_single_object_takes_only_what_matches_it(ignored, expected):
    """A small detection within a large ignored object is a miss, unless the object is a crowd."""
    boxes = [[0, 0, 100, 100], [110, 110, 15, 15]]
    annotations = [
        {"id": n, "image_id": 1, "category_id": 3, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for n, box in enumerate(boxes, start=1)
    ]
    annotations[0] |= {"iscrowd": 1, ignored: 1}
    truth = {
        "images": [{"id": 1, "width": 128, "height": 128}],
        "annotations": annotations,
        "categories": [{"id": 3, "name": "a"}],
    }
    within, exact, found = [30.0, 30.0, 50.0, 50.0], [0.0, 0.0, 100.0, 99.0], [110.0, 110.0, 125.0, 125.0]
    evaluator = AveragePrecision(truth, [3], ["box"])
    scores = torch.tensor([0.9, 0.8, 0.5])
    detections = Detections(
        torch.tensor([within, exact, found]), scores, torch.ones(3, dtype=torch.int64), None, (128, 128)
    )
    evaluator.update(detections, of(1))
    assert evaluator.compute()["box"]["AP"] == pytest.approx(expected)
