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
"""AP of a class from the hits (N,) among its first n findings, their precision (N,), and the number of objects."""
Ranked = tuple[Ints, Floats, int]
"""What a rule is given."""


def area_under_curve(hits: Ints, precision: Floats, objects: int) -> float:
    """The area under the curve after it was made to fall: VOC's rule as of 2010."""
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(hits, prepend=0) * highest).sum() / objects)


def eleven_points(hits: Ints, precision: Floats, objects: int) -> float:
    """The mean of the highest precisions at a recall of at least 0, 0.1, ... 1: the rule of VOC 2007."""
    reached = [precision[hits * RECALL_STEPS >= step * objects] for step in range(RECALL_STEPS + 1)]
    return float(np.mean([values.max(initial=0.0) for values in reached]))


class VocAveragePrecision(PredictionStore[Floats32]):
    """Collects findings image by image and measures their boxes against a ground truth.

    Of each image are kept label, score and corners of the findings (N, 6). A finding goes to the object of its class
    that it overlaps most. From an IoU of 0.5 on it is a hit if it is the object's first, best score first, and a
    miss otherwise; what goes to a difficult object is neither, and difficult objects do not have to be found.

    Args:
        ground_truth: `images`, `annotations` and `categories` in COCO's format; `iscrowd` marks difficult objects.
        category_ids: the ground truth's id of label k at index k - 1.
        rule: what turns the precision-recall curve of a class into its AP.
    """

    monitor = "box_AP50"

    def __init__(self, ground_truth: Results, category_ids: Sequence[int], *, rule: Rule) -> None:
        super().__init__()
        names = unique_category_names(ground_truth["categories"])
        self.classes = [names[number] for number in category_ids]
        self.category_ids = list(category_ids)
        self.rule = rule
        self.objects = _objects_by_image(ground_truth, category_ids)

    def update(self, found: Detections, target: Target) -> None:
        """Add what was found in one image."""
        detections = found.cpu().rescaled(target["original_size"])
        columns = (detections.labels[:, None], detections.scores[:, None], detections.boxes)
        self.found[target["image_id"]] = np.hstack([column.float().numpy() for column in columns])

    def log_dict(self, results: Results) -> dict[str, float]:
        """AP50 of boxes."""
        value = results["box"]["AP50"]
        return {} if value is None else {self.monitor: value}

    def compute(self) -> Results:
        """`{"box": {"AP50": mean over classes, "per_class": {name: AP50}}}`; None for a class without objects."""
        per_class = dict(zip(self.classes, map(self._of_class, self._ranked()), strict=True))
        measured = [value for value in per_class.values() if value is not None]
        return {"box": {"AP50": float(np.mean(measured)) if measured else None, "per_class": per_class}}

    def save(self, folder: Path) -> dict[str, str]:
        """All findings in COCO's results format, and precision-recall curves."""
        ranked = list(self._ranked())
        curves = PrecisionRecall(
            self.classes, np.stack([_sampled(of_class) for of_class in ranked]), list(map(self._of_class, ranked))
        )
        return save_predictions(self._as_results(), {"box": curves}, folder)

    def _as_results(self) -> Iterator[Results]:
        for image, rows in self.found.items():
            for label, score, x1, y1, x2, y2 in rows.astype(np.float64).tolist():
                box = [x1, y1, x2 - x1, y2 - y1]
                yield {"image_id": image, "category_id": self.category_ids[int(label) - 1], "score": score, "bbox": box}

    def _ranked(self) -> Iterator[Ranked | None]:
        """The findings of each class, None for a class without objects."""
        nothing = np.zeros((0, 6))
        objects, found, matches, overlaps = [nothing], [nothing], [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
        first = 0  # of an image's objects, among those of all images
        for image in sorted(self.found):
            of_image, found_here = self.objects.get(image, nothing), self.found[image].astype(np.float64)
            best, overlap = _best_match(found_here, of_image)
            objects.append(of_image)
            found.append(found_here)
            matches.append(best + first)
            overlaps.append(overlap)
            first += len(of_image)
        all_objects, all_found = np.concatenate(objects), np.concatenate(found)
        match, matched = np.concatenate(matches), np.concatenate(overlaps) >= IOU
        difficult = all_objects[:, 1] > 0
        ignored = np.zeros(len(match), dtype=np.bool_)
        ignored[matched] = difficult[match[matched]]
        for label in range(1, len(self.classes) + 1):
            count = int(((all_objects[:, 0] == label) & ~difficult).sum())
            chosen = np.flatnonzero((all_found[:, 0] == label) & ~ignored)
            chosen = chosen[np.argsort(-all_found[chosen, 1], kind="stable")]
            yield _hits(match[chosen], matched[chosen], count) if count else None

    def _of_class(self, ranked: Ranked | None) -> float | None:
        return None if ranked is None else self.rule(*ranked)


def _hits(match: Ints, matched: Bools, objects: int) -> Ranked:
    """Findings, best score first, by the object that each goes to and whether it overlaps it enough."""
    hit = np.zeros(len(match), dtype=np.int64)
    candidates = np.flatnonzero(matched)
    hit[candidates[np.unique(match[candidates], return_index=True)[1]]] = 1
    hits = hit.cumsum()
    return hits, hits / np.arange(1, len(hits) + 1), objects


def _sampled(ranked: Ranked | None) -> Floats:
    """The highest precision at each recall of `RECALL` or above it, -1 for a class without objects."""
    if ranked is None:
        return np.full(len(RECALL), -1.0)
    hits, precision, objects = ranked
    highest = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return highest[np.searchsorted(hits / objects, RECALL)]


def _objects_by_image(ground_truth: Results, category_ids: Sequence[int]) -> dict[int, Floats]:
    """Label, whether difficult, and corners of each object (M, 6), by image."""
    labels = {number: label for label, number in enumerate(category_ids, start=1)}
    rows: dict[int, list[tuple[float, ...]]] = {}
    for annotation in ground_truth["annotations"]:
        if label := labels.get(annotation["category_id"]):
            x, y, w, h = annotation["bbox"]
            row = (label, annotation.get("iscrowd", 0), x, y, x + w, y + h)
            rows.setdefault(annotation["image_id"], []).append(row)
    return {image: np.array(objects, dtype=np.float64) for image, objects in rows.items()}


def _best_match(found: Floats, objects: Floats) -> tuple[Ints, Floats]:
    """For each finding (N, 6) the object (M, 6) of its class that it overlaps most, and the IoU, 0 if there is none."""
    if not len(objects):
        return np.zeros(len(found), dtype=np.int64), np.zeros(len(found))
    low = np.maximum(found[:, None, 2:4], objects[None, :, 2:4])  # N, M, 2
    high = np.minimum(found[:, None, 4:6], objects[None, :, 4:6])
    shared = (high - low).clip(min=0).prod(-1)  # N, M
    area, area_of_object = ((boxes[:, 4:6] - boxes[:, 2:4]).prod(-1) for boxes in (found, objects))
    union = area[:, None] + area_of_object[None, :] - shared
    iou = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    iou[found[:, None, 0] != objects[None, :, 0]] = 0
    best = iou.argmax(1)
    return best, iou[np.arange(len(found)), best]


@register("voc", needs="boxes")
def voc(dataset: DetectionDataset, kinds: Sequence[str]) -> VocAveragePrecision:
    """VOC's average precision as of 2010, the one that results on VOC 2007 and 2012 together are given in."""
    return VocAveragePrecision(dataset.ground_truth(), dataset.category_ids, rule=area_under_curve)


@register("voc_11_point", needs="boxes")
def voc_11_point(dataset: DetectionDataset, kinds: Sequence[str]) -> VocAveragePrecision:
    """VOC 2007's average precision."""
    return VocAveragePrecision(dataset.ground_truth(), dataset.category_ids, rule=eleven_points)
