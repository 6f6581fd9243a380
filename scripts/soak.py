"""Check that memory, open files and threads of a long run on generated data do not grow.

    python scripts/soak.py                       # 2,000 steps, an evaluation every 200
    python scripts/soak.py --steps 20000 --every 1000 --overrides head=retinanet trainer.precision=bf16-mixed

Runs `e3va train` in a separate process and samples it in /proc (Linux only). The first two intervals between
evaluations are warm-up. From the first interval after it to the last, the median of open files and of threads must not
rise, and a line fitted to the process's private memory must not rise by more than `--bound` MiB per 1,000 steps.
Prints a table and the result, after Ctrl-C too; exit code 1 on growth or if the run fails.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from e3va_cli.config.overrides import to_override_value

WARMUP_INTERVALS = 2
BOUND_MIB = 4.0  # per 1,000 steps
BATCH = 1
SMALLEST = [
    f"data.batch_size={BATCH}",
    f"data.val_batch_size={BATCH}",
    "dataset.val_images=10",
    "dataset.image_size=64",
    "dataset.train_short_sides=[64]",
    "dataset.val_short_side=64",
    "dataset.max_size=64",
    "trainer.accelerator=cpu",
]


@dataclass(frozen=True)
class Sample:
    """A process at a moment.

    Attributes:
        step: last training step in the history.
        rss_mib: resident memory in MiB (2^20 bytes), mapped files included.
        private_mib: anonymous part of it.
        files: open file descriptors.
        threads: number of threads.
    """

    step: int
    rss_mib: float
    private_mib: float
    files: int
    threads: int


def sample(pid: int, step: int) -> Sample | None:
    """Return a sample of a process, None if it has ended."""
    process = Path("/proc") / str(pid)
    try:
        lines = [line.split() for line in (process / "status").read_text(encoding="utf-8").splitlines()]
        status = {fields[0]: int(fields[1]) for fields in lines if fields[0] in ("VmRSS:", "RssAnon:", "Threads:")}
        files = len(list((process / "fd").iterdir()))
        return Sample(step, status["VmRSS:"] / 1024, status["RssAnon:"] / 1024, files, status["Threads:"])
    except (FileNotFoundError, ProcessLookupError, PermissionError, KeyError):  # a zombie has no memory left
        return None


def last_step(history: Path) -> int:
    """Return the last step in a `metrics.csv`, 0 if there is none."""
    if not history.is_file():
        return 0
    with history.open(encoding="utf-8", newline="") as file:
        return max((int(row["step"]) for row in csv.DictReader(file) if row["step"]), default=0)


def watch(process: subprocess.Popen[str], history: Path, interval_s: float) -> list[Sample]:
    """Return samples of a process until it ends or Ctrl-C."""
    samples = []
    try:
        while process.poll() is None:
            if current := sample(process.pid, last_step(history)):
                samples.append(current)
            time.sleep(interval_s)
    except KeyboardInterrupt:
        process.wait()
    return [one for one in samples if one.step < samples[-1].step]  # without the end of the program


def group_by_interval(samples: Sequence[Sample], every: int) -> dict[int, list[Sample]]:
    """Return the samples of each interval between evaluations, by its index."""
    intervals: dict[int, list[Sample]] = {}
    for one in samples:
        intervals.setdefault(one.step // every, []).append(one)
    return intervals


def growth(samples: Sequence[Sample], every: int, bound_mib: float) -> tuple[list[str], list[str]]:
    """Return a line per quantity after the warm-up, and those lines that show growth.

    Raises:
        ValueError: the run is too short.
    """
    intervals = group_by_interval([one for one in samples if one.step >= WARMUP_INTERVALS * every], every)
    if len(intervals) < 2:
        raise ValueError(
            f"fewer than two intervals of {every} steps after the {WARMUP_INTERVALS} of warm-up: nothing to compare"
        )
    settled = [one for interval in intervals.values() for one in interval]
    slope = 1000 * np.polyfit([one.step for one in settled], [one.private_mib for one in settled], 1)[0]
    lines = [f"private memory: {slope:+.2f} MiB per 1,000 steps (bound {bound_mib:g})"]
    grown = lines[:] if slope > bound_mib else []
    first, last = intervals[min(intervals)], intervals[max(intervals)]
    for name in ("files", "threads"):
        before, after = (statistics.median(getattr(one, name) for one in interval) for interval in (first, last))
        lines.append(f"{name}: {before:g} to {after:g}")
        grown += lines[-1:] if after > before else []
    return lines, grown


def table(samples: Sequence[Sample], every: int) -> str:
    """Return a Markdown table of the medians of each interval, and the maximum of files and threads."""
    lines = [
        "| steps | samples | memory, MiB | private, MiB | files, max | threads, max |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for number, interval in sorted(group_by_interval(samples, every).items()):
        rss, private = (
            statistics.median(getattr(one, name) for one in interval) for name in ("rss_mib", "private_mib")
        )
        counts = []
        for name in ("files", "threads"):
            values = [getattr(one, name) for one in interval]
            counts.append(f"{statistics.median(values):g}, {max(values)}")
        span = f"{number * every:,} to {(number + 1) * every:,}"
        lines.append(f"| {span} | {len(interval)} | {rss:,.1f} | {private:,.1f} | {' | '.join(counts)} |")
    return "\n".join(lines)


def command(steps: int, every: int, overrides: Sequence[str], folder: Path) -> list[str]:
    """Return the command `e3va train` with an evaluation after every `every` steps."""
    length = [f"dataset.train_images={BATCH * every}", f"trainer.max_epochs={steps // every}"]
    run_dir = f"hydra.run.dir={to_override_value(str(folder))}"
    return [sys.executable, "-m", "e3va_cli", "train", *SMALLEST, *length, *overrides, run_dir]


def main() -> None:
    """Run, sample and print the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=200, help="steps between evaluations")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between samples")
    parser.add_argument("--bound", type=float, default=BOUND_MIB, help="MiB per 1,000 steps")
    parser.add_argument("--overrides", nargs="*", default=[], help="options of e3va train")
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        run, log = Path(scratch) / "run", Path(scratch) / "output.txt"
        with log.open("w", encoding="utf-8") as output:
            arguments = command(options.steps, options.every, options.overrides, run)
            process = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT, text=True)
            samples = watch(process, run / "metrics.csv", options.interval)
        if process.returncode not in (0, 130):
            text = log.read_text(encoding="utf-8")
            sys.exit(f"the run ended with exit code {process.returncode}:\n{text[-2000:]}")
        steps = last_step(run / "metrics.csv") + 1
    print(table(samples, options.every))
    print(f"\n{steps:,} steps in {time.perf_counter() - started:,.0f} s, {len(samples):,} samples")
    try:
        lines, grown = growth(samples, options.every, options.bound)
    except ValueError as error:
        sys.exit(str(error))
    print("After the warm-up:", *lines, sep="\n  ")
    print("Growth: " + "; ".join(grown) if grown else "No growth.")
    sys.exit(1 if grown else 0)


if __name__ == "__main__":
    main()
