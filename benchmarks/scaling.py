"""Print how a step's memory and operations grow with image size, batch size, backbone and so on: planned, not measured.

    python benchmarks/scaling.py [--settings coco|voc] [--axes size,batch,backbone,rank,precision] [--one-backward-pass]
                                 [--output FILE.json] [KEY=VALUE ...]

Each table varies one thing about one of the paper's two settings and leaves the others. Beside each figure stand its
ratios to full fine-tuning and to training the head alone under the same conditions. Neither a GPU nor weights nor data
are needed. Operations are those of matrix products and convolutions, forward and backward.
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

from e3va_cli.commands.benchmark_memory import COMMAND, of_method
from e3va_cli.config.composition import CONFIG_MODULE, validate_overrides
from e3va_cli.errors import UserError
from e3va_cli.memory.benchmark import benchmark_spec
from e3va_cli.memory.estimate import plan
from e3va_cli.models.heads.eager_backward import one_backward_pass
from e3va_cli.utils.environment import MIB

ACTIVATIONS = ("keep", "compress", "recompute")
WAYS = ("full", "frozen", *(f"e3va {activations}" for activations in ACTIVATIONS))
COLUMNS = ("planned MiB", "of full", "of frozen", "TFLOP", "of full", "of frozen")


@dataclass(frozen=True)
class Point:
    """What a plan depends on, beside the method: sizes are (height, width) in pixels."""

    experiment: str
    size: tuple[int, int]
    batch: int
    backbone: str
    rank: int
    precision: str = "32"

    @property
    def words(self) -> list[str]:
        """The point as options of `e3va benchmark-memory`."""
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
class Planned:
    """A step's peak memory in bytes, and its floating-point operations."""

    peak_bytes: int
    operations: int


BASES = {
    "coco": Point("coco_cascade_swin_b", (800, 1333), 2, "swin_b", 16),
    "voc": Point("voc_retinanet_swin_l", (600, 1000), 2, "swin_l", 16),
}
AXES: dict[str, tuple[Any, ...]] = {
    "size": (0.6, 1, 1.5),  # of the setting's sides
    "batch": (1, 2, 4),
    "backbone": ("swin_t", "swin_s", "swin_b", "swin_l"),
    "rank": (4, 16, 64),
    "precision": ("32", "16-mixed", "bf16-mixed"),
}


def parser() -> argparse.ArgumentParser:
    """The words of the command line."""
    parser = common.parser(__doc__)
    parser.add_argument(
        "--settings", choices=BASES, default="coco", help="Cascade Mask R-CNN, Swin-B; RetinaNet, Swin-L"
    )
    parser.add_argument("--axes", default=",".join(AXES), help="what to vary, one table each")
    parser.add_argument(
        "--one-backward-pass", action="store_true", help="heads keep all activations for one backward pass"
    )
    return parser


def points(base: Point, axis: str) -> list[Point]:
    """`base` with one thing varied."""
    values: Sequence[Any] = AXES[axis]
    if axis == "size":
        values = [tuple(round(factor * side) for side in base.size) for factor in values]
    return [dataclasses.replace(base, **{axis: value}) for value in values]


def label(point: Point, axis: str) -> str:
    """What a row is called."""
    return f"{point.size[0]}x{point.size[1]}" if axis == "size" else str(getattr(point, axis))


@cache
def planned(way: str, point: Point, words: tuple[str, ...]) -> Planned:
    """One plan, such as of `e3va compress`; planned once."""
    method, *activations = way.split()
    own = [f"adapter.activations={value}" for value in activations]
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        config = of_method([*point.words, *words, *own], method)
    setting = benchmark_spec(config)
    result = plan(config, setting.size, num_classes=setting.num_classes)
    return Planned(result.peak.total_bytes, result.operations)


def ways_at(point: Point, base: Point, words: tuple[str, ...]) -> dict[str, Planned]:
    """All ways at one point; the rank is nothing to those without adapters, which are planned once for all ranks."""
    without = dataclasses.replace(point, rank=base.rank)
    return {way: planned(way, point if way.startswith("e3va") else without, words) for way in WAYS}


def cells(of_way: Planned, full: Planned, frozen: Planned) -> list[str]:
    """A row of figures, under `COLUMNS`."""
    return [
        f"{of_way.peak_bytes / MIB:,.0f}",
        *(f"{of_way.peak_bytes / other.peak_bytes:.3f}" for other in (full, frozen)),
        f"{of_way.operations / 1e12:.2f}",
        *(f"{of_way.operations / other.operations:.3f}" for other in (full, frozen)),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table for each axis."""
    given = parser().parse_intermixed_args(arguments)
    axes = given.axes.split(",")
    if unknown := [axis for axis in axes if axis not in AXES]:
        raise UserError(f"--axes {given.axes}: no axis {', '.join(unknown)}; choices: {', '.join(AXES)}")
    base, words = BASES[given.settings], tuple(given.words)
    validate_overrides(COMMAND, [*base.words, *words])
    common.console.print(f"Planned, not measured: {' '.join([*base.words[:-1], *words])}, one of them varied\n")
    figures = []
    for axis in axes:
        rows = []
        for point in points(base, axis):
            with one_backward_pass() if given.one_backward_pass else nullcontext():
                found = ways_at(point, base, words)
            for way, of_way in found.items():
                rows.append([label(point, axis), way, *cells(of_way, found["full"], found["frozen"])])
                figures.append({"axis": axis, **vars(point), "way": way, **vars(of_way)})
        common.show([axis, "way", *COLUMNS], rows, names=2)
    common.write(given.output, "cpu", {"source": "planned", "rows": figures})
    return 0


if __name__ == "__main__":
    sys.exit(common.exit_code(main))
