"""Print the time of a training step of several methods, taking turns in one process, as ratios.

    python benchmarks/step_time.py [--experiment coco_cascade_swin_b] [--size 512x512] [--batch-size 1] [--repeats 5]
                                   [--ways full,frozen,e3va,e3va:activations=compress] [--output FILE.json]
                                   [KEY=VALUE ...]

`e3va benchmark-memory measure=true` runs each method in a process of its own, as memory wants it; on a machine that is
sometimes busy, steps that take turns compare better. Beside each ratio stands that of the operations (matrix products
and convolutions, counted, not measured): what arithmetic alone would let a method save. Weights and images are random.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import common
import torch
from torch.optim import Optimizer

from e3va_cli.data.batch import Batch
from e3va_cli.machine import MIB, device_name, synchronise
from e3va_cli.memory.planner import plan
from e3va_cli.memory.regions import matching_proposals
from e3va_cli.memory.step import StepSize, make_batch, train_step
from e3va_cli.model import DenseModel, build_random_model
from e3va_cli.training.optimizer import build_optimizer

WAYS = "full,frozen,e3va,e3va:activations=compress,e3va:activations=recompute"


@dataclass
class Way:
    """A method, ready to train: its network, optimizer and batch, and what its step was planned to take."""

    name: str
    model: DenseModel
    optimizer: Optimizer
    batch: Batch
    planned_mib: float
    operations: int


def height_and_width(text: str) -> tuple[int, int]:
    """Pixels such as `512x512`.

    Raises:
        ValueError: anything else.
    """
    height, width = map(common.positive, text.split("x"))
    return height, width


def parser() -> argparse.ArgumentParser:
    """The words of the command line."""
    parser = common.parser(__doc__)
    parser.add_argument("--experiment", default="coco_cascade_swin_b", help="as in conf/experiment/")
    parser.add_argument("--size", type=height_and_width, default=(512, 512), help="such as 512x512: height, width")
    parser.add_argument("--batch-size", type=common.positive, default=1)
    parser.add_argument("--ways", default=WAYS, help="methods, each with options after colons, of `adapter.` or whole")
    parser.add_argument("--repeats", type=common.positive, default=5, help="timed steps of each, after one that is not")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=common.positive, default=torch.get_num_threads(), help="on a CPU")
    return parser


def prepare(way: str, given: argparse.Namespace) -> tuple[Way, StepSize]:
    """A way by its words, such as `e3va:activations=compress`.

    Raises:
        UserError: words that `e3va benchmark-memory` does not take.
    """
    method, *own = way.split(":")
    words = [f"experiment={given.experiment}", *given.words, f"adapter={method}"]
    words += [word if "." in word.partition("=")[0] else f"adapter.{word}" for word in own]
    config = common.composed("benchmark_memory", words, complete=False)
    size = StepSize(
        given.batch_size, given.size, config["instances_per_image"], config["trainer"]["precision"], clip_norm=1.0
    )
    classes = config["dataset"]["num_classes"]
    of_plan = plan(config, size, num_classes=classes, semantics="cuda" if given.device == "cuda" else "cpu")
    torch.manual_seed(0)
    model = build_random_model(config, num_classes=classes).to(given.device).train()
    batch = make_batch(size, num_classes=classes, needs=model.head.needs, device=given.device)
    optimizer = build_optimizer(model, **config["optimizer"])
    return Way(way, model, optimizer, batch, of_plan.peak.total_bytes / MIB, of_plan.operations), size


def step_s(way: Way, size: StepSize, device: str) -> float:
    """Seconds of one step."""
    with matching_proposals(way.model):
        started = time.perf_counter()
        train_step(way.model, way.optimizer, way.batch, size, device=device)
        synchronise(torch.device(device))
        return time.perf_counter() - started


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third; of a single value, that value twice."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table."""
    given = parser().parse_intermixed_args(arguments)
    torch.set_num_threads(given.threads)
    ways = []
    for name in given.ways.split(","):
        way, size = prepare(name, given)
        ways.append(way)
    times: dict[str, list[float]] = {way.name: [] for way in ways}
    for repeat in range(given.repeats + 1):
        for way in ways:
            seconds = step_s(way, size, given.device)
            if repeat:
                times[way.name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    height, width = given.size
    common.console.print(
        f"{' '.join([given.experiment, *given.words])}, batch {given.batch_size} of {height}x{width}, precision "
        f"{size.precision}, torch {torch.__version__}, {device_name(torch.device(given.device))}; "
        f"medians of {given.repeats}, in turns\n"
    )
    references = [way for way in ways if way.name in ("full", "frozen")]
    columns = ["way", "step, s", "quartiles, s"]
    for reference in references:
        columns += [f"of {reference.name}", f"operations, of {reference.name}"]
    rows = []
    for way in ways:
        first, third = quartiles(times[way.name])
        row = [way.name, f"{medians[way.name]:.2f}", f"{first:.2f} to {third:.2f}"]
        for reference in references:
            ratio = medians[way.name] / medians[reference.name]
            row += [f"{ratio:.3f}", f"{way.operations / reference.operations:.3f}"]
        rows.append([*row, f"{way.planned_mib:,.0f}"])
    common.show([*columns, "planned MiB"], rows)
    figures = {
        way.name: {"step_times_s": times[way.name], "operations": way.operations, "planned_mib": way.planned_mib}
        for way in ways
    }
    common.write(given.output, given.device, {"source": "measured; operations and MiB planned", "ways": figures})
    return 0


if __name__ == "__main__":
    sys.exit(common.exit_code(main))
