"""Compare 1, 2, 4 and 8 adapters on one shared backbone pass with separate passes: time and memory.

    python benchmarks/many_adapters.py [--backbone swin_t] [--size 512] [--heads mask_rcnn_nano,upernet_nano]
                                       [--output FILE.json] [KEY=VALUE ...]

Weights are random. Both run in turns, and times are medians. Memory is that of all tensors, weights included, by the
storage tracker: deterministic.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import common
import torch
from torch import Tensor

from e3va_cli.config.run_config import RunConfig
from e3va_cli.inference.shared_backbone import predict_shared
from e3va_cli.memory.tracker import StorageTracker
from e3va_cli.models.adapters.highway import forward_shared_backbone
from e3va_cli.models.backbones import build_backbone
from e3va_cli.models.model import DenseModel, build_from_backbone
from e3va_cli.utils.environment import MIB, device_name

NUM_CLASSES = 5
COLUMNS = [
    *("adapters", "together, s", "time / separate", "without heads"),
    *("MiB, together", "MiB, one after another", "MiB, all loaded"),
]


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = common.parser(__doc__)
    parser.add_argument("--backbone", default="swin_t", help="of conf/backbone/")
    parser.add_argument("--heads", default="mask_rcnn_nano,upernet_nano", help="assigned to the adapters in turn")
    parser.add_argument("--size", type=common.positive, default=512, help="image height and width in pixels")
    parser.add_argument(
        "--counts", type=partial(common.int_list, least=1), default=[1, 2, 4, 8], help="numbers of adapters"
    )
    parser.add_argument("--repeats", type=common.positive, default=3, help="timed runs of each, after a warm-up run")
    parser.add_argument("--threads", type=common.positive, default=torch.get_num_threads())
    return parser


def build(configs: Sequence[RunConfig], count: int) -> tuple[list[DenseModel], list[DenseModel]]:
    """Build `count` adapters twice: on a shared backbone, and each on its own backbone."""
    shared = build_backbone(configs[0].backbone)
    together: list[DenseModel] = []
    separately: list[DenseModel] = []
    for index in range(count):
        config = configs[index % len(configs)]
        for models, base in ((together, shared), (separately, build_backbone(config.backbone))):
            torch.manual_seed(index)
            model = build_from_backbone(config, *base, NUM_CLASSES).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.02 * torch.randn_like(parameter))
            models.append(model)
    return together, separately


def peak_mib(models: Sequence[DenseModel], run: Callable[[], Any]) -> float:
    """Return the peak memory of all tensors during `run`, the weights of `models` included, in MiB (2^20 bytes)."""
    tracker = StorageTracker()
    for model in models:
        tracker.track(model.parameters(), "weights")
        tracker.track(model.buffers(), "buffers")
    with tracker:
        tracker.reset_peak()
        run()
    return tracker.peak.total_bytes / MIB


def medians_s(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each, run in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if repeat:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def same(one: Any, other: Any) -> bool:
    """Return whether two predictions are equal."""
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))


@torch.no_grad()
def measure(together: list[DenseModel], separately: list[DenseModel], image: Tensor, repeats: int) -> list[float]:
    """Return time, ratios of times, and memory in MiB, of the given adapters."""
    sizes = [(image.shape[2], image.shape[3])]
    normal = together[0].normalize(image, sizes).tensors
    extractors: list[Any] = [model.extractor for model in together]

    def one_pass() -> Any:
        return predict_shared(together, image, sizes)

    def passes() -> Any:
        return [model.predict(image, sizes) for model in separately]

    assert all(same(a[0], b[0]) for a, b in zip(one_pass(), passes(), strict=True)), "results differ"
    seconds = medians_s(
        {
            "together": one_pass,
            "separately": passes,
            "features together": lambda: forward_shared_backbone(extractors, normal),
            "features separately": lambda: [model.extractor(normal) for model in separately],
        },
        repeats,
    )
    return [
        seconds["together"],
        seconds["together"] / seconds["separately"],
        seconds["features together"] / seconds["features separately"],
        peak_mib(together, one_pass),
        max(peak_mib([model], partial(model.predict, image, sizes)) for model in separately),
        peak_mib(separately, passes),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    args = parser().parse_intermixed_args(arguments)
    torch.set_num_threads(args.threads)
    heads = args.heads.split(",")
    configs = [
        common.compose("train", [f"backbone={args.backbone}", f"head={head}", *args.overrides]) for head in heads
    ]
    together, separately = build(configs, max(args.counts))
    image = torch.randint(0, 256, (1, 3, args.size, args.size), dtype=torch.uint8)
    common.console.print(
        f"{args.backbone}, E3VA with the heads {args.heads} in turn, one image of {args.size}x{args.size}, "
        f"float32, torch {torch.__version__}, {device_name(torch.device('cpu'))}; medians of {args.repeats}\n"
    )
    values = [measure(together[:count], separately[:count], image, args.repeats) for count in args.counts]
    rows = [
        [str(count), *(f"{ratio:.2f}" for ratio in row[:3]), *(f"{mib:,.0f}" for mib in row[3:])]
        for count, row in zip(args.counts, values, strict=True)
    ]
    common.show(COLUMNS, rows, names=0)
    named = [dict(zip(COLUMNS, [c, *row], strict=True)) for c, row in zip(args.counts, values, strict=True)]
    common.write(args.output, "cpu", {"source": "measured", "rows": named})
    return 0


if __name__ == "__main__":
    sys.exit(common.exit_code(main))
