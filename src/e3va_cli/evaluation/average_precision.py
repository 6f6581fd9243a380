"""Average precision of boxes and masks by COCO's definition.

Definition: https://cocodataset.org/#detection-eval, as in pycocotools; computed by faster-coco-eval, which returns the
same numbers faster.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pycocotools.mask as rle
from faster_coco_eval import COCO, COCOeval_faster

from e3va_cli.data import DetectionDataset, Target
from e3va_cli.evaluation.base import Results, register
from e3va_cli.evaluation.prediction_store import PredictionStore, save_predictions
from e3va_cli.models.heads import Detections
from e3va_cli.visualization.precision_recall import PrecisionRecall

RESULT_KEYS = {"boxes": "box", "masks": "mask"}  # of each target type
COCO_IOU_TYPES = {"box": "bbox", "mask": "segm"}
SUMMARY = {"AP": 0, "AP50": 1, "AP75": 2, "AP_small": 3, "AP_medium": 4, "AP_large": 5, "AR100": 8}
FIRST_AR = 6  # index in COCO's summary: AR at each of three maxDets
MAX_DETS = [1, 10, 100]  # COCO's, per class and image
LOGGED = ("AP", "AP50")
IGNORED_AREA = 1e11  # pixels; pycocotools ignores objects beyond its largest area range, 1e10


class AveragePrecision(PredictionStore[list[Results]]):
    """Average precision of detections against a ground truth in COCO's format.

    Masks are stored as RLE, so memory grows with the number of objects, not with image size. COCO evaluates 100
    detections per class and image; if a head returns more, all of them are evaluated.

    Args:
        ground_truth: `images`, `annotations` and `categories` in COCO's format. Annotations with `ignore` are single
            objects that count neither as hit nor as miss (pycocotools has this for crowds only).
        category_ids: ground-truth id of label k at index k - 1.
        iou_types: box, mask or both.
    """

    def __init__(self, ground_truth: Results, category_ids: Sequence[int], iou_types: Sequence[str]) -> None:
        super().__init__()
        self.ground_truth = ground_truth
        self.category_ids = list(category_ids)
        self.iou_types = list(iou_types)
        self.monitor = f"{self.iou_types[-1]}_AP"
        self.curves: dict[str, PrecisionRecall] = {}  # of the last `compute`, at IoU 0.5

    def update(self, prediction: Detections, target: Target) -> None:
        """Add the detections in one image."""
        image_id = target["image_id"]
        detections = prediction.cpu().rescaled(target["original_size"])
        corners = detections.boxes.double().numpy()
        results: list[Results] = [
            {"image_id": image_id, "category_id": self.category_ids[label - 1], "score": score, "bbox": box}
            for label, score, box in zip(
                detections.labels.tolist(),
                detections.scores.tolist(),
                np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]]).tolist(),
                strict=True,
            )
        ]
        if "mask" in self.iou_types:
            for result, mask in zip(results, detections.paste_masks(), strict=True):
                result["segmentation"] = rle.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        self.predictions[image_id] = results

    def log_dict(self, results: Results) -> dict[str, float]:
        """Return AP and AP50 of boxes and masks."""
        return {
            f"{iou_type}_{name}": values[name]
            for iou_type, values in results.items()
            for name in LOGGED
            if values[name] is not None
        }

    def compute(self) -> Results:
        """Return `{"box": {"AP": .., "AP50": .., ..., "per_class": {name: AP}}, "mask": {...}}`; None if undefined."""
        return {iou_type: self._evaluate(iou_type) for iou_type in self.iou_types}

    def save(self, folder: Path) -> dict[str, str]:
        """Write all detections in COCO's results format, and precision-recall curves."""
        return save_predictions(chain.from_iterable(self.predictions.values()), self.curves, folder)

    def _evaluate(self, iou_type: str) -> Results:
        annotations = [a for a in self.ground_truth["annotations"] if a["image_id"] in self.predictions]
        if iou_type == "mask":
            annotations = [a for a in annotations if a.get("segmentation")]
        annotations = [{**a, "iscrowd": 0, "area": IGNORED_AREA} if a.get("ignore") else a for a in annotations]
        truth = {**self.ground_truth, "annotations": annotations}
        truth["images"] = [image for image in truth["images"] if image["id"] in self.predictions]
        # Either bbox or segmentation: with a bbox present, pycocotools takes a mask's area from its box.
        other = {"box": "segmentation", "mask": "bbox"}[iou_type]
        results = [
            {key: value for key, value in result.items() if key != other}
            for result in chain.from_iterable(self.predictions.values())
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            coco_gt = COCO(truth)
            # faster-coco-eval 1.6.7 fails on an empty list.
            coco_dt = coco_gt.loadRes(results) if results else COCO({**truth, "annotations": []})
            evaluation = COCOeval_faster(coco_gt, coco_dt, COCO_IOU_TYPES[iou_type], print_function=lambda *_: None)
            evaluation.params.catIds = self.category_ids
            evaluation.params.imgIds = sorted(self.predictions)
            evaluation.params.maxDets = max_dets = self._max_dets()
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        precision = evaluation.eval["precision"][:, :, :, 0, -1]  # IoU, recall, class; all areas, largest maxDets
        precision50 = precision[0].T  # class, recall
        names_by_id = unique_category_names(truth["categories"])
        names = [names_by_id[i] for i in self.category_ids]
        self.curves[iou_type] = PrecisionRecall(names, precision50, [_or_none(row.mean()) for row in precision50])
        return {
            **{name: _or_none(evaluation.stats[index]) for name, index in SUMMARY.items()},
            "AR100": _or_none(evaluation.stats[FIRST_AR + max_dets.index(100)]),
            "per_class": {name: _or_none(precision[:, :, k].mean()) for k, name in enumerate(names)},
        }

    def _max_dets(self) -> list[int]:
        """Return COCO's maxDets, the largest raised to the most detections in an image."""
        most = max(map(len, self.predictions.values()), default=0)
        return MAX_DETS if most <= MAX_DETS[-1] else [MAX_DETS[0], MAX_DETS[-1], most]


def unique_category_names(categories: Sequence[Results]) -> dict[int, str]:
    """Return category names by id; names that occur more than once are followed by the id."""
    counts = Counter(category["name"] for category in categories)
    return {c["id"]: c["name"] if counts[c["name"]] == 1 else f"{c['name']} (id {c['id']})" for c in categories}


@register("coco", target_type="boxes")
def coco(dataset: DetectionDataset, target_types: Sequence[str]) -> AveragePrecision:
    """Build COCO's average precision of boxes and, if predicted, masks."""
    iou_types = [key for target_type, key in RESULT_KEYS.items() if target_type in target_types]
    return AveragePrecision(dataset.ground_truth(target_types), dataset.category_ids, iou_types)


def _or_none(value: float) -> float | None:
    """Return None for COCO's -1, "undefined"."""
    return None if value == -1 else float(value)
