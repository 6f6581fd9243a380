"""Compare the time of a training step of several variants, run in turns in one process.

    python benchmarks/step_time.py [--experiment coco_cascade_swin_b] [--size 512x512] [--batch-size 1] [--repeats 5]
                                   [--variants full,frozen,e3va,e3va:activations=compress] [--output FILE.json]
                                   [KEY=VALUE ...]

`e3va benchmark-memory measure=true` measures methods one by one; on a busy machine, steps in turns compare better.
Beside each ratio of times is the ratio of FLOPs (matrix products and convolutions), a lower bound where arithmetic
dominates. Weights and images are random.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence

import common
import torch
import variants

from e3va_cli.memory.rois import add_matching_proposals
from e3va_cli.memory.step import StepSize, train_step
from e3va_cli.utils.environment import synchronize

VARIANTS = "full,frozen,e3va,e3va:activations=compress,e3va:activations=recompute"


def time_step(variant: variants.Variant, size: StepSize, device: str) -> float:
    """Return the seconds of one step."""
    with add_matching_proposals(variant.model):
        started = time.perf_counter()
        train_step(variant.model, variant.optimizer, variant.batch, size, device=device)
        synchronize(torch.device(device))
        return time.perf_counter() - started


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the first and the third quartile; of a single value, that value twice."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = variants.parser(__doc__, VARIANTS)
    parser.add_argument("--repeats", type=common.positive, default=5, help="timed steps of each, after a warm-up step")
    args = parser.parse_intermixed_args(arguments)
    torch.set_num_threads(args.threads)
    prepared = []
    for name in args.variants.split(","):
        variant, size = variants.prepare(name, args)
        prepared.append(variant)
    times: dict[str, list[float]] = {variant.name: [] for variant in prepared}
    for repeat in range(args.repeats + 1):
        for variant in prepared:
            seconds = time_step(variant, size, args.device)
            if repeat:
                times[variant.name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    common.console.print(f"{variants.describe(args, size)}; medians of {args.repeats}, in turns\n")
    references = [variant for variant in prepared if variant.name in ("full", "frozen")]
    columns = ["variant", "step, s", "quartiles, s"]
    for reference in references:
        columns += [f"/ {reference.name}", f"FLOPs / {reference.name}"]
    rows = []
    for variant in prepared:
        first, third = quartiles(times[variant.name])
        row = [variant.name, f"{medians[variant.name]:.2f}", f"{first:.2f} to {third:.2f}"]
        for reference in references:
            ratio = medians[variant.name] / medians[reference.name]
            row += [f"{ratio:.3f}", f"{variant.flops / reference.flops:.3f}"]
        rows.append([*row, f"{variant.estimated_mib:,.0f}"])
    common.show([*columns, "estimated MiB"], rows)
    values = {
        variant.name: {
            "step_times_s": times[variant.name],
            "operations": variant.flops,
            "planned_mib": variant.estimated_mib,
        }
        for variant in prepared
    }
    common.write(args.output, args.device, {"source": "measured; operations and MiB estimated", "variants": values})
    return 0


if __name__ == "__main__":
    sys.exit(common.exit_code(main))
