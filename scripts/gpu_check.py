"""Check on a CUDA GPU what only a GPU can show, the most telling first, within a given time.

    make gpu-check                                  # or: python scripts/gpu_check.py [--minutes 8] [FOLDER]
    python scripts/gpu_check.py --dry-run           # what would run, in which order, for how long; needs no GPU

Runs the tests that need a GPU; measures the memory and time of a training step in both published settings, beside what
was planned; fits Swin-L with Cascade Mask R-CNN into 11 GiB; profiles a step; then measures what is left, while time
is. Writes `summary.json`, `measurements.json`, `results.md`, `tests.txt` and a profile of each setting to FOLDER, by
default `benchmarks/GPU_NAME/DATE/`. Exit code 1 if a test fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import common  # noqa: E402 (lies beside the benchmarks)

from e3va_cli.config.run_config import BenchmarkMemoryConfig  # noqa: E402
from e3va_cli.memory.benchmark import BenchmarkSpec, benchmark_spec  # noqa: E402
from e3va_cli.memory.estimate import plan  # noqa: E402
from e3va_cli.memory.measure import Measurement, MeasuringProcess, Request  # noqa: E402
from e3va_cli.memory.result import saved_pct  # noqa: E402
from e3va_cli.models.adapters import METHODS  # noqa: E402
from e3va_cli.paper.published import SETTINGS  # noqa: E402
from e3va_cli.utils.environment import MIB, device_name, versions  # noqa: E402
from e3va_cli.utils.files import atomic_write, write_json  # noqa: E402

MAIN = ("full", "lora", "frozen", "e3va", "e3va:activations=compress", "e3va:activations=recompute")
OTHERS = tuple(method for method in METHODS if method not in MAIN)
CARD = "11GiB"
TESTS_S, MEASUREMENT_S, PROFILE_S = 160, 7, 75  # expected; nothing is begun that these say would end too late
OVERTIME = 1.5  # a command that takes this many times as long as expected is stopped
PLANS_S = 45  # for planning what was measured; after it, as that would take the processor from the steps


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step to measure.

    Attributes:
        experiment: of `conf/experiment/`.
        variant: a method, with options of it after colons.
        batch_size: images.
        precision: as `trainer.precision` has it.
        budget: what the GPU is capped to, such as 11GiB.
        options: further ones, KEY=VALUE.
    """

    experiment: str
    variant: str
    batch_size: int = 2
    precision: str = "32"
    budget: str | None = None
    options: tuple[str, ...] = ()
    expected_s: int = MEASUREMENT_S

    @property
    def title(self) -> str:
        """The step in a line."""
        budget = f"within {self.budget}" if self.budget else ""
        parts = (self.experiment, self.variant, f"batch {self.batch_size}", self.precision, budget, *self.options)
        return ", ".join(filter(None, parts))

    @property
    def overrides(self) -> list[str]:
        """The step as overrides of `e3va benchmark-memory`."""
        method, *own = self.variant.split(":")
        budget = [f"budget={self.budget}"] if self.budget else []
        shared = [f"experiment={self.experiment}", f"data.batch_size={self.batch_size}", *budget, *self.options]
        return [*shared, f"trainer.precision={self.precision}", f"adapter={method}", *(f"adapter.{o}" for o in own)]


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of Python's, by its arguments, in which {out} is the folder of the results."""

    title: str
    arguments: tuple[str, ...]
    expected_s: int
    output: str | None = None  # a file for what it prints


def checks() -> Iterator[Step | Command]:
    """All checks, the most telling first."""
    yield Command("tests", ("-m", "pytest", "-m", "gpu", "-q", "--durations=5"), TESTS_S, "tests.txt")
    for precision in ("32", "bf16-mixed"):
        for setting in SETTINGS:
            yield from (Step(setting.experiment, variant, precision=precision) for variant in MAIN)
    yield from (Step("coco_cascade_swin_l", variant, 1, budget=CARD) for variant in ("e3va", "full"))
    for setting in SETTINGS:
        size = "{}x{}".format(*setting.image_size)
        step = ("benchmarks/step_profile.py", f"--experiment={setting.experiment}", f"--size={size}", "--batch-size=2")
        arguments = (*step, "--ways=full,frozen,e3va", f"--output={{out}}/profile_{setting.backbone}.json")
        yield Command(f"profile, {setting.experiment}", arguments, PROFILE_S)
    in_16_bits = ("backbone.dtype=bfloat16",)
    yield Step("coco_cascade_swin_l", "e3va:activations=recompute", 1, "bf16-mixed", CARD, in_16_bits)
    for setting in SETTINGS:
        yield from (Step(setting.experiment, v, 1, "16-mixed") for v in ("full", "e3va"))  # the authors' own precision
        yield Step(setting.experiment, "e3va", options=("backbone.compile=true",), expected_s=4 * MEASUREMENT_S)
    for setting in SETTINGS:
        yield from (Step(setting.experiment, method) for method in OTHERS)
    yield from (Step("ade20k_upernet_swin_l", variant) for variant in MAIN)


def configured(step: Step) -> tuple[BenchmarkMemoryConfig, BenchmarkSpec]:
    """The configuration of a step and what it shares with others."""
    config = common.composed("benchmark_memory", step.overrides, complete=False)
    return config, benchmark_spec(config)


def planned_mib(step: Step) -> float:
    """Peak memory of a step as planned, in MiB."""
    config, setting = configured(step)
    return plan(config, setting.size, num_classes=setting.num_classes).peak.total_bytes / MIB


def measured(step: Step, process: MeasuringProcess, device: str) -> Measurement:
    """Measure a step on the device, under its budget."""
    config, setting = configured(step)
    limit = setting.gpu_limit_mib
    size, classes, warmup, repeats = setting.size, setting.num_classes, setting.warmup, setting.repeats
    return process.measure(Request(config, size, classes, device, warmup, repeats, memory_limit_mib=limit))


def run_command(command: Command, out: Path, seconds: float) -> dict[str, Any]:
    """Run a command for at most `seconds`; its output is also shown."""
    arguments = [argument.format(out=out) for argument in command.arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    lines: list[str] = []
    with subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        timer.cancel()
    if command.output:
        with atomic_write(out / command.output) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
    return {"exit_code": process.returncode}


def table(rows: Sequence[tuple[Step, Measurement, float | None]]) -> Iterator[str]:
    """Markdown: a row for each measured step, beside `full` of the same experiment, batch size, precision."""
    columns = "experiment|variant|batch|precision|peak, MiB|saved|planned, MiB|gap|reserved, MiB|step, s|saved"
    yield f"| {columns.replace('|', ' | ')} |"
    yield "|---|---|--:|---|" + "--:|" * 7
    full = {_shared(step): one for step, one, _ in rows if step.variant == "full"}
    for step, one, plan_mib in rows:
        of_full = full.get(_shared(step), Measurement("", parameters={}))
        gap = plan_mib and one.peak_mib and 100 * (plan_mib / one.peak_mib - 1)
        options = " ".join((step.variant, *step.options, *((f"within {step.budget}",) if step.budget else ())))
        cells = [step.experiment, f"`{options}`", str(step.batch_size), step.precision]
        cells += [
            one.error or _number(one.peak_mib),
            _saved(one.peak_mib, of_full.peak_mib),
        ]
        cells += [_number(plan_mib), f"{gap:+.1f} %" if gap else "", _number(one.peak_reserved_mib)]
        cells += [
            _number(one.step_time_s, 4),
            _saved(one.step_time_s, of_full.step_time_s),
        ]
        yield f"| {' | '.join(cells)} |"


def _shared(step: Step) -> Step:
    """What a step is compared within."""
    return dataclasses.replace(step, variant="", options=())


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _saved(ours: float | None, full: float | None) -> str:
    saved = saved_pct(ours, full)
    return "" if not saved else f"{saved:.1f} %"


class Report:
    """The files of the results, written after each check."""

    def __init__(self, out: Path, minutes: float, device: str) -> None:
        self.out = out
        self.rows: list[tuple[Step, Measurement]] = []
        self.planned_mib: dict[Step, float] = {}
        self.summary: dict[str, Any] = {
            "device": device_name(torch.device(device)),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "versions": {**versions(), "cuda": torch.version.cuda},
            "minutes": minutes,
            "checks": {},
        }

    def note(self, title: str, outcome: dict[str, Any]) -> None:
        """Take up how a check ended."""
        self.summary["checks"][title] = outcome
        print(f"{title}: {', '.join(f'{key} {value}' for key, value in outcome.items())}", flush=True)
        self.write()

    def write(self) -> None:
        """Write what is known."""
        write_json(self.out / "summary.json", self.summary)
        rows = [(step, one, self.planned_mib.get(step)) for step, one in self.rows]
        entries = [
            {**dataclasses.asdict(step), "planned_mib": plan, **dataclasses.asdict(one), "step_time_s": one.step_time_s}
            for step, one, plan in rows
        ]
        write_json(self.out / "measurements.json", entries)
        about = [f"{self.summary['device']}, {self.summary['date']}", *map(" ".join, self.summary["versions"].items())]
        with atomic_write(self.out / "results.md") as temporary:
            temporary.write_text("\n".join([", ".join(about), "", *table(rows), ""]), encoding="utf-8")


def run(todo: Sequence[Step | Command], out: Path, minutes: float, device: str = "cuda") -> Report:
    """Run the checks until all are done or none more fits into the time; then plan what was measured."""
    ends = time.monotonic() + 60 * minutes
    report = Report(out, minutes, device)
    with MeasuringProcess() as process:
        for check in todo:
            started = time.monotonic()
            left = ends - started - PLANS_S
            if check.expected_s > left:
                report.note(check.title, {"skipped": f"{max(0, left):.0f} s were left"})
                continue
            if isinstance(check, Command):
                outcome = run_command(check, out, min(left, OVERTIME * check.expected_s))
            else:
                one = measured(check, process, device)
                report.rows.append((check, one))
                outcome = {"peak_mib": one.peak_mib, "step_time_s": one.step_time_s, "error": one.error}
            report.note(check.title, {**outcome, "seconds": round(time.monotonic() - started, 1)})
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:  # none inherits CUDA
        plans = {pool.submit(planned_mib, step): step for step, _ in report.rows}
        done, late = wait(plans, timeout=max(0.0, ends - time.monotonic()))
        for future in late:
            future.cancel()
    report.planned_mib = {plans[future]: future.result() for future in done if future.exception() is None}
    report.write()
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or list the checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, metavar="FOLDER", help="for the results")
    parser.add_argument("--minutes", type=float, default=60, help="after which nothing more is begun (default: 60)")
    parser.add_argument("--dry-run", action="store_true", help="list the checks with the seconds expected of each")
    given = parser.parse_args(arguments)
    if given.dry_run:
        total = 0
        for check in checks():
            total += check.expected_s
            mark = " " if total + PLANS_S <= 60 * given.minutes else "-"
            print(f"{mark} {total // 60:3d}:{total % 60:02d}  {check.expected_s:4d} s  {check.title}")
        print(f"\nAfter {given.minutes:g} minutes nothing more is begun: checks marked with - are skipped.")
        return 0
    if not torch.cuda.is_available():
        sys.exit("make gpu-check needs a CUDA GPU, and PyTorch finds none; `e3va benchmark-memory` plans without one")
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    name = re.sub(r"\W+", "_", torch.cuda.get_device_name())
    out = (given.out or ROOT / "benchmarks" / name / date).absolute()
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    report = run(list(checks()), out, given.minutes)
    print((out / "results.md").read_text(encoding="utf-8"))
    print(f"Results: {out}")
    return report.summary["checks"]["tests"].get("exit_code", 1)


if __name__ == "__main__":
    sys.exit(main())
