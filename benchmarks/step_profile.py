"""Profile a training step: time by part of the model, forward and backward, and by operator.

    python benchmarks/step_profile.py [--experiment coco_cascade_swin_b] [--size 512x512] [--batch-size 1]
                                      [--variants full,frozen,e3va] [--steps 3] [--operators 12] [--traces FOLDER]
                                      [--output FILE.json] [KEY=VALUE ...]

On a GPU times are those of kernels, and the line above each table has their fraction of the step; on a CPU they are
those of PyTorch's operators and the Python between them. Backward time counts for the part whose forward pass created
the operator. Profiling takes time itself; `step_time.py` measures the whole step. `--traces` writes a file per variant
for https://ui.perfetto.dev. Weights and images are random.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import common
import torch
import variants
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from e3va_cli.memory.module_groups import module_groups
from e3va_cli.memory.rois import add_matching_proposals
from e3va_cli.memory.step import StepSize, train_step
from e3va_cli.memory.tracker import ACTIVATIONS
from e3va_cli.models.backbones.base import Branch
from e3va_cli.models.model import DenseModel
from e3va_cli.utils.environment import synchronize

PART = "part: "  # prefix of the profiler's labels
PARTS = (*ACTIVATIONS, "optimizer", "other")
BACKWARD = "autograd::engine::evaluate_function"  # prefix of the backward of one operator


@dataclass(frozen=True)
class Spent:
    """Time of one call of an operator, without the operators it calls."""

    part: str
    phase: str
    operator: str
    seconds: float


@contextmanager
def labeled(model: DenseModel) -> Iterator[None]:
    """Label each part of `model` for the profiler in the forward pass."""
    groups = module_groups(model)
    running: list[AbstractContextManager[Any]] = []

    def enter(group: str) -> None:
        running.append(record_function(PART + group))
        running[-1].__enter__()

    def leave(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    def within(group: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def labeled_call(*args: Any) -> Any:
            with record_function(PART + group):
                return call(*args)

        return labeled_call

    with ExitStack() as labels:
        for module in model.modules():
            for child in module.children():
                if groups[child] != groups[module]:
                    before = child.register_forward_pre_hook(lambda *_, group=groups[child]: enter(group))
                    after = child.register_forward_hook(leave, always_call=True)
                    labels.callback(before.remove)
                    labels.callback(after.remove)
        # Not called as modules: branches are functions, and a head's losses are a method.
        labels.enter_context(patch.object(Branch, "__call__", within("backbone", Branch.__call__)))
        labels.enter_context(patch.object(model.head, "losses", within("head", model.head.losses)))
        yield


def attributed(events: Iterable[FunctionEvent], on_gpu: bool) -> Iterator[Spent]:
    """Yield the time of each operator, by part of the model and phase."""
    operators = sorted((e for e in events if e.device_type == DeviceType.CPU), key=lambda e: e.time_range.start)
    # An operator has the sequence number of its backward; of several with the same number, the last one created it.
    forward_of: dict[tuple[int | None, int], str] = {}  # by thread and sequence number

    def location(event: FunctionEvent) -> tuple[str, str]:
        part, phase = "", "forward"
        above: FunctionEvent | None = event
        while above is not None:
            if above.name.startswith(PART):
                part = part or above.name.removeprefix(PART)
            elif above.name.startswith(BACKWARD):
                phase = "backward"
                part = part or forward_of.get((above.fwd_thread, above.sequence_nr), "")
            above = above.cpu_parent
        return part or "other", phase

    for event in operators:
        part, phase = location(event)
        if event.sequence_nr >= 0 and not event.name.startswith(BACKWARD):
            forward_of[event.thread, event.sequence_nr] = part
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        operator = "Python" if event.name.startswith(PART) else event.name.removeprefix(f"{BACKWARD}: ")
        yield Spent(part, phase, operator, microseconds / 1e6)


def profiled(variant: variants.Variant, size: StepSize, args: argparse.Namespace) -> tuple[list[Spent], float]:
    """Return the operators of `--steps` steps, after a warm-up step, and the seconds of these steps."""
    on_gpu = args.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]

    def step() -> None:
        train_step(variant.model, variant.optimizer, variant.batch, size, device=args.device, phase=label_of)
        synchronize(torch.device(args.device))

    with add_matching_proposals(variant.model), labeled(variant.model):
        step()
        with profile(activities=activities, acc_events=True) as profiler:
            started = time.perf_counter()
            for _ in range(args.steps):
                with record_function(f"{PART}other"):
                    step()
            seconds = time.perf_counter() - started
    if args.traces:
        args.traces.mkdir(parents=True, exist_ok=True)
        name = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in variant.name)
        profiler.export_chrome_trace(str(args.traces / f"{name}.json.gz"))
    return list(attributed(profiler.events(), on_gpu)), seconds


def label_of(name: str) -> AbstractContextManager[Any]:
    """Return the label of a phase: the optimizer's; forward and backward follow from the operators."""
    return record_function(f"{PART}optimizer") if name == "optimizer" else nullcontext()


def totals(spent: Iterable[Spent], key: Callable[[Spent], Any]) -> dict[Any, float]:
    """Return the seconds of each `key`, largest first."""
    sums: dict[Any, float] = defaultdict(float)
    for one in spent:
        sums[key(one)] += one.seconds
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def part_rows(spent: Sequence[Spent], steps: int) -> list[list[str]]:
    """Return rows of part, milliseconds per step forward, backward and in total, and percent."""
    seconds, everything = totals(spent, lambda one: (one.part, one.phase)), sum(one.seconds for one in spent)
    rows = []
    for part in PARTS:
        both = [seconds.get((part, phase), 0.0) for phase in ("forward", "backward")]
        if any(both):
            cells = [f"{1000 * one / steps:,.1f}" for one in (*both, sum(both))]
            rows.append([part, *cells, f"{100 * sum(both) / everything:.1f}"])
    return rows


def operator_rows(spent: Sequence[Spent], steps: int, most: int) -> list[list[str]]:
    """Return rows of the slowest operators: name, calling parts, calls and milliseconds per step, percent."""
    everything, calls = sum(one.seconds for one in spent), Counter(one.operator for one in spent)
    rows = []
    for operator, seconds in list(totals(spent, lambda one: one.operator).items())[:most]:
        by_part = totals((one for one in spent if one.operator == operator), lambda one: one.part)
        callers = ", ".join(part for part, of_part in by_part.items() if of_part > seconds / 10)
        share = f"{100 * seconds / everything:.1f}"
        rows.append([operator, callers, f"{calls[operator] / steps:,.0f}", f"{1000 * seconds / steps:,.1f}", share])
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print two tables per variant."""
    parser = variants.parser(__doc__, "full,frozen,e3va")
    parser.add_argument("--steps", type=common.positive, default=3, help="profiled steps per variant")
    parser.add_argument("--operators", type=common.positive, default=12, help="number of operators to print")
    parser.add_argument("--traces", type=Path, metavar="FOLDER", help="write a trace per variant")
    args = parser.parse_intermixed_args(arguments)
    torch.set_num_threads(args.threads)
    results = {}
    for index, name in enumerate(args.variants.split(",")):
        variant, size = variants.prepare(name, args)
        if not index:
            common.console.print(f"{variants.describe(args, size)}; means of {args.steps} steps\n")
        spent, seconds = profiled(variant, size, args)
        share = sum(one.seconds for one in spent) / seconds
        common.console.print(
            f"{name}: {seconds / args.steps:.3f} s per step, profiled; the tables have {share:.0%} of it"
        )
        common.show(["part", "forward, ms", "backward, ms", "total, ms", "%"], part_rows(spent, args.steps))
        columns = ["operator", "called by", "calls", "ms", "%"]
        common.show(columns, operator_rows(spent, args.steps, args.operators), names=2)
        results[name] = {
            "steps": args.steps,
            "wall_s": seconds,
            "parts_s": totals(spent, lambda one: f"{one.part}, {one.phase}"),
            "operators_s": totals(spent, lambda one: one.operator),
        }
        del variant  # before the next one is made
    common.write(args.output, args.device, {"source": "measured, profiled", "variants": results})
    return 0


if __name__ == "__main__":
    sys.exit(common.exit_code(main))
