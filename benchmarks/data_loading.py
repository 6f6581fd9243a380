"""Measure the training loader's images per second for several numbers of workers, compared with the training step.

    python benchmarks/data_loading.py [--workers 0,1,2,4] [--images 200] [--steps 3] [--threads N] [--output FILE.json]
                                      [KEY=VALUE ...]
    python benchmarks/data_loading.py dataset=coco dataset.root=DATA backbone=swin_t

Overrides are those of `e3va train`; by default images are generated. Each loader runs a warm-up pass, then a timed one,
with files in the page cache. The step uses the same configuration, batches from the loader, random weights, and a GPU
if there is one. Loading and steps are timed separately; in training they overlap if there are workers, and share the
cores of a CPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, cast

import common
import torch
from torch.utils.data import Subset

from e3va_cli.config.compatibility import check_compatibility, check_targets
from e3va_cli.config.run_config import RunConfig, to_dict
from e3va_cli.data import Batch, DenseDataModule, DenseDataset, build_datasets
from e3va_cli.memory.rois import add_matching_proposals
from e3va_cli.memory.step import StepSize, train_step
from e3va_cli.models.model import build_random_model
from e3va_cli.optim.optimizer import build_optimizer
from e3va_cli.utils.environment import synchronize


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = common.parser(__doc__)
    parser.add_argument("--workers", type=common.int_list, default=[0, 1, 2, 4], help="loader processes")
    parser.add_argument("--images", type=common.positive, default=200, help="maximum number of training images")
    parser.add_argument("--steps", type=common.positive, default=3, help="timed steps, after a warm-up step")
    parser.add_argument("--threads", type=common.positive, default=torch.get_num_threads(), help="of the step on a CPU")
    return parser


def time_loader(config: RunConfig, train: DenseDataset, val: DenseDataset, workers: int) -> tuple[float, int]:
    """Return the seconds of the second pass over `train`, and its number of images."""
    data = DenseDataModule(train, val, replace(config.data, num_workers=workers), seed=config.seed)
    loader = data.train_dataloader()
    for epoch in range(2):
        cast("Any", loader.sampler).set_epoch(epoch)
        started = time.perf_counter()
        images = sum(len(batch) for batch in loader)
    return time.perf_counter() - started, images


def load_batches(config: RunConfig, train: DenseDataset, val: DenseDataset, count: int) -> list[Batch]:
    """Return the first `count` training batches, or all if there are fewer."""
    data = DenseDataModule(train, val, replace(config.data, num_workers=0), seed=config.seed)
    return list(islice(data.train_dataloader(), count))


def time_step(config: RunConfig, batches: Sequence[Batch], *, classes: int, steps: int, device: str) -> float:
    """Return the median seconds of a training step on the batches in turn, transfer to the device excluded."""
    torch.manual_seed(config.seed)
    model = build_random_model(config, num_classes=classes).to(device).train()
    optimizer = build_optimizer(model, config.optimizer)
    options = config.trainer
    size = StepSize(len(batches[0]), (0, 0), 0, options.precision, options.gradient_clip_norm)
    times = []
    with add_matching_proposals(model):
        for step in range(steps + 1):
            batch = batches[step % len(batches)].to(device)
            synchronize(torch.device(device))
            started = time.perf_counter()
            train_step(model, optimizer, batch, size, device=device)
            synchronize(torch.device(device))
            times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def sufficient_workers(ratios: dict[int, float]) -> int | None:
    """Return the smallest number of workers, at least one, as fast as the step; None if there is none."""
    return next((workers for workers in sorted(ratios) if workers and ratios[workers] <= 1), None)


def verdict(ratios: dict[int, float]) -> str:
    """Return a sentence on whether the loader is the bottleneck."""
    if (workers := sufficient_workers(ratios)) is not None:
        return f"The loader keeps up with the step from {workers} worker{'s' if workers > 1 else ''} on."
    return "The loader is the bottleneck at every number of workers."


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    args = parser().parse_intermixed_args(arguments)
    config = common.compose("train", args.overrides)
    check_compatibility(config)
    train, val = build_datasets(config.dataset)
    check_targets(config, val.target_types)
    part = cast("DenseDataset", Subset(cast("Any", train), range(min(args.images, len(cast("Any", train))))))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(args.threads)
    passes = {workers: time_loader(config, part, val, workers) for workers in args.workers}  # before CUDA: workers fork
    step_batches = load_batches(config, part, val, args.steps + 1)
    step = time_step(config, step_batches, classes=len(val.classes), steps=args.steps, device=device)
    per_batch = {n: seconds / images * len(step_batches[0]) for n, (seconds, images) in passes.items()}
    ratios = {n: seconds / step for n, seconds in per_batch.items()}
    about = common.about(device)
    common.console.print(
        f"Measured: {config.dataset.name}, {len(part)} images, batches of {len(step_batches[0])}, "
        f"{config.backbone.name} with {config.head.name}, precision {config.trainer.precision}, "
        f"torch {torch.__version__}, {about['device']}; step {step:.3f} s, the median of {args.steps}\n"
    )
    rows = [
        [str(n), f"{images / seconds:.1f}", f"{per_batch[n]:.4f}", f"{ratios[n]:.4f}"]
        for n, (seconds, images) in passes.items()
    ]
    common.show(["workers", "images/s", "s per batch", "fraction of a step"], rows)
    common.console.print(f"{verdict(ratios)} Without workers, loading time is added to each step.")
    values = {
        "source": "measured",
        "step_time_s": step,
        "images_per_second": {n: images / seconds for n, (seconds, images) in passes.items()},
        "of_a_step": ratios,
        "enough_workers": sufficient_workers(ratios),
        "config": to_dict(config),
    }
    common.write(args.output, device, values)
    return 0


if __name__ == "__main__":
    sys.exit(common.exit_code(main))
