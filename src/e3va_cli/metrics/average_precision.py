"""Average precision of boxes and masks by COCO's definition.

Definition: https://cocodataset.org/#detection-eval, as pycocotools computes it; the computation here is
faster-coco-eval's, which gives the same numbers in less time.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pycocotools.mask as rle
from faster_coco_eval import COCO, COCOeval_faster

from e3va_cli.data import DetectionDataset, Target
from e3va_cli.heads import Detections
from e3va_cli.metrics.coco_results import write_detections
from e3va_cli.metrics.curves import Curves, draw_curves
from e3va_cli.metrics.evaluator import Results, register
from e3va_cli.run_folder import CURVES, DETECTIONS

KINDS = {"boxes": "box", "masks": "mask"}  # what is found, and what its results are called
IOU_TYPES = {"box": "bbox", "mask": "segm"}
SUMMARY = {"AP": 0, "AP50": 1, "AP75": 2, "AP_small": 3, "AP_medium": 4, "AP_large": 5, "AR100": 8}
LOGGED = ("AP", "AP50")


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
        self.monitor = f"{self.kinds[-1]}_AP"
        self.found: dict[int, list[Results]] = {}
        self.curves: dict[str, Curves] = {}  # of the last measurement, at IoU 0.5

    @property
    def images(self) -> int:
        """Images that findings were given for."""
        return len(self.found)

    def reset(self) -> None:
        """Forget all findings."""
        self.found, self.curves = {}, {}

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
            for result, mask in zip(results, detections.full_masks(), strict=True):
                result["segmentation"] = rle.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        self.found[image_id] = results

    def share(self) -> dict[int, list[Results]]:
        """The findings, by image."""
        return self.found

    def gather(self, shares: Sequence[dict[int, list[Results]]]) -> None:
        """Take the findings of all processes."""
        self.found = {image: found for share in shares for image, found in share.items()}

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
        write_detections((result for results in self.found.values() for result in results), folder / DETECTIONS)
        draw_curves(self.curves, folder / CURVES)
        return {DETECTIONS: "all findings, in COCO's results format", CURVES: "precision and recall at IoU 0.5"}

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
        names = distinct_names(truth["categories"])
        if not findings:
            self.curves.pop(kind, None)
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
        at_half = precision[0].T  # class, recall
        self.curves[kind] = Curves(
            [names[i] for i in self.category_ids], at_half, [_or_none(of_class.mean()) for of_class in at_half]
        )
        return {
            **{name: _or_none(evaluation.stats[index]) for name, index in SUMMARY.items()},
            "per_class": {
                names[i]: _or_none(precision[:, :, k][precision[:, :, k] > -1].mean())
                if (precision[:, :, k] > -1).any()
                else None
                for k, i in enumerate(self.category_ids)
            },
        }


def distinct_names(categories: Sequence[Results]) -> dict[int, str]:
    """The name of each category by its id; of those with the same name, followed by the id."""
    times = Counter(category["name"] for category in categories)
    return {c["id"]: c["name"] if times[c["name"]] == 1 else f"{c['name']} (id {c['id']})" for c in categories}


@register("coco", needs="boxes")
def coco(dataset: DetectionDataset, kinds: Sequence[str]) -> AveragePrecision:
    """COCO's average precision of what a head finds."""
    return AveragePrecision(dataset.ground_truth(), dataset.category_ids, [KINDS[k] for k in KINDS if k in kinds])


def _or_none(value: float) -> float | None:
    """COCO's -1 for "nothing to measure" as None."""
    return None if value == -1 else float(value)
