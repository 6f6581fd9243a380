"""Average precision of boxes and masks by COCO's definition.

Definition: https://cocodataset.org/#detection-eval, as pycocotools computes it; the computation here is
faster-coco-eval's, which gives the same numbers in less time.
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
from e3va_cli.visualization.precision_recall import Curves

KINDS = {"boxes": "box", "masks": "mask"}  # what is found, and what its results are called
IOU_TYPES = {"box": "bbox", "mask": "segm"}
SUMMARY = {"AP": 0, "AP50": 1, "AP75": 2, "AP_small": 3, "AP_medium": 4, "AP_large": 5, "AR100": 8}
FIRST_AR = 6  # of the summary: AR at each of three numbers of detections
COUNTED = [1, 10, 100]  # detections of a class in an image, by COCO's definition
LOGGED = ("AP", "AP50")
BEYOND = 1e11  # pixels; pycocotools ignores single objects that are larger than its largest area, 1e10


class AveragePrecision(PredictionStore[list[Results]]):
    """Collects findings image by image and measures them against a COCO-format ground truth.

    Masks are encoded as they come: memory grows with the number of objects, not with image sizes. COCO counts 100
    detections of a class in an image; where a head gives more, all of them count.

    Args:
        ground_truth: `images`, `annotations` and `categories` in COCO's format; those with `ignore` are single objects
            that count as neither hit nor miss, which pycocotools knows of crowds alone.
        category_ids: the ground truth's id of label k at index k - 1.
        kinds: which of box and mask to measure.
    """

    def __init__(self, ground_truth: Results, category_ids: Sequence[int], kinds: Sequence[str]) -> None:
        super().__init__()
        self.ground_truth = ground_truth
        self.category_ids = list(category_ids)
        self.kinds = list(kinds)
        self.monitor = f"{self.kinds[-1]}_AP"
        self.curves: dict[str, Curves] = {}  # of the last measurement, at IoU 0.5

    def update(self, found: Detections, target: Target) -> None:
        """Add what was found in one image."""
        image_id = target["image_id"]
        detections = found.cpu().rescaled(target["original_size"])
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
        if "mask" in self.kinds:
            for result, mask in zip(results, detections.paste_masks(), strict=True):
                result["segmentation"] = rle.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        self.found[image_id] = results

    def scores(self, results: Results) -> dict[str, float]:
        """AP and AP50 of boxes and masks."""
        return {
            f"{kind}_{name}": values[name]
            for kind, values in results.items()
            for name in LOGGED
            if values[name] is not None
        }

    def compute(self) -> Results:
        """`{"box": {"AP": .., "AP50": .., ..., "per_class": {name: AP}}, "mask": {...}}`; None where nothing counts."""
        return {kind: self._measure(kind) for kind in self.kinds}

    def leave(self, folder: Path) -> dict[str, str]:
        """All findings in COCO's results format, and precision-recall curves."""
        return save_predictions(chain.from_iterable(self.found.values()), self.curves, folder)

    def _measure(self, kind: str) -> Results:
        annotations = [a for a in self.ground_truth["annotations"] if a["image_id"] in self.found]
        if kind == "mask":
            annotations = [a for a in annotations if a.get("segmentation")]
        annotations = [{**a, "iscrowd": 0, "area": BEYOND} if a.get("ignore") else a for a in annotations]
        truth = {**self.ground_truth, "annotations": annotations}
        truth["images"] = [image for image in truth["images"] if image["id"] in self.found]
        # bbox and segmentation apart: with a bbox present, masks would be sorted into sizes by the area of their box.
        left_out = {"box": "segmentation", "mask": "bbox"}[kind]
        findings = [
            {key: value for key, value in result.items() if key != left_out}
            for result in chain.from_iterable(self.found.values())
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            reference = COCO(truth)
            # Not every release loads an empty list: 1.6.7 does not.
            found = reference.loadRes(findings) if findings else COCO({**truth, "annotations": []})
            evaluation = COCOeval_faster(reference, found, IOU_TYPES[kind], print_function=lambda *_: None)
            evaluation.params.catIds = self.category_ids
            evaluation.params.imgIds = sorted(self.found)
            evaluation.params.maxDets = counted = self._counted()
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        precision = evaluation.eval["precision"][:, :, :, 0, -1]  # IoU, recall, class; all sizes, all findings
        at_half = precision[0].T  # class, recall
        of_id = distinct_names(truth["categories"])
        names = [of_id[i] for i in self.category_ids]
        self.curves[kind] = Curves(names, at_half, [_or_none(of_class.mean()) for of_class in at_half])
        return {
            **{name: _or_none(evaluation.stats[index]) for name, index in SUMMARY.items()},
            "AR100": _or_none(evaluation.stats[FIRST_AR + counted.index(100)]),
            "per_class": {name: _or_none(precision[:, :, k].mean()) for k, name in enumerate(names)},
        }

    def _counted(self) -> list[int]:
        """How many detections of an image count: COCO's numbers, or the last one as many as there are."""
        most = max(map(len, self.found.values()), default=0)
        return COUNTED if most <= COUNTED[-1] else [COUNTED[0], COUNTED[-1], most]


def distinct_names(categories: Sequence[Results]) -> dict[int, str]:
    """The name of each category by its id; of those with the same name, followed by the id."""
    times = Counter(category["name"] for category in categories)
    return {c["id"]: c["name"] if times[c["name"]] == 1 else f"{c['name']} (id {c['id']})" for c in categories}


@register("coco", needs="boxes")
def coco(dataset: DetectionDataset, kinds: Sequence[str]) -> AveragePrecision:
    """COCO's average precision of what a head finds."""
    return AveragePrecision(dataset.ground_truth(kinds), dataset.category_ids, [KINDS[k] for k in KINDS if k in kinds])


def _or_none(value: float) -> float | None:
    """COCO's -1 for "nothing to measure" as None."""
    return None if value == -1 else float(value)
