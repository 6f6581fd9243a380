"""A long run on the generated data, watched from outside: do its memory, open files and threads grow?

    python scripts/soak.py                       # 2,000 steps, an evaluation every 200
    python scripts/soak.py --steps 20000 --every 1000 --words head=retinanet trainer.precision=bf16-mixed

Runs `e3va train` as a process of its own and samples it in /proc (so on Linux alone), some times in each part of the
run between two evaluations. The first two parts are warm-up: the data are drawn, libraries loaded, the allocator finds
its size. After them the median of open files and of threads must not rise from the first part to the last, and the
line through all samples of the process's own memory must not rise by more than `--bound` MiB per 1,000 steps.
Prints a table and the verdict, after Ctrl-C too; exit code 1 on growth or if the run fails.
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

from e3va_cli.utils.command_line import to_override_value

WARMUP_PARTS = 2
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
        step: of training, the last that is in the history.
        rss_mib: its physical memory in MiB (2^20 bytes), libraries and other mapped files included.
        own_mib: of that, what it has allocated.
        files: open ones, sockets and pipes included.
        threads: all of them.
    """

    step: int
    rss_mib: float
    own_mib: float
    files: int
    threads: int


def sample(pid: int, step: int) -> Sample | None:
    """Look at a process; None once it has ended."""
    process = Path("/proc") / str(pid)
    try:
        lines = [line.split() for line in (process / "status").read_text(encoding="utf-8").splitlines()]
        status = {words[0]: int(words[1]) for words in lines if words[0] in ("VmRSS:", "RssAnon:", "Threads:")}
        files = len(list((process / "fd").iterdir()))
        return Sample(step, status["VmRSS:"] / 1024, status["RssAnon:"] / 1024, files, status["Threads:"])
    except (FileNotFoundError, ProcessLookupError, PermissionError, KeyError):  # a zombie has no memory left
        return None


def last_step(history: Path) -> int:
    """The last step in a `metrics.csv`; 0 where there is none yet."""
    if not history.is_file():
        return 0
    with history.open(encoding="utf-8", newline="") as file:
        return max((int(row["step"]) for row in csv.DictReader(file) if row["step"]), default=0)


def watch(process: subprocess.Popen[str], history: Path, interval_s: float) -> list[Sample]:
    """Samples of a process until it ends, or until Ctrl-C ends both."""
    samples = []
    try:
        while process.poll() is None:
            if found := sample(process.pid, last_step(history)):
                samples.append(found)
            time.sleep(interval_s)
    except KeyboardInterrupt:
        process.wait()
    return [one for one in samples if one.step < samples[-1].step]  # of training, not of the end of the program


def in_parts(samples: Sequence[Sample], every: int) -> dict[int, list[Sample]]:
    """The samples between two evaluations, by number of the part from 0."""
    parts: dict[int, list[Sample]] = {}
    for one in samples:
        parts.setdefault(one.step // every, []).append(one)
    return parts


def growth(samples: Sequence[Sample], every: int, bound_mib: float) -> tuple[list[str], list[str]]:
    """What was found after the warm-up, and what of it is growth; a line each.

    Raises:
        ValueError: the run is too short to tell.
    """
    parts = in_parts([one for one in samples if one.step >= WARMUP_PARTS * every], every)
    if len(parts) < 2:
        raise ValueError(f"no two parts of {every} steps after the warm-up of {WARMUP_PARTS}: nothing to compare")
    settled = [one for part in parts.values() for one in part]
    slope = 1000 * np.polyfit([one.step for one in settled], [one.own_mib for one in settled], 1)[0]
    found = [f"own memory: {slope:+.2f} MiB per 1,000 steps (bound {bound_mib:g})"]
    grown = found[:] if slope > bound_mib else []
    first, last = parts[min(parts)], parts[max(parts)]
    for name in ("files", "threads"):
        before, after = (statistics.median(getattr(one, name) for one in part) for part in (first, last))
        found.append(f"{name}: {before:g}, then {after:g}")
        grown += found[-1:] if after > before else []
    return found, grown


def table(samples: Sequence[Sample], every: int) -> str:
    """Markdown: medians of each part of the run, and the most files and threads."""
    lines = ["| steps | samples | memory, MiB | own, MiB | files, most | threads, most |", "|---|--:|--:|--:|--:|--:|"]
    for number, part in sorted(in_parts(samples, every).items()):
        rss, own = (statistics.median(getattr(one, name) for one in part) for name in ("rss_mib", "own_mib"))
        counts = []
        for name in ("files", "threads"):
            values = [getattr(one, name) for one in part]
            counts.append(f"{statistics.median(values):g}, {max(values)}")
        span = f"{number * every:,} to {(number + 1) * every:,}"
        lines.append(f"| {span} | {len(part)} | {rss:,.1f} | {own:,.1f} | {' | '.join(counts)} |")
    return "\n".join(lines)


def command(steps: int, every: int, words: Sequence[str], folder: Path) -> list[str]:
    """`e3va train` with an evaluation after every `every` steps."""
    length = [f"dataset.train_images={BATCH * every}", f"trainer.max_epochs={steps // every}"]
    place = f"hydra.run.dir={to_override_value(str(folder))}"
    return [sys.executable, "-m", "e3va_cli", "train", *SMALLEST, *length, *words, place]


def main() -> None:
    """Run, watch, tell."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=200, help="steps between two evaluations")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two samples")
    parser.add_argument("--bound", type=float, default=BOUND_MIB, help="MiB per 1,000 steps")
    parser.add_argument("--words", nargs="*", default=[], help="further options of e3va train")
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        run, log = Path(scratch) / "run", Path(scratch) / "output.txt"
        with log.open("w", encoding="utf-8") as output:
            words = command(options.steps, options.every, options.words, run)
            process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, text=True)
            samples = watch(process, run / "metrics.csv", options.interval)
        if process.returncode not in (0, 130):
            said = log.read_text(encoding="utf-8")
            sys.exit(f"the run ended with exit code {process.returncode}:\n{said[-2000:]}")
        steps = last_step(run / "metrics.csv") + 1
    print(table(samples, options.every))
    print(f"\n{steps:,} steps in {time.perf_counter() - started:,.0f} s, {len(samples):,} samples")
    try:
        found, grown = growth(samples, options.every, options.bound)
    except ValueError as error:
        sys.exit(str(error))
    print("After the warm-up:", *found, sep="\n  ")
    print("GROWS: " + "; ".join(grown) if grown else "Nothing grows.")
    sys.exit(1 if grown else 0)


if __name__ == "__main__":
    main()
