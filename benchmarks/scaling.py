"""Estimate how memory and FLOPs of a step scale with image size, batch size, backbone, rank and precision.

    python benchmarks/scaling.py [--settings coco|voc] [--axes size,batch,backbone,rank,precision] [--one-backward-pass]
                                 [--output FILE.json] [KEY=VALUE ...]

Each table varies one axis of one of the paper's two settings, with ratios to full fine-tuning and to a frozen backbone
at the same point. No GPU, weights or data are needed. FLOPs are those of matrix products and convolutions, forward and
backward.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import common
from hydra import initialize_config_module

from e3va_cli.commands.benchmark_memory import COMMAND, load_method_config
from e3va_cli.config.composition import CONFIG_MODULE, validate_overrides
from e3va_cli.errors import UserError
from e3va_cli.memory.benchmark import benchmark_spec
from e3va_cli.models.heads.eager_backward import one_backward_pass
from e3va_cli.utils.environment import MIB

ACTIVATIONS = ("keep", "compress", "recompute")
VARIANTS = ("full", "frozen", *(f"e3va {activations}" for activations in ACTIVATIONS))
COLUMNS = ("estimated MiB", "/ full", "/ frozen", "TFLOPs", "/ full", "/ frozen")


@dataclass(frozen=True)
class Point:
    """A point to estimate; sizes are (height, width) in pixels."""

    experiment: str
    size: tuple[int, int]
    batch: int
    backbone: str
    rank: int
    precision: str = "32"

    @property
    def overrides(self) -> list[str]:
        """Return the overrides of `e3va benchmark-memory`."""
        height, width = self.size
        return [
            f"experiment={self.experiment}",
            f"image_size=[{height},{width}]",
            f"data.batch_size={self.batch}",
            f"backbone={self.backbone}",
            f"adapter.rank={self.rank}",
            f"trainer.precision={self.precision}",
            "measure=false",
        ]


@dataclass(frozen=True)
class Estimate:
    """Peak memory in bytes and floating-point operations of a step."""

    peak_bytes: int
    flops: int


BASES = {
    "coco": Point("coco_cascade_swin_b", (800, 1333), 2, "swin_b", 16),
    "voc": Point("voc_retinanet_swin_l", (600, 1000), 2, "swin_l", 16),
}
AXES: dict[str, tuple[Any, ...]] = {
    "size": (0.6, 1, 1.5),  # factors of height and width
    "batch": (1, 2, 4),
    "backbone": ("swin_t", "swin_s", "swin_b", "swin_l"),
    "rank": (4, 16, 64),
    "precision": ("32", "16-mixed", "bf16-mixed"),
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = common.parser(__doc__)
    parser.add_argument(
        "--settings", choices=BASES, default="coco", help="Cascade Mask R-CNN, Swin-B; RetinaNet, Swin-L"
    )
    parser.add_argument("--axes", default=",".join(AXES), help="axes to vary, one table each")
    parser.add_argument(
        "--one-backward-pass", action="store_true", help="heads keep all activations for one backward pass"
    )
    return parser


def points(base: Point, axis: str) -> list[Point]:
    """Return `base` with each value of the axis."""
    values: Sequence[Any] = AXES[axis]
    if axis == "size":
        values = [tuple(round(factor * side) for side in base.size) for factor in values]
    return [dataclasses.replace(base, **{axis: value}) for value in values]


def label(point: Point, axis: str) -> str:
    """Return a row's label."""
    return f"{point.size[0]}x{point.size[1]}" if axis == "size" else str(getattr(point, axis))


@cache
def estimate(variant: str, point: Point, overrides: tuple[str, ...]) -> Estimate:
    """Estimate a variant, such as `e3va compress`; cached."""
    method, *activations = variant.split()
    own = [f"adapter.activations={value}" for value in activations]
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        config = load_method_config([*point.overrides, *overrides, *own], method)
    result = benchmark_spec(config).estimate(config)
    return Estimate(result.peak.total_bytes, result.flops)


def variants_at(point: Point, base: Point, overrides: tuple[str, ...]) -> dict[str, Estimate]:
    """Return all variants at one point; those without adapters have no rank and are estimated once for all ranks."""
    without = dataclasses.replace(point, rank=base.rank)
    return {
        variant: estimate(variant, point if variant.startswith("e3va") else without, overrides) for variant in VARIANTS
    }


def cells(values: Estimate, full: Estimate, frozen: Estimate) -> list[str]:
    """Return the cells of a row, for `COLUMNS`."""
    return [
        f"{values.peak_bytes / MIB:,.0f}",
        *(f"{values.peak_bytes / other.peak_bytes:.3f}" for other in (full, frozen)),
        f"{values.flops / 1e12:.2f}",
        *(f"{values.flops / other.flops:.3f}" for other in (full, frozen)),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table for each axis."""
    args = parser().parse_intermixed_args(arguments)
    axes = args.axes.split(",")
    if unknown := [axis for axis in axes if axis not in AXES]:
        raise UserError(f"--axes {args.axes}: no axis {', '.join(unknown)}; choices: {', '.join(AXES)}")
    base, overrides = BASES[args.settings], tuple(args.overrides)
    validate_overrides(COMMAND, [*base.overrides, *overrides])
    common.console.print(f"Estimated: {' '.join([*base.overrides[:-1], *overrides])}, one varied per table\n")
    results = []
    for axis in axes:
        rows = []
        for point in points(base, axis):
            with one_backward_pass() if args.one_backward_pass else nullcontext():
                at_point = variants_at(point, base, overrides)
            for variant, values in at_point.items():
                rows.append([label(point, axis), variant, *cells(values, at_point["full"], at_point["frozen"])])
                results.append(
                    {
                        "axis": axis,
                        **vars(point),
                        "variant": variant,
                        "peak_bytes": values.peak_bytes,
                        "operations": values.flops,
                    }
                )
        common.show([axis, "variant", *COLUMNS], rows, names=2)
    common.write(args.output, "cpu", {"source": "planned", "rows": results})
    return 0


if __name__ == "__main__":
    sys.exit(common.exit_code(main))
