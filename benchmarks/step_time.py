"""Print the time of a training step of several methods, taking turns in one process, as ratios.

    python benchmarks/step_time.py [--experiment coco_cascade_swin_b] [--size 512x512] [--batch-size 1] [--repeats 5]
                                   [--ways full,frozen,e3va,e3va:activations=compress] [KEY=VALUE ...]

`e3va benchmark-memory measure=true` runs each method in a process of its own, as memory wants it; on a machine that is
sometimes busy, steps that take turns compare better. Beside each ratio stands that of the operations (matrix products
and convolutions, counted, not measured): what arithmetic alone would let a method save. Weights and images are random.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from hydra import compose, initialize_config_module
from torch.optim import Optimizer

from e3va_cli.composition import CONFIG_MODULE, plain
from e3va_cli.config import register_schemas
from e3va_cli.data.batch import Batch
from e3va_cli.machine import MIB, device_name
from e3va_cli.memory.planner import plan
from e3va_cli.memory.regions import matching_proposals
from e3va_cli.memory.step import StepSize, make_batch, train_step
from e3va_cli.model import DenseModel, build_model
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


def options() -> argparse.Namespace:
    """The words of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="coco_cascade_swin_b", help="as in conf/experiment/")
    parser.add_argument("--size", default="512x512", help="height and width of the images in pixels")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--ways", default=WAYS, help="methods, each with options of its own after colons")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each, after one that is not")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on a CPU")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="further options, as in e3va benchmark-memory")
    return parser.parse_args()


def prepare(way: str, given: argparse.Namespace) -> tuple[Way, StepSize]:
    """A way by its words, such as `e3va:activations=compress`."""
    method, *own = way.split(":")
    words = [f"experiment={given.experiment}", *given.words, f"adapter={method}", *(f"adapter.{word}" for word in own)]
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        config: dict[str, Any] = plain(compose("benchmark_memory", overrides=words), complete=False)
    height, width = (int(side) for side in given.size.split("x"))
    size = StepSize(
        given.batch_size, (height, width), config["instances_per_image"], config["trainer"]["precision"], 1.0
    )
    classes = config["dataset"]["num_classes"]
    of_plan = plan(config, size, num_classes=classes, semantics="cuda" if given.device == "cuda" else "cpu")
    torch.manual_seed(0)
    random = {**config["backbone"], "pretrained": False, "weights": None}
    model = build_model({**config, "backbone": random}, num_classes=classes).to(given.device).train()
    batch = make_batch(size, num_classes=classes, needs=model.head.needs, device=given.device)
    optimizer = build_optimizer(model, **config["optimizer"])
    return Way(way, model, optimizer, batch, of_plan.peak.total_bytes / MIB, of_plan.operations), size


def step_s(way: Way, size: StepSize, device: str) -> float:
    """Seconds of one step."""
    with matching_proposals(way.model):
        started = time.perf_counter()
        train_step(way.model, way.optimizer, way.batch, size, device=device)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def main() -> None:
    """Print a table."""
    given = options()
    torch.set_num_threads(given.threads)
    register_schemas()
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
    where = device_name(torch.device(given.device))
    threads = f", {given.threads} threads" if given.device == "cpu" else ""
    print(
        f"{given.experiment} {' '.join(given.words)}, batch {given.batch_size} of {given.size}, precision "
        f"{size.precision}, torch {torch.__version__}, {where}{threads}; medians of {given.repeats}, in turns\n"
    )
    references = [way for way in ways if way.name in ("full", "frozen")]
    columns = ["way", "step, s", "quartiles, s"]
    for reference in references:
        columns += [f"of {reference.name}", f"operations, of {reference.name}"]
    print(f"| {' | '.join([*columns, 'planned MiB'])} |")
    print(f"|---|{'--:|' * len(columns)}")
    for way in ways:
        first, _, third = statistics.quantiles(times[way.name], n=4, method="inclusive")
        cells = [way.name, f"{medians[way.name]:.2f}", f"{first:.2f} to {third:.2f}"]
        for reference in references:
            ratio = medians[way.name] / medians[reference.name]
            cells += [f"{ratio:.3f}", f"{way.operations / reference.operations:.3f}"]
        print(f"| {' | '.join([*cells, f'{way.planned_mib:,.0f}'])} |", flush=True)


if __name__ == "__main__":
    main()
