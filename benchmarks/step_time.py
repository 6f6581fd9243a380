"""Print the time of a training step of several methods, taking turns in one process, as ratios.

    python benchmarks/step_time.py [--experiment coco_cascade_swin_b] [--size 512x512] [--batch-size 1] [--repeats 5]
                                   [--ways full,frozen,e3va,e3va:activations=compress] [--output FILE.json]
                                   [KEY=VALUE ...]

`e3va benchmark-memory measure=true` runs each method in a process of its own, as memory wants it; on a machine that is
sometimes busy, steps that take turns compare better. Beside each ratio stands that of the operations (matrix products
and convolutions, counted, not measured): what arithmetic alone would let a method save. Weights and images are random.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence

import common
import torch
import ways

from e3va_cli.memory.regions import matching_proposals
from e3va_cli.memory.step import StepSize, train_step
from e3va_cli.utils.environment import synchronize

WAYS = "full,frozen,e3va,e3va:activations=compress,e3va:activations=recompute"


def step_s(way: ways.Way, size: StepSize, device: str) -> float:
    """Seconds of one step."""
    with matching_proposals(way.model):
        started = time.perf_counter()
        train_step(way.model, way.optimizer, way.batch, size, device=device)
        synchronize(torch.device(device))
        return time.perf_counter() - started


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third; of a single value, that value twice."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table."""
    parser = ways.parser(__doc__, WAYS)
    parser.add_argument("--repeats", type=common.positive, default=5, help="timed steps of each, after one that is not")
    given = parser.parse_intermixed_args(arguments)
    torch.set_num_threads(given.threads)
    compared = []
    for name in given.ways.split(","):
        way, size = ways.prepare(name, given)
        compared.append(way)
    times: dict[str, list[float]] = {way.name: [] for way in compared}
    for repeat in range(given.repeats + 1):
        for way in compared:
            seconds = step_s(way, size, given.device)
            if repeat:
                times[way.name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    common.console.print(f"{ways.setting(given, size)}; medians of {given.repeats}, in turns\n")
    references = [way for way in compared if way.name in ("full", "frozen")]
    columns = ["way", "step, s", "quartiles, s"]
    for reference in references:
        columns += [f"of {reference.name}", f"operations, of {reference.name}"]
    rows = []
    for way in compared:
        first, third = quartiles(times[way.name])
        row = [way.name, f"{medians[way.name]:.2f}", f"{first:.2f} to {third:.2f}"]
        for reference in references:
            ratio = medians[way.name] / medians[reference.name]
            row += [f"{ratio:.3f}", f"{way.operations / reference.operations:.3f}"]
        rows.append([*row, f"{way.planned_mib:,.0f}"])
    common.show([*columns, "planned MiB"], rows)
    figures = {
        way.name: {"step_times_s": times[way.name], "operations": way.operations, "planned_mib": way.planned_mib}
        for way in compared
    }
    common.write(given.output, given.device, {"source": "measured; operations and MiB planned", "ways": figures})
    return 0


if __name__ == "__main__":
    sys.exit(common.exit_code(main))
