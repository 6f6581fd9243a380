"""Average precision of boxes and masks by COCO's definition.

Definition: https://cocodataset.org/#detection-eval, as pycocotools computes it; the computation here is
faster-coco-eval's, which gives the same numbers in less time.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pycocotools.mask as rle
from faster_coco_eval import COCO, COCOeval_faster

from e3va_cli.heads import Detections

IOU_TYPES = {"box": "bbox", "mask": "segm"}
SUMMARY = {"AP": 0, "AP50": 1, "AP75": 2, "AP_small": 3, "AP_medium": 4, "AP_large": 5, "AR100": 8}

Results = dict[str, Any]


class AveragePrecision:
    """Collects findings image by image and measures them against a COCO-format ground truth.

    Only images that were given count, so that a part of a data set can be measured. Masks are encoded as they come:
    memory grows with the number of objects, not with image sizes.

    Args:
        ground_truth: `images`, `annotations` and `categories` in COCO's format.
        category_ids: the ground truth's id of label k at index k - 1.
        kinds: which of box and mask to measure.
    """

    def __init__(self, ground_truth: Results, category_ids: Sequence[int], kinds: Sequence[str]) -> None:
        self.ground_truth = ground_truth
        self.category_ids = list(category_ids)
        self.kinds = list(kinds)
        self.found: dict[int, list[Results]] = {}

    def reset(self) -> None:
        """Forget all findings."""
        self.found = {}

    def update(self, image_id: int, detections: Detections) -> None:
        """Add what was found in one image, in pixels of the original image."""
        detections = detections.cpu()
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
            for result, mask in zip(results, detections.full_masks(), strict=True):
                result["segmentation"] = rle.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        self.found[image_id] = results

    def compute(self) -> Results:
        """`{"box": {"AP": .., "AP50": .., ..., "per_class": {name: AP}}, "mask": {...}}`; None where nothing counts."""
        return {kind: self._measure(kind) for kind in self.kinds}

    def _measure(self, kind: str) -> Results:
        annotations = self.ground_truth["annotations"]
        if kind == "mask":
            annotations = [a for a in annotations if a.get("segmentation")]
        truth = {**self.ground_truth, "annotations": annotations}
        truth["images"] = [image for image in truth["images"] if image["id"] in self.found]
        # bbox and segmentation apart: with a bbox present, masks would be sorted into sizes by the area of their box.
        left_out = {"box": "segmentation", "mask": "bbox"}[kind]
        findings = [
            {key: value for key, value in result.items() if key != left_out}
            for results in self.found.values()
            for result in results
        ]
        names = {c["id"]: c["name"] for c in truth["categories"]}
        if not findings:
            zeros = dict.fromkeys(SUMMARY, 0.0 if annotations else None)
            return {**zeros, "per_class": {names[i]: zeros["AP"] for i in self.category_ids}}
        with contextlib.redirect_stdout(io.StringIO()):
            reference = COCO(truth)
            evaluation = COCOeval_faster(
                reference, reference.loadRes(findings), IOU_TYPES[kind], print_function=lambda *_: None
            )
            evaluation.params.catIds = self.category_ids
            evaluation.params.imgIds = sorted(self.found)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        precision = evaluation.eval["precision"][:, :, :, 0, -1]  # IoU, recall, class; all sizes, 100 findings
        return {
            **{name: _or_none(evaluation.stats[index]) for name, index in SUMMARY.items()},
            "per_class": {
                names[i]: _or_none(precision[:, :, k][precision[:, :, k] > -1].mean())
                if (precision[:, :, k] > -1).any()
                else None
                for k, i in enumerate(self.category_ids)
            },
        }


def _or_none(value: float) -> float | None:
    """COCO's -1 for "nothing to measure" as None."""
    return None if value == -1 else float(value)
