"""Print where the time of a training step goes: by part of the network, forward and backward, and by operator.

    python benchmarks/step_profile.py [--experiment coco_cascade_swin_b] [--size 512x512] [--batch-size 1]
                                      [--variants full,frozen,e3va] [--steps 3] [--operators 12] [--traces FOLDER]
                                      [--output FILE.json] [KEY=VALUE ...]

On a GPU the time is that of its kernels, and the head of each table says how much of the step they fill; on a CPU it is
that of PyTorch's operators and the Python between them. What the backward pass does counts to the part whose forward
pass called for it. Profiling costs time itself: `step_time.py` has the time of a step, this has its shares. `--traces`
leaves a file for each variant that https://ui.perfetto.dev shows. Weights and images are random.
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

PART = "part: "  # before the name of a part, in the profiler's labels
PARTS = (*ACTIVATIONS, "optimizer", "the rest")
BACKWARD = "autograd::engine::evaluate_function"  # begins the name of what runs the backward of one operator


@dataclass(frozen=True)
class Spent:
    """Time of one call of an operator, without that of the operators within it."""

    part: str
    phase: str
    operator: str
    seconds: float


@contextmanager
def labelled(model: DenseModel) -> Iterator[None]:
    """Label for the profiler what each part of `model` does in the forward pass."""
    kinds = module_groups(model)
    running: list[AbstractContextManager[Any]] = []

    def enter(kind: str) -> None:
        running.append(record_function(PART + kind))
        running[-1].__enter__()

    def leave(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    def within(kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def labelled_call(*args: Any) -> Any:
            with record_function(PART + kind):
                return call(*args)

        return labelled_call

    with ExitStack() as labels:
        for module in model.modules():
            for child in module.children():
                if kinds[child] != kinds[module]:
                    before = child.register_forward_pre_hook(lambda *_, kind=kinds[child]: enter(kind))
                    after = child.register_forward_hook(leave, always_call=True)
                    labels.callback(before.remove)
                    labels.callback(after.remove)
        # What runs without a call of its module: functions compute a branch, and a head's losses are a method.
        labels.enter_context(patch.object(Branch, "__call__", within("backbone", Branch.__call__)))
        labels.enter_context(patch.object(model.head, "losses", within("head", model.head.losses)))
        yield


def attributed(events: Iterable[FunctionEvent], on_gpu: bool) -> Iterator[Spent]:
    """The time of each operator, by the part of the network and the phase that it belongs to."""
    operators = sorted((e for e in events if e.device_type == DeviceType.CPU), key=lambda e: e.time_range.start)
    # An operator carries the number of the backward to come; of those with the same number, the last one made it.
    forward_of: dict[tuple[int | None, int], str] = {}  # by thread and number

    def place(event: FunctionEvent) -> tuple[str, str]:
        part, phase = "", "forward"
        above: FunctionEvent | None = event
        while above is not None:
            if above.name.startswith(PART):
                part = part or above.name.removeprefix(PART)
            elif above.name.startswith(BACKWARD):
                phase = "backward"
                part = part or forward_of.get((above.fwd_thread, above.sequence_nr), "")
            above = above.cpu_parent
        return part or "the rest", phase

    for event in operators:
        part, phase = place(event)
        if event.sequence_nr >= 0 and not event.name.startswith(BACKWARD):
            forward_of[event.thread, event.sequence_nr] = part
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        operator = "Python" if event.name.startswith(PART) else event.name.removeprefix(f"{BACKWARD}: ")
        yield Spent(part, phase, operator, microseconds / 1e6)


def profiled(variant: variants.Variant, size: StepSize, args: argparse.Namespace) -> tuple[list[Spent], float]:
    """The time of the operators of `--steps` steps, after one that is not looked at, and the seconds of all of them."""
    on_gpu = args.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]

    def step() -> None:
        train_step(variant.model, variant.optimizer, variant.batch, size, device=args.device, phase=label_of)
        synchronize(torch.device(args.device))

    with add_matching_proposals(variant.model), labelled(variant.model):
        step()
        with profile(activities=activities, acc_events=True) as found:
            started = time.perf_counter()
            for _ in range(args.steps):
                with record_function(f"{PART}the rest"):
                    step()
            seconds = time.perf_counter() - started
    if args.traces:
        args.traces.mkdir(parents=True, exist_ok=True)
        name = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in variant.name)
        found.export_chrome_trace(str(args.traces / f"{name}.json.gz"))
    return list(attributed(found.events(), on_gpu)), seconds


def label_of(name: str) -> AbstractContextManager[Any]:
    """The label of a part of the step: of the optimizer alone, as operators tell forward and backward."""
    return record_function(f"{PART}optimizer") if name == "optimizer" else nullcontext()


def totals(spent: Iterable[Spent], key: Callable[[Spent], Any]) -> dict[Any, float]:
    """Seconds of each `key`, the most first."""
    sums: dict[Any, float] = defaultdict(float)
    for one in spent:
        sums[key(one)] += one.seconds
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def of_parts(spent: Sequence[Spent], steps: int) -> list[list[str]]:
    """Rows: part, milliseconds forward, backward and together in a step, percent of all."""
    found, everything = totals(spent, lambda one: (one.part, one.phase)), sum(one.seconds for one in spent)
    rows = []
    for part in PARTS:
        both = [found.get((part, phase), 0.0) for phase in ("forward", "backward")]
        if any(both):
            cells = [f"{1000 * seconds / steps:,.1f}" for seconds in (*both, sum(both))]
            rows.append([part, *cells, f"{100 * sum(both) / everything:.1f}"])
    return rows


def of_operators(spent: Sequence[Spent], steps: int, most: int) -> list[list[str]]:
    """Rows of the operators that take most: name, the parts that call it, calls and milliseconds in a step, percent."""
    everything, calls = sum(one.seconds for one in spent), Counter(one.operator for one in spent)
    rows = []
    for operator, seconds in list(totals(spent, lambda one: one.operator).items())[:most]:
        by_part = totals((one for one in spent if one.operator == operator), lambda one: one.part)
        callers = ", ".join(part for part, of_part in by_part.items() if of_part > seconds / 10)
        share = f"{100 * seconds / everything:.1f}"
        rows.append([operator, callers, f"{calls[operator] / steps:,.0f}", f"{1000 * seconds / steps:,.1f}", share])
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print two tables for each variant."""
    parser = variants.parser(__doc__, "full,frozen,e3va")
    parser.add_argument("--steps", type=common.positive, default=3, help="profiled steps of each")
    parser.add_argument("--operators", type=common.positive, default=12, help="those that take most")
    parser.add_argument("--traces", type=Path, metavar="FOLDER", help="a file for each variant, for a viewer of traces")
    args = parser.parse_intermixed_args(arguments)
    torch.set_num_threads(args.threads)
    figures = {}
    for index, name in enumerate(args.variants.split(",")):
        variant, size = variants.prepare(name, args)
        if not index:
            common.console.print(f"{variants.describe(args, size)}; means of {args.steps} steps\n")
        spent, seconds = profiled(variant, size, args)
        share = sum(one.seconds for one in spent) / seconds
        common.console.print(f"{name}: {seconds / args.steps:.3f} s a step, profiled; {share:.0%} of that is below")
        common.show(["part", "forward, ms", "backward, ms", "together, ms", "%"], of_parts(spent, args.steps))
        columns = ["operator", "mostly called by", "calls", "ms", "%"]
        common.show(columns, of_operators(spent, args.steps, args.operators), names=2)
        figures[name] = {
            "steps": args.steps,
            "wall_s": seconds,
            "parts_s": totals(spent, lambda one: f"{one.part}, {one.phase}"),
            "operators_s": totals(spent, lambda one: one.operator),
        }
        del variant  # before the next one is made
    common.write(args.output, args.device, {"source": "measured, profiled", "variants": figures})
    return 0


if __name__ == "__main__":
    sys.exit(common.exit_code(main))
