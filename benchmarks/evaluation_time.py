"""Print the time of our evaluation of boxes and masks against pycocotools alone, on the same findings.

    python benchmarks/evaluation_time.py [--images 500] [--found 100] [--repeats 3] [--output FILE.json] [KEY=VALUE ...]
    python benchmarks/evaluation_time.py dataset=coco dataset.root=DATA

Options are those of `e3va train`; without any, images are generated. Findings are made up from the annotations of the
validation split with noise; a split with fewer images is repeated. Both ways start from annotations and findings in
memory, take turns, and times are medians. Exit code 1 if the two do not agree.
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
from e3va_cli.evaluation import AveragePrecision, Results
from e3va_cli.evaluation.average_precision import COCO_IOU_TYPES, RESULT_KEYS, SUMMARY
from e3va_cli.models.heads import Detections

MASK_SIDE = 28  # of a mask head's output
TOLERANCE = 1e-5  # between the two ways' results


def parser() -> argparse.ArgumentParser:
    """The words of the command line."""
    parser = common.parser(__doc__)
    parser.add_argument("--images", type=common.positive, default=500)
    parser.add_argument("--found", type=common.positive, default=100, help="objects in each image")
    parser.add_argument("--repeats", type=common.positive, default=3, help="timed runs of each way")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    return parser


def made_up(target: Target, count: int, classes: int, generator: torch.Generator) -> Detections:
    """`count` findings in one image: annotated objects, moved, with scores that follow how little; a tenth mislabelled.

    Moves are normal with a deviation of up to a third of the box's sides. None in an image without objects.
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
    """The annotations of the same images several times over, under new ids: those of copy k are k spans higher."""
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
    """More than lies between any two ids."""
    return 1 + max((entry["id"] for entry in entries), default=0)


def collect(dataset: DetectionDataset, given: argparse.Namespace) -> AveragePrecision:
    """Our evaluation, with findings for as many images as asked for."""
    once = dataset.ground_truth()
    truth = repeated(once, -(-given.images // len(dataset)))
    iou_types = [key for target_type, key in RESULT_KEYS.items() if target_type in dataset.target_types]
    evaluator = AveragePrecision(truth, dataset.category_ids, iou_types)
    generator = torch.Generator().manual_seed(given.seed)
    for number in range(given.images):
        copy, index = divmod(number, len(dataset))
        target = dict(dataset[index][1])
        target["image_id"] += copy * span_of(once["images"])
        evaluator.update(made_up(target, given.found, len(dataset.classes), generator), target)
    return evaluator


def plain_inputs(evaluator: AveragePrecision, kind: str) -> tuple[Results, list[Results]]:
    """Ground truth and findings as pycocotools takes them; copies, as it writes into them."""
    truth, other = evaluator.ground_truth, {"box": "segmentation", "mask": "bbox"}[kind]
    annotations = [dict(a) for a in truth["annotations"] if kind == "box" or a.get("segmentation")]
    images = [image for image in truth["images"] if image["id"] in evaluator.predictions]
    findings = [{k: v for k, v in f.items() if k != other} for fs in evaluator.predictions.values() for f in fs]
    return {**truth, "annotations": annotations, "images": images}, findings


def reference(truth: Results, findings: list[Results], evaluator: AveragePrecision, kind: str) -> list[float]:
    """pycocotools' own numbers, in the order of its summary."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(findings), COCO_IOU_TYPES[kind])
        evaluation.params.catIds = evaluator.category_ids
        evaluation.params.imgIds = sorted(evaluator.predictions)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def difference(ours: Results, theirs: Sequence[float]) -> float:
    """The largest between the two ways' numbers; pycocotools' -1 is our None."""
    pairs = ((ours[name], theirs[index]) for name, index in SUMMARY.items())
    return max(abs((-1.0 if value is None else value) - other) for value, other in pairs)


def compared(evaluator: AveragePrecision, repeats: int) -> Iterator[dict[str, Any]]:
    """For box and mask: median seconds of both ways, taking turns, their AP, and how far they differ at most."""
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
        apart = difference(result, theirs)
        yield {"kind": kind, **medians, "ap": result["AP"], "pycocotools_ap": theirs[0], "difference": apart}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table."""
    given = parser().parse_intermixed_args(arguments)
    source = common.composed("train", given.words).dataset
    dataset = cast("DetectionDataset", source.open("val"))
    if "boxes" not in dataset.target_types:
        raise UserError(f"dataset={source.name}: has no boxes to measure; use dataset=coco, voc or shapes")
    started = time.perf_counter()
    evaluator = collect(dataset, given)
    collecting = time.perf_counter() - started
    about = common.about("cpu")
    common.console.print(
        f"Measured: {source.name}, {given.images} images of {len(dataset)} different ones, "
        f"{sum(len(f) for f in evaluator.predictions.values()):,} findings, {len(dataset.classes)} classes, "
        f"{about['device']}; medians of {given.repeats}, in turns\n"
    )
    results = list(compared(evaluator, given.repeats))
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
    columns = ["kind", "ours, s", "pycocotools, s", "ours, of it", "AP, %", "its AP, %", "largest difference"]
    common.show(columns, rows)
    common.console.print(
        f"Making up and collecting findings, masks pasted and encoded, took {collecting:.1f} s before."
    )
    common.write(given.output, "cpu", {"source": "measured", "collecting_s": collecting, "results": results})
    return 0 if all(r["difference"] <= TOLERANCE for r in results) else 1


if __name__ == "__main__":
    sys.exit(common.exit_code(main))
