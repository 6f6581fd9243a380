"""Kill training runs with `kill -9` at random moments, and check that they resume exactly.

    python scripts/kill_trials.py                    # 30 trials on generated shapes, minutes on a CPU
    python scripts/kill_trials.py --trials 3 --seed 7

A third of the runs is killed while a checkpoint is written, a third during an evaluation, the rest at any time; each is
then resumed to its end. A trial passes if the last checkpoint is always readable, the history on disk has all its
steps, at most one checkpoint interval is lost, and the final weights, optimizer, history and results are bit for bit
those of an uninterrupted run. Exit code 1 if a trial fails.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import e3va_cli.commands.train  # noqa: F401 (imported once, so that a forked trial takes seconds)
from e3va_cli.cli import main as e3va
from e3va_cli.runs.folder import CHECKPOINTS, LAST_CHECKPOINT, METRICS, METRICS_HISTORY

FORK = multiprocessing.get_context("fork")
INTERVAL = 3
STEPS_PER_EPOCH = 8
POLL_S = 0.002
OVERRIDES = [
    f"trainer.checkpoint_every_steps={INTERVAL}",
    f"dataset.train_images={2 * STEPS_PER_EPOCH}",
    "dataset.val_images=6",
    "dataset.image_size=64",
    "dataset.train_short_sides=[64]",
    "dataset.val_short_side=64",
    "dataset.max_size=64",
    "data.batch_size=2",
    "data.val_batch_size=1",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "trainer.tensorboard=false",
    "num_visualizations=0",
]
console = Console(highlight=False, markup=False, soft_wrap=True)
State = dict[str, Any]


class TrialError(Exception):
    """A trial failed."""


@dataclass
class Trial:
    """One run, killed and resumed.

    Attributes:
        killed: key of `MOMENTS`.
        logged: steps in the history when killed.
        resumed_from: step of the checkpoint.
        half_written: whether a file was being written.
        failure: error message, empty if the trial passed.
    """

    killed: str
    logged: int = 0
    resumed_from: int = 0
    half_written: bool = False
    failure: str = ""


class Run:
    """A run of `e3va train` in a separate process."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder, self.last = folder, folder / CHECKPOINTS / LAST_CHECKPOINT
        self.log = folder.with_suffix(".log")
        self.process = FORK.Process(target=_train, args=([*overrides, f"hydra.run.dir={folder}"], self.log))
        self.process.start()

    def kill(self) -> None:
        """Send SIGKILL and wait."""
        self.process.kill()
        self.process.join()

    def finish(self) -> None:
        """Wait for the end.

        Raises:
            TrialError: the exit code is not 0.
        """
        self.process.join()
        if self.process.exitcode != 0:
            raise TrialError(f"exit code {self.process.exitcode}, see {self.log}")

    def states(self) -> Iterator[State]:
        """Yield the last checkpoint again and again while the process runs."""
        while self.process.is_alive():
            if self.last.exists():
                yield read(self.last)
            time.sleep(POLL_S)

    def writes(self) -> Iterator[Path]:
        """Yield each temporary file of the checkpoints while the process runs."""
        seen: set[int] = set()
        while self.process.is_alive():
            with suppress(FileNotFoundError):
                for entry in os.scandir(self.last.parent):
                    if entry.name.endswith(".tmp") and entry.inode() not in seen:
                        seen.add(entry.inode())
                        yield Path(entry.path)


def _train(overrides: list[str], log: Path) -> None:
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["e3va", "train", *overrides]
    e3va()


def read(path: Path) -> State:
    """Return a checkpoint.

    Raises:
        TrialError: it cannot be read.
    """
    try:
        state: State = torch.load(path, weights_only=True)
    except Exception as error:  # torch.load raises pickle, zip, EOF, OS and runtime errors
        raise TrialError(f"{path.name} cannot be read: {error}") from error
    return state


def history(folder: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv without resources."""
    with suppress(FileNotFoundError), (folder / METRICS_HISTORY).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
        return [{k: v for k, v in row.items() if not k.startswith("resources/")} for row in rows]
    return []


def evaluates(state: State) -> bool:
    """Return whether the checkpoint was saved at the start of an evaluation."""
    progress = state["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["current"]
    return bool(progress["started"] == 1 and progress["processed"] == 0)


# When a run is killed: each function returns at that moment.


def anywhere(run: Run, rng: random.Random, seconds: float) -> None:
    """Wait for a random moment after the first checkpoint."""
    end = None
    for _ in run.states():
        end = end or time.monotonic() + rng.uniform(0, seconds)
        if time.monotonic() > end:
            return


def in_a_write(run: Run, rng: random.Random, seconds: float) -> None:
    """Wait until a random checkpoint is being written."""
    wanted = rng.randrange(1, 11)
    for number, _ in enumerate(run.writes(), start=1):
        if number == wanted:
            time.sleep(rng.uniform(0, 0.01))
            return


def in_an_evaluation(run: Run, rng: random.Random, seconds: float) -> None:
    """Wait for a random moment of the first or the second evaluation."""
    wanted = STEPS_PER_EPOCH * rng.randrange(1, 3)
    for state in run.states():
        if evaluates(state) and state["global_step"] == wanted:
            time.sleep(rng.uniform(0, 0.3))
            return


MOMENTS: dict[str, Callable[[Run, random.Random, float], None]] = {
    "anywhere": anywhere,
    "in a write": in_a_write,
    "in an evaluation": in_an_evaluation,
}


def try_once(trial: Trial, folder: Path, reference: Path, rng: random.Random, seconds: float, *overrides: str) -> None:
    """Kill a run, resume it, and compare it with the reference.

    Raises:
        TrialError: the trial failed.
    """
    run = Run(folder, *OVERRIDES, *overrides)
    MOMENTS[trial.killed](run, rng, seconds)
    run.kill()
    rows = history(folder)
    trial.logged = len(rows)
    trial.resumed_from = read(run.last)["global_step"] if run.last.exists() else 0  # killed before the first one
    trial.half_written = bool(list(run.last.parent.glob(".*.tmp")))
    if [row["step"] for row in rows[: trial.resumed_from]] != [str(step) for step in range(trial.resumed_from)]:
        raise TrialError(f"the history lacks steps before the checkpoint's, {trial.resumed_from}")
    if trial.logged - trial.resumed_from > INTERVAL:
        raise TrialError(f"lost steps {trial.logged} to {trial.resumed_from}")
    resumed = Run(folder, f"resume={folder}", *overrides)
    for _ in resumed.states():
        pass
    resumed.finish()
    compare(folder, reference)


def compare(folder: Path, reference: Path) -> None:
    """Compare the files of two runs.

    Raises:
        TrialError: they differ.
    """
    ours, theirs = (read(path / CHECKPOINTS / LAST_CHECKPOINT) for path in (folder, reference))
    for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        try:
            torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)
        except AssertionError as error:
            raise TrialError(f"different {part}: {error}") from error
    if history(folder) != history(reference):
        raise TrialError("different history")
    results = [json.loads((place / METRICS).read_text(encoding="utf-8")) for place in (folder, reference)]
    if results[0] != results[1]:
        raise TrialError("different results")
    left = [path.name for path in folder.rglob(".*.tmp")]
    if left:
        raise TrialError(f"temporary files: {', '.join(left)}")


def table_of(trials: list[Trial]) -> Table:
    """Return a table with a row per trial."""
    table = Table(box=SIMPLE_HEAD)
    for column in ("trial", "killed", "steps logged", "resumed from", "file half written", "passed"):
        table.add_column(column, justify="left" if column in ("killed", "passed") else "right")
    for number, trial in enumerate(trials, start=1):
        half = "yes" if trial.half_written else ""
        passed = trial.failure or "yes"
        table.add_row(str(number), trial.killed, str(trial.logged), str(trial.resumed_from), half, passed)
    return table


def main() -> None:
    """Run the trials and print their results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    torch.set_num_threads(1)  # a process that has used OpenMP's threads hangs after a fork
    with tempfile.TemporaryDirectory(prefix="kill_trials_") as place:
        reference = Path(place) / "reference"
        started = time.monotonic()
        Run(reference, *OVERRIDES).finish()
        seconds = time.monotonic() - started
        console.print(f"A run of {2 * STEPS_PER_EPOCH} steps and 2 evaluations takes {seconds:.1f} s")
        trials = []
        for number in range(options.trials):
            trial = Trial(list(MOMENTS)[number % len(MOMENTS)])
            workers = f"data.num_workers={number // len(MOMENTS) % 2}"
            try:
                try_once(trial, Path(place) / f"trial_{number + 1}", reference, rng, seconds, workers)
            except TrialError as failure:
                trial.failure = str(failure)
            trials.append(trial)
            console.print(f"Trial {number + 1} of {options.trials}, killed {trial.killed}: {trial.failure or 'passed'}")
    console.print(table_of(trials))
    passed = sum(not trial.failure for trial in trials)
    half, most = sum(trial.half_written for trial in trials), max(trial.logged - trial.resumed_from for trial in trials)
    console.print(
        f"{passed} of {len(trials)} passed; {half} were killed while a file was written; at most {most} logged steps "
        f"were repeated, with a checkpoint every {INTERVAL}"
    )
    sys.exit(0 if passed == len(trials) else 1)


if __name__ == "__main__":
    main()
