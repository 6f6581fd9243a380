"""Training variants to compare, such as `e3va:activations=compress`, each ready for a step."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import common
import torch
from torch.optim import Optimizer

from e3va_cli.data.collate import Batch
from e3va_cli.memory.estimate import DeviceType, estimate_memory
from e3va_cli.memory.step import StepSize, random_batch
from e3va_cli.models.model import DenseModel, build_random_model
from e3va_cli.optim.optimizer import build_optimizer
from e3va_cli.utils.environment import MIB, device_name


@dataclass
class Variant:
    """A tuning method with options, ready to train.

    Attributes:
        estimated_mib: peak memory of a step.
        flops: floating-point operations of a step.
    """

    name: str
    model: DenseModel
    optimizer: Optimizer
    batch: Batch
    estimated_mib: float
    flops: int


def height_and_width(text: str) -> tuple[int, int]:
    """Return height and width of a text such as `512x512`.

    Raises:
        ValueError: another text.
    """
    height, width = map(common.positive, text.split("x"))
    return height, width


def parser(doc: str | None, variants: str) -> argparse.ArgumentParser:
    """Return a parser with `doc` as its help, for variants, by default `variants`, and the step to compare them in."""
    parser = common.parser(doc)
    parser.add_argument("--experiment", default="coco_cascade_swin_b", help="of conf/experiment/")
    parser.add_argument("--size", type=height_and_width, default=(512, 512), help="height and width, such as 512x512")
    parser.add_argument("--batch-size", type=common.positive, default=1)
    help_text = "methods, with options after colons: of `adapter.`, or in full"
    parser.add_argument("--variants", default=variants, help=help_text)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=common.positive, default=torch.get_num_threads(), help="of a CPU")
    return parser


def prepare(name: str, args: argparse.Namespace) -> tuple[Variant, StepSize]:
    """Build a variant by its name, such as `e3va:activations=compress`.

    Raises:
        UserError: overrides that `e3va benchmark-memory` does not accept.
    """
    method, *own = name.split(":")
    overrides = [f"experiment={args.experiment}", *args.overrides, f"adapter={method}"]
    overrides += [option if "." in option.partition("=")[0] else f"adapter.{option}" for option in own]
    config = common.compose("benchmark_memory", overrides, complete=False)
    size = StepSize(args.batch_size, args.size, config.instances_per_image, config.trainer.precision, clip_norm=1.0)
    classes = config.dataset.planned_classes
    device_type: DeviceType = "cuda" if args.device == "cuda" else "cpu"
    estimate = estimate_memory(config, size, num_classes=classes, device_type=device_type)
    torch.manual_seed(0)
    model = build_random_model(config, num_classes=classes).to(args.device).train()
    batch = random_batch(size, num_classes=classes, target_types=model.head.target_types, device=args.device)
    optimizer = build_optimizer(model, config.optimizer)
    return Variant(name, model, optimizer, batch, estimate.peak.total_bytes / MIB, estimate.flops), size


def describe(args: argparse.Namespace, size: StepSize) -> str:
    """Return the description of the step, for the head of a table."""
    height, width = args.size
    return (
        f"{' '.join([args.experiment, *args.overrides])}, batch {args.batch_size} of {height}x{width}, precision "
        f"{size.precision}, torch {torch.__version__}, {device_name(torch.device(args.device))}"
    )
