"""Ways of training to be compared, by words such as `e3va:activations=compress`, each ready for a step."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import common
import torch
from torch.optim import Optimizer

from e3va_cli.data.collate import Batch
from e3va_cli.memory.estimate import plan
from e3va_cli.memory.step import StepSize, make_batch
from e3va_cli.models.model import DenseModel, build_random_model
from e3va_cli.optim.optimizer import build_optimizer
from e3va_cli.utils.environment import MIB, device_name


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


def parser(doc: str | None, ways: str) -> argparse.ArgumentParser:
    """A parser with `doc` as its help, of ways, by default `ways`, and the step that they are compared in."""
    parser = common.parser(doc)
    parser.add_argument("--experiment", default="coco_cascade_swin_b", help="as in conf/experiment/")
    parser.add_argument("--size", type=height_and_width, default=(512, 512), help="such as 512x512: height, width")
    parser.add_argument("--batch-size", type=common.positive, default=1)
    parser.add_argument("--ways", default=ways, help="methods, each with options after colons, of `adapter.` or whole")
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
    size = StepSize(given.batch_size, given.size, config.instances_per_image, config.trainer.precision, clip_norm=1.0)
    classes = config.dataset.planned_classes
    of_plan = plan(config, size, num_classes=classes, semantics="cuda" if given.device == "cuda" else "cpu")
    torch.manual_seed(0)
    model = build_random_model(config, num_classes=classes).to(given.device).train()
    batch = make_batch(size, num_classes=classes, needs=model.head.target_types, device=given.device)
    optimizer = build_optimizer(model, config.optimizer)
    return Way(way, model, optimizer, batch, of_plan.peak.total_bytes / MIB, of_plan.operations), size


def setting(given: argparse.Namespace, size: StepSize) -> str:
    """What the step was taken in, for the head of a table."""
    height, width = given.size
    return (
        f"{' '.join([given.experiment, *given.words])}, batch {given.batch_size} of {height}x{width}, precision "
        f"{size.precision}, torch {torch.__version__}, {device_name(torch.device(given.device))}"
    )
