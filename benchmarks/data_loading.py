"""Print images per second of the training loader at several numbers of workers, against the step that they feed.

    python benchmarks/data_loading.py [--workers 0,1,2,4] [--images 200] [--steps 3] [--threads N] [--output FILE.json]
                                      [KEY=VALUE ...]
    python benchmarks/data_loading.py dataset=coco dataset.root=DATA backbone=swin_t

Options are those of `e3va train`; without any, images are generated. Each loader makes a pass that is not timed, then
one that is: files are then in the operating system's memory, so that a slow disk is not seen. The step is the same
configuration's, on batches from the loader, with random weights, on a GPU if there is one. Loading and stepping are
timed apart; in training they run at the same time where there are workers, and on a CPU share its cores.
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
    parser.add_argument("--images", type=common.positive, default=200, help="of the training split, at most")
    parser.add_argument("--steps", type=common.positive, default=3, help="timed steps, after one that is not")
    parser.add_argument("--threads", type=common.positive, default=torch.get_num_threads(), help="of a step on a CPU")
    return parser


def loading(config: RunConfig, train: DenseDataset, val: DenseDataset, workers: int) -> tuple[float, int]:
    """Seconds of a whole pass over `train`, the second one, and its images."""
    data = DenseDataModule(train, val, replace(config.data, num_workers=workers), seed=config.seed)
    loader = data.train_dataloader()
    for epoch in range(2):
        cast("Any", loader.sampler).set_epoch(epoch)
        started = time.perf_counter()
        images = sum(len(batch) for batch in loader)
    return time.perf_counter() - started, images


def batches(config: RunConfig, train: DenseDataset, val: DenseDataset, count: int) -> list[Batch]:
    """The first so many training batches, or all if there are fewer."""
    data = DenseDataModule(train, val, replace(config.data, num_workers=0), seed=config.seed)
    return list(islice(data.train_dataloader(), count))


def step_s(config: RunConfig, args: Sequence[Batch], *, classes: int, steps: int, device: str) -> float:
    """Median seconds of a training step on the `args` batches in turn, which are on the device when it begins."""
    torch.manual_seed(config.seed)
    model = build_random_model(config, num_classes=classes).to(device).train()
    optimizer = build_optimizer(model, config.optimizer)
    options = config.trainer
    size = StepSize(len(args[0]), (0, 0), 0, options.precision, options.gradient_clip_norm)
    times = []
    with add_matching_proposals(model):
        for step in range(steps + 1):
            batch = args[step % len(args)].to(device)
            synchronize(torch.device(device))
            started = time.perf_counter()
            train_step(model, optimizer, batch, size, device=device)
            synchronize(torch.device(device))
            times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def enough(ratios: dict[int, float]) -> int | None:
    """The fewest workers, at least one, whose loading takes no longer than the step; None if none are enough."""
    return next((workers for workers in sorted(ratios) if workers and ratios[workers] <= 1), None)


def verdict(ratios: dict[int, float]) -> str:
    """From how many workers on the loader is no bottleneck, in words."""
    if (workers := enough(ratios)) is not None:
        return f"The loader is no bottleneck from {workers} worker{'s' if workers > 1 else ''} on."
    return "The loader is the bottleneck at every number of workers tried."


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
    passes = {workers: loading(config, part, val, workers) for workers in args.workers}  # before CUDA: workers fork
    of_step = batches(config, part, val, args.steps + 1)
    step = step_s(config, of_step, classes=len(val.classes), steps=args.steps, device=device)
    per_batch = {n: seconds / images * len(of_step[0]) for n, (seconds, images) in passes.items()}
    ratios = {n: seconds / step for n, seconds in per_batch.items()}
    about = common.about(device)
    common.console.print(
        f"Measured: {config.dataset.name}, {len(part)} images, batches of {len(of_step[0])}, "
        f"{config.backbone.name} with {config.head.name}, precision {config.trainer.precision}, "
        f"torch {torch.__version__}, {about['device']}; step {step:.3f} s, the median of {args.steps}\n"
    )
    rows = [
        [str(n), f"{images / seconds:.1f}", f"{per_batch[n]:.4f}", f"{ratios[n]:.4f}"]
        for n, (seconds, images) in passes.items()
    ]
    common.show(["workers", "images/s", "s per batch", "of a step"], rows)
    common.console.print(f"{verdict(ratios)} Without workers, loading adds to each step.")
    figures = {
        "source": "measured",
        "step_time_s": step,
        "images_per_second": {n: images / seconds for n, (seconds, images) in passes.items()},
        "of_a_step": ratios,
        "enough_workers": enough(ratios),
        "config": to_dict(config),
    }
    common.write(args.output, device, figures)
    return 0


if __name__ == "__main__":
    sys.exit(common.exit_code(main))
