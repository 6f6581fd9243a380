"""Compare the time of our evaluation of boxes and masks with pycocotools, on the same detections.

    python benchmarks/evaluation_time.py [--images 500] [--detections 100] [--repeats 3] [--output FILE.json]
                                         [KEY=VALUE ...]
    python benchmarks/evaluation_time.py dataset=coco dataset.root=DATA

Overrides are those of `e3va train`; by default images are generated. Detections are ground truth of the validation
split with noise; a split with fewer images is repeated. Both evaluations start from annotations and detections in
memory and run in turns; times are medians. Exit code 1 if the results differ.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import common
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.ops import clip_boxes_to_image, roi_align

from e3va_cli.data import DetectionDataset, Target
from e3va_cli.errors import UserError
from e3va_cli.evaluation import Results
from e3va_cli.evaluation.average_precision import COCO_IOU_TYPES, RESULT_KEYS, SUMMARY, AveragePrecision
from e3va_cli.models.heads import Detections

MASK_SIDE = 28  # of a mask head's output
TOLERANCE = 1e-5  # of the results


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = common.parser(__doc__)
    parser.add_argument("--images", type=common.positive, default=500)
    parser.add_argument("--detections", type=common.positive, default=100, help="per image")
    parser.add_argument("--repeats", type=common.positive, default=3, help="timed runs of each")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    return parser


def random_detections(target: Target, count: int, classes: int, generator: torch.Generator) -> Detections:
    """Return `count` detections of one image: shifted ground truth, higher scores for smaller shifts, 10 % mislabeled.

    Shifts are normal with a deviation of up to a third of the box's sides. Images without objects get no detections.
    """
    size: tuple[int, int] = target["original_size"]
    boxes, labels = target["boxes"].as_subclass(Tensor).float(), target["labels"]
    count = count if len(boxes) else 0
    chosen = torch.randint(max(1, len(boxes)), (count,), generator=generator)
    scores = torch.rand(count, generator=generator).sort(descending=True).values
    strength = (1 - scores + 0.3 * torch.rand(count, generator=generator)) / 1.3
    boxes = boxes[chosen]
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    moved = boxes + strength[:, None] / 3 * sides * torch.randn(count, 4, generator=generator)
    moved = moved.view(-1, 2, 2).sort(dim=1).values.flatten(1)  # upper left corner first
    moved = clip_boxes_to_image(moved, size)
    wrong = torch.rand(count, generator=generator) < 0.1
    random = torch.randint(1, classes + 1, (count,), generator=generator)
    masks = None
    if "masks" in target:
        regions = torch.cat((chosen[:, None].float(), moved), 1)
        masks = roi_align(target["masks"].as_subclass(Tensor)[:, None].float(), regions, MASK_SIDE)
    return Detections(moved, scores, torch.where(wrong, random, labels[chosen]), masks, size)


def repeated(truth: Results, times: int) -> Results:
    """Repeat the images and annotations under new ids; those of copy k are k spans higher."""
    image_span, span = span_of(truth["images"]), span_of(truth["annotations"])
    return {
        **truth,
        "images": [{**i, "id": i["id"] + k * image_span} for k in range(times) for i in truth["images"]],
        "annotations": [
            {**a, "id": a["id"] + k * span, "image_id": a["image_id"] + k * image_span}
            for k in range(times)
            for a in truth["annotations"]
        ],
    }


def span_of(entries: Sequence[Results]) -> int:
    """Return a number above all ids."""
    return 1 + max((entry["id"] for entry in entries), default=0)


def collect(dataset: DetectionDataset, args: argparse.Namespace) -> AveragePrecision:
    """Return our evaluator with random detections of `--images` images."""
    once = dataset.ground_truth()
    truth = repeated(once, -(-args.images // len(dataset)))
    iou_types = [key for target_type, key in RESULT_KEYS.items() if target_type in dataset.target_types]
    evaluator = AveragePrecision(truth, dataset.category_ids, iou_types)
    generator = torch.Generator().manual_seed(args.seed)
    for number in range(args.images):
        copy, index = divmod(number, len(dataset))
        target = dict(dataset[index][1])
        target["image_id"] += copy * span_of(once["images"])
        evaluator.update(random_detections(target, args.detections, len(dataset.classes), generator), target)
    return evaluator


def plain_inputs(evaluator: AveragePrecision, kind: str) -> tuple[Results, list[Results]]:
    """Return ground truth and detections for pycocotools; copies, as it writes into them."""
    truth, other = evaluator.ground_truth, {"box": "segmentation", "mask": "bbox"}[kind]
    annotations = [dict(a) for a in truth["annotations"] if kind == "box" or a.get("segmentation")]
    images = [image for image in truth["images"] if image["id"] in evaluator.predictions]
    detections = [{k: v for k, v in f.items() if k != other} for fs in evaluator.predictions.values() for f in fs]
    return {**truth, "annotations": annotations, "images": images}, detections


def reference(truth: Results, detections: list[Results], evaluator: AveragePrecision, kind: str) -> list[float]:
    """Return pycocotools' results, in the order of its summary."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(detections), COCO_IOU_TYPES[kind])
        evaluation.params.catIds = evaluator.category_ids
        evaluation.params.imgIds = sorted(evaluator.predictions)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def difference(ours: Results, theirs: Sequence[float]) -> float:
    """Return the largest difference of the results; pycocotools' -1 is our None."""
    pairs = ((ours[name], theirs[index]) for name, index in SUMMARY.items())
    return max(abs((-1.0 if value is None else value) - other) for value, other in pairs)


def compared(evaluator: AveragePrecision, repeats: int) -> Iterator[dict[str, Any]]:
    """Yield, for box and mask, the median seconds of both evaluations, their AP and the largest difference."""
    for kind in evaluator.iou_types:
        ours = AveragePrecision(evaluator.ground_truth, evaluator.category_ids, [kind])
        ours.merge([evaluator.state()])
        times: dict[str, list[float]] = {"ours_s": [], "pycocotools_s": []}
        for _ in range(repeats):
            inputs = plain_inputs(evaluator, kind)
            started = time.perf_counter()
            result = ours.compute()[kind]
            between = time.perf_counter()
            theirs = reference(*inputs, evaluator, kind)
            times["ours_s"].append(between - started)
            times["pycocotools_s"].append(time.perf_counter() - between)
        medians = {name: statistics.median(values) for name, values in times.items()}
        largest = difference(result, theirs)
        yield {"kind": kind, **medians, "ap": result["AP"], "pycocotools_ap": theirs[0], "difference": largest}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    args = parser().parse_intermixed_args(arguments)
    source = common.compose("train", args.overrides).dataset
    dataset = cast("DetectionDataset", source.open("val"))
    if "boxes" not in dataset.target_types:
        raise UserError(f"dataset={source.name}: has no boxes; use dataset=coco, voc or shapes")
    started = time.perf_counter()
    evaluator = collect(dataset, args)
    collecting = time.perf_counter() - started
    about = common.about("cpu")
    common.console.print(
        f"Measured: {source.name}, {args.images} images of {len(dataset)} different ones, "
        f"{sum(len(f) for f in evaluator.predictions.values()):,} detections, {len(dataset.classes)} classes, "
        f"{about['device']}; medians of {args.repeats}, in turns\n"
    )
    results = list(compared(evaluator, args.repeats))
    rows = [
        [
            r["kind"],
            f"{r['ours_s']:.2f}",
            f"{r['pycocotools_s']:.2f}",
            f"{r['ours_s'] / r['pycocotools_s']:.3f}",
            f"{100 * (r['ap'] or 0):.3f}",
            f"{100 * r['pycocotools_ap']:.3f}",
            f"{r['difference']:.1e}",
        ]
        for r in results
    ]
    columns = [
        "kind",
        "ours, s",
        "pycocotools, s",
        "ours / pycocotools",
        "AP, %",
        "pycocotools AP, %",
        "largest difference",
    ]
    common.show(columns, rows)
    common.console.print(
        f"Generating and collecting detections, with masks pasted and encoded, took {collecting:.1f} s."
    )
    common.write(args.output, "cpu", {"source": "measured", "collecting_s": collecting, "results": results})
    return 0 if all(r["difference"] <= TOLERANCE for r in results) else 1


if __name__ == "__main__":
    sys.exit(common.exit_code(main))
