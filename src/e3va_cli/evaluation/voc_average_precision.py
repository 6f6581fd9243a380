"""Average precision of boxes by Pascal VOC's definition.

Everingham et al., The Pascal Visual Object Classes (VOC) Challenge, IJCV 2010, section 4.2, as the development kit's
VOCevaldet.m computes it: the precision-recall curve of all images together, at one IoU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from e3va_cli.data import DetectionDataset, Target
from e3va_cli.evaluation.average_precision import unique_category_names
from e3va_cli.evaluation.base import Results, register
from e3va_cli.evaluation.prediction_store import PredictionStore, save_predictions
from e3va_cli.models.heads import Detections
from e3va_cli.visualization.precision_recall import RECALL, PrecisionRecall

IOU = 0.5
RECALL_STEPS = 10

Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Rule = Callable[[Ints, Floats, int], float]
"""AP of a class from the hits among its first n detections (N,), their precision (N,), and the number of objects."""
Ranked = tuple[Ints, Floats, int]
"""Arguments of a rule."""


def area_under_curve(hits: Ints, precision: Floats, objects: int) -> float:
    """Return the area under the monotonically decreasing precision-recall curve: VOC's rule since 2010."""
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(hits, prepend=0) * highest).sum() / objects)


def eleven_points(hits: Ints, precision: Floats, objects: int) -> float:
    """Return the mean of the highest precision at recall >= 0, 0.1, ... 1: the rule of VOC 2007."""
    reached = [precision[hits * RECALL_STEPS >= step * objects] for step in range(RECALL_STEPS + 1)]
    return float(np.mean([values.max(initial=0.0) for values in reached]))


class VocAveragePrecision(PredictionStore[Floats32]):
    """Average precision of boxes at IoU 0.5 by Pascal VOC's definition.

    Stores label, score and corners of the detections of each image (N, 6). A detection is matched to the object of its
    class with the highest IoU. At an IoU of 0.5 or more it is a true positive if it has the highest score of those
    matched to the object, else a false positive. Detections matched to difficult objects are ignored, and difficult
    objects do not count as missed.

    Args:
        ground_truth: `images`, `annotations` and `categories` in COCO's format; `iscrowd` marks difficult objects.
        category_ids: ground-truth id of label k at index k - 1.
        rule: computes the AP of a class from its precision-recall curve.
    """

    monitor = "box_AP50"

    def __init__(self, ground_truth: Results, category_ids: Sequence[int], *, rule: Rule) -> None:
        super().__init__()
        names = unique_category_names(ground_truth["categories"])
        self.classes = [names[number] for number in category_ids]
        self.category_ids = list(category_ids)
        self.rule = rule
        self.objects = _objects_by_image(ground_truth, category_ids)

    def update(self, prediction: Detections, target: Target) -> None:
        """Add the detections in one image."""
        detections = prediction.cpu().rescaled(target["original_size"])
        columns = (detections.labels[:, None], detections.scores[:, None], detections.boxes)
        self.predictions[target["image_id"]] = np.hstack([column.float().numpy() for column in columns])

    def log_dict(self, results: Results) -> dict[str, float]:
        """Return AP50 of boxes."""
        value = results["box"]["AP50"]
        return {} if value is None else {self.monitor: value}

    def compute(self) -> Results:
        """Return `{"box": {"AP50": mean over classes, "per_class": {name: AP50}}}`; None: classes without objects."""
        per_class = dict(zip(self.classes, map(self._average_precision, self._ranked()), strict=True))
        defined = [value for value in per_class.values() if value is not None]
        return {"box": {"AP50": float(np.mean(defined)) if defined else None, "per_class": per_class}}

    def save(self, folder: Path) -> dict[str, str]:
        """Write all detections in COCO's results format, and precision-recall curves."""
        ranked = list(self._ranked())
        precision = np.stack([_precision_at_recall(one) for one in ranked])
        curves = PrecisionRecall(self.classes, precision, list(map(self._average_precision, ranked)))
        return save_predictions(self._to_coco_results(), {"box": curves}, folder)

    def _to_coco_results(self) -> Iterator[Results]:
        for image, rows in self.predictions.items():
            for label, score, x1, y1, x2, y2 in rows.astype(np.float64).tolist():
                box = [x1, y1, x2 - x1, y2 - y1]
                yield {"image_id": image, "category_id": self.category_ids[int(label) - 1], "score": score, "bbox": box}

    def _ranked(self) -> Iterator[Ranked | None]:
        """Yield the detections of each class by descending score, None for a class without objects."""
        empty = np.zeros((0, 6))
        all_objects, all_detections = [empty], [empty]
        all_matches, all_ious = [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
        offset = 0  # of an image's objects, among those of all images
        for image in sorted(self.predictions):
            of_image, detected = self.objects.get(image, empty), self.predictions[image].astype(np.float64)
            best, iou = _best_match(detected, of_image)
            all_objects.append(of_image)
            all_detections.append(detected)
            all_matches.append(best + offset)
            all_ious.append(iou)
            offset += len(of_image)
        objects, detections = np.concatenate(all_objects), np.concatenate(all_detections)
        match, matched = np.concatenate(all_matches), np.concatenate(all_ious) >= IOU
        difficult = objects[:, 1] > 0
        ignored = np.zeros(len(match), dtype=np.bool_)
        ignored[matched] = difficult[match[matched]]
        for label in range(1, len(self.classes) + 1):
            count = int(((objects[:, 0] == label) & ~difficult).sum())
            chosen = np.flatnonzero((detections[:, 0] == label) & ~ignored)
            chosen = chosen[np.argsort(-detections[chosen, 1], kind="stable")]
            yield _hits(match[chosen], matched[chosen], count) if count else None

    def _average_precision(self, ranked: Ranked | None) -> float | None:
        return None if ranked is None else self.rule(*ranked)


def _hits(match: Ints, matched: Bools, objects: int) -> Ranked:
    """Return hits and precision of detections by descending score, from their matched object and whether IoU >= 0.5."""
    hit = np.zeros(len(match), dtype=np.int64)
    candidates = np.flatnonzero(matched)
    hit[candidates[np.unique(match[candidates], return_index=True)[1]]] = 1
    hits = hit.cumsum()
    return hits, hits / np.arange(1, len(hits) + 1), objects


def _precision_at_recall(ranked: Ranked | None) -> Floats:
    """Return the highest precision at each recall of `RECALL` or above, -1 for a class without objects."""
    if ranked is None:
        return np.full(len(RECALL), -1.0)
    hits, precision, objects = ranked
    highest = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return highest[np.searchsorted(hits / objects, RECALL)]


def _objects_by_image(ground_truth: Results, category_ids: Sequence[int]) -> dict[int, Floats]:
    """Return label, difficult flag and corners of the objects (M, 6), by image id."""
    labels = {number: label for label, number in enumerate(category_ids, start=1)}
    rows: dict[int, list[tuple[float, ...]]] = {}
    for annotation in ground_truth["annotations"]:
        if label := labels.get(annotation["category_id"]):
            x, y, w, h = annotation["bbox"]
            row = (label, annotation.get("iscrowd", 0), x, y, x + w, y + h)
            rows.setdefault(annotation["image_id"], []).append(row)
    return {image: np.array(objects, dtype=np.float64) for image, objects in rows.items()}


def _best_match(detections: Floats, objects: Floats) -> tuple[Ints, Floats]:
    """Return the object (M, 6) of the same class with the highest IoU for each detection (N, 6), and that IoU or 0."""
    if not len(objects):
        return np.zeros(len(detections), dtype=np.int64), np.zeros(len(detections))
    low = np.maximum(detections[:, None, 2:4], objects[None, :, 2:4])  # N, M, 2
    high = np.minimum(detections[:, None, 4:6], objects[None, :, 4:6])
    intersection = (high - low).clip(min=0).prod(-1)  # N, M
    area, object_area = ((boxes[:, 4:6] - boxes[:, 2:4]).prod(-1) for boxes in (detections, objects))
    union = area[:, None] + object_area[None, :] - intersection
    iou = np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)
    iou[detections[:, None, 0] != objects[None, :, 0]] = 0
    best = iou.argmax(1)
    return best, iou[np.arange(len(detections)), best]


@register("voc", target_type="boxes")
def voc(dataset: DetectionDataset, target_types: Sequence[str]) -> VocAveragePrecision:
    """Build VOC's average precision since 2010, the usual metric for VOC 07+12."""
    return VocAveragePrecision(dataset.ground_truth(), dataset.category_ids, rule=area_under_curve)


@register("voc_11_point", target_type="boxes")
def voc_11_point(dataset: DetectionDataset, target_types: Sequence[str]) -> VocAveragePrecision:
    """Build VOC 2007's average precision."""
    return VocAveragePrecision(dataset.ground_truth(), dataset.category_ids, rule=eleven_points)
