"""Run the checks that need a CUDA GPU within a given time, most important first.

    make gpu-check                                  # or: python scripts/gpu_check.py [--minutes 8] [FOLDER]
    python scripts/gpu_check.py --dry-run           # list the checks and their durations; needs no GPU

Runs the tests that need a GPU; measures memory and time of a training step in both published settings and compares the
estimates; trains Swin-L with Cascade Mask R-CNN within 11 GiB; profiles a step; then measures further variants. Writes
`summary.json`, `measurements.json`, `results.md`, `tests.txt` and a profile of each setting to FOLDER, by default
`benchmarks/GPU_NAME/DATE/`. Exit code 1 if a test fails.
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
import common  # noqa: E402 (of benchmarks/)

from e3va_cli.config.run_config import BenchmarkMemoryConfig  # noqa: E402
from e3va_cli.memory.benchmark import BenchmarkSpec, benchmark_spec  # noqa: E402
from e3va_cli.memory.measure import Measurement, MeasuringProcess, Request  # noqa: E402
from e3va_cli.memory.result import saved_pct  # noqa: E402
from e3va_cli.models.adapters import METHODS  # noqa: E402
from e3va_cli.paper.published import SETTINGS  # noqa: E402
from e3va_cli.utils.environment import MIB, device_name, package_versions  # noqa: E402
from e3va_cli.utils.files import atomic_write, write_json  # noqa: E402

MAIN = ("full", "lora", "frozen", "e3va", "e3va:activations=compress", "e3va:activations=recompute")
FURTHER = tuple(method for method in METHODS if method not in MAIN)
CARD = "11GiB"
TESTS_S, MEASUREMENT_S, PROFILE_S = 160, 7, 75  # expected; checks that would end too late are skipped
OVERTIME = 1.5  # a command that takes this many times as long as expected is stopped
ESTIMATES_S = 45  # for the estimates; they come last, so that they do not slow the steps down
KEYS = {"by_category_mib": "by_kind_mib", "rois": "regions"}  # of `Measurement`, in measurements.json


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step to measure.

    Attributes:
        experiment: of `conf/experiment/`.
        variant: a method, with its options after colons.
        batch_size: images.
        precision: of `trainer.precision`.
        budget: memory limit, such as 11GiB.
        options: further overrides.
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
        """Return the printed name."""
        budget = f"within {self.budget}" if self.budget else ""
        parts = (self.experiment, self.variant, f"batch {self.batch_size}", self.precision, budget, *self.options)
        return ", ".join(filter(None, parts))

    @property
    def overrides(self) -> list[str]:
        """Return the overrides of `e3va benchmark-memory`."""
        method, *own = self.variant.split(":")
        budget = [f"budget={self.budget}"] if self.budget else []
        shared = [f"experiment={self.experiment}", f"data.batch_size={self.batch_size}", *budget, *self.options]
        return [*shared, f"trainer.precision={self.precision}", f"adapter={method}", *(f"adapter.{o}" for o in own)]


@dataclasses.dataclass(frozen=True)
class Command:
    """Arguments of a Python command; {out} is the folder of the results."""

    title: str
    arguments: tuple[str, ...]
    expected_s: int
    output: str | None = None  # file for its output


def checks() -> Iterator[Step | Command]:
    """Yield all checks, most important first."""
    yield Command("tests", ("-m", "pytest", "-m", "gpu", "-q", "-n", "4", "--durations=5"), TESTS_S, "tests.txt")
    for precision in ("32", "bf16-mixed"):
        for published in SETTINGS:
            yield from (Step(published.experiment, variant, precision=precision) for variant in MAIN)
    yield from (Step("coco_cascade_swin_l", variant, 1, budget=CARD) for variant in ("e3va", "full"))
    for published in SETTINGS:
        size = "{}x{}".format(*published.image_size)
        step = (
            "benchmarks/step_profile.py",
            f"--experiment={published.experiment}",
            f"--size={size}",
            "--batch-size=2",
        )
        arguments = (*step, "--variants=full,frozen,e3va", f"--output={{out}}/profile_{published.backbone}.json")
        yield Command(f"profile, {published.experiment}", arguments, PROFILE_S)
    in_16_bits = ("backbone.dtype=bfloat16",)
    yield Step("coco_cascade_swin_l", "e3va:activations=recompute", 1, "bf16-mixed", CARD, in_16_bits)
    for published in SETTINGS:
        yield from (Step(published.experiment, v, 1, "16-mixed") for v in ("full", "e3va"))  # the authors' precision
        yield Step(published.experiment, "e3va", options=("backbone.compile=true",), expected_s=4 * MEASUREMENT_S)
    for published in SETTINGS:
        yield from (Step(published.experiment, method) for method in FURTHER)
    yield from (Step("ade20k_upernet_swin_l", variant) for variant in MAIN)


def load_step(step: Step) -> tuple[BenchmarkMemoryConfig, BenchmarkSpec]:
    """Return the configuration and the specification of a step."""
    config = common.compose("benchmark_memory", step.overrides, complete=False)
    return config, benchmark_spec(config)


def estimated_mib(step: Step) -> float:
    """Return the estimated peak memory of a step, in MiB."""
    config, spec = load_step(step)
    return spec.estimate(config).peak.total_bytes / MIB


def measure(step: Step, process: MeasuringProcess, device: str) -> Measurement:
    """Measure a step on the device, within its budget."""
    config, spec = load_step(step)
    request = Request(config, spec.size, spec.num_classes, device, spec.warmup, spec.repeats, spec.gpu_limit_mib)
    return process.measure(request)


def run_command(command: Command, out: Path, seconds: float) -> dict[str, Any]:
    """Run a command for at most `seconds`, and print its output."""
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
    """Yield a Markdown table of the steps, with savings against `full` of the same experiment, batch and precision."""
    columns = "experiment|variant|batch|precision|peak, MiB|saved|estimated, MiB|gap|reserved, MiB|step, s|saved"
    yield f"| {columns.replace('|', ' | ')} |"
    yield "|---|---|--:|---|" + "--:|" * 7
    full = {_shared(step): one for step, one, _ in rows if step.variant == "full"}
    for step, one, estimate in rows:
        reference = full.get(_shared(step), Measurement("", parameters={}))
        gap = estimate and one.peak_mib and 100 * (estimate / one.peak_mib - 1)
        options = " ".join((step.variant, *step.options, *((f"within {step.budget}",) if step.budget else ())))
        cells = [step.experiment, f"`{options}`", str(step.batch_size), step.precision]
        cells += [
            one.error or _number(one.peak_mib),
            _saved(one.peak_mib, reference.peak_mib),
        ]
        cells += [_number(estimate), f"{gap:+.1f} %" if gap else "", _number(one.peak_reserved_mib)]
        cells += [
            _number(one.step_time_s, 4),
            _saved(one.step_time_s, reference.step_time_s),
        ]
        yield f"| {' | '.join(cells)} |"


def _shared(step: Step) -> Step:
    """Return what a step shares with its reference."""
    return dataclasses.replace(step, variant="", options=())


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _saved(value: float | None, full: float | None) -> str:
    saved = saved_pct(value, full)
    return "" if not saved else f"{saved:.1f} %"


class Report:
    """Results, written to their files after each check."""

    def __init__(self, out: Path, minutes: float, device: str) -> None:
        self.out = out
        self.rows: list[tuple[Step, Measurement]] = []
        self.estimated_mib: dict[Step, float] = {}
        self.summary: dict[str, Any] = {
            "device": device_name(torch.device(device)),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "versions": {**package_versions(), "cuda": torch.version.cuda},
            "minutes": minutes,
            "checks": {},
        }

    def note(self, title: str, outcome: dict[str, Any]) -> None:
        """Add the outcome of a check."""
        self.summary["checks"][title] = outcome
        print(f"{title}: {', '.join(f'{key} {value}' for key, value in outcome.items())}", flush=True)
        self.write()

    def write(self) -> None:
        """Write all files."""
        write_json(self.out / "summary.json", self.summary)
        rows = [(step, one, self.estimated_mib.get(step)) for step, one in self.rows]
        entries = [
            {
                **dataclasses.asdict(step),
                "planned_mib": estimate,
                **{KEYS.get(k, k): v for k, v in dataclasses.asdict(one).items()},
                "step_time_s": one.step_time_s,
            }
            for step, one, estimate in rows
        ]
        write_json(self.out / "measurements.json", entries)
        about = [f"{self.summary['device']}, {self.summary['date']}", *map(" ".join, self.summary["versions"].items())]
        with atomic_write(self.out / "results.md") as temporary:
            temporary.write_text("\n".join([", ".join(about), "", *table(rows), ""]), encoding="utf-8")


def run(todo: Sequence[Step | Command], out: Path, minutes: float, device: str = "cuda") -> Report:
    """Run the checks that fit into the time, then estimate the measured steps."""
    ends = time.monotonic() + 60 * minutes
    report = Report(out, minutes, device)
    with MeasuringProcess() as process:
        for check in todo:
            started = time.monotonic()
            left = ends - started - ESTIMATES_S
            if check.expected_s > left:
                report.note(check.title, {"skipped": f"{max(0, left):.0f} s left"})
                continue
            if isinstance(check, Command):
                outcome = run_command(check, out, min(left, OVERTIME * check.expected_s))
            else:
                one = measure(check, process, device)
                report.rows.append((check, one))
                outcome = {"peak_mib": one.peak_mib, "step_time_s": one.step_time_s, "error": one.error}
            report.note(check.title, {**outcome, "seconds": round(time.monotonic() - started, 1)})
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:  # without CUDA
        estimates = {pool.submit(estimated_mib, step): step for step, _ in report.rows}
        done, late = wait(estimates, timeout=max(0.0, ends - time.monotonic()))
        for future in late:
            future.cancel()
    report.estimated_mib = {estimates[future]: future.result() for future in done if future.exception() is None}
    report.write()
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or list the checks; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, metavar="FOLDER", help="folder of the results")
    parser.add_argument("--minutes", type=float, default=60, help="time limit (default: 60)")
    parser.add_argument("--dry-run", action="store_true", help="list the checks with their expected seconds")
    args = parser.parse_args(arguments)
    if args.dry_run:
        total = 0
        for check in checks():
            total += check.expected_s
            mark = " " if total + ESTIMATES_S <= 60 * args.minutes else "-"
            print(f"{mark} {total // 60:3d}:{total % 60:02d}  {check.expected_s:4d} s  {check.title}")
        print(f"\nChecks marked with - do not fit into {args.minutes:g} minutes and are skipped.")
        return 0
    if not torch.cuda.is_available():
        sys.exit("make gpu-check needs a CUDA GPU; `e3va benchmark-memory` estimates without one")
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    name = re.sub(r"\W+", "_", torch.cuda.get_device_name())
    out = (args.out or ROOT / "benchmarks" / name / date).absolute()
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    report = run(list(checks()), out, args.minutes)
    print((out / "results.md").read_text(encoding="utf-8"))
    print(f"Results: {out}")
    return report.summary["checks"]["tests"].get("exit_code", 1)


if __name__ == "__main__":
    sys.exit(main())
