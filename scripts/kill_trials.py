"""Kill training runs with `kill -9` at any moment, and see whether they go on as if nothing had happened.

    python scripts/kill_trials.py                    # 30 trials on generated shapes, some minutes on a CPU
    python scripts/kill_trials.py --trials 3 --seed 7

A third of the runs is killed while a checkpoint is being written, a third during an evaluation, the rest anywhere;
each is then resumed and ends. A trial holds if the last checkpoint could be read at every moment, the history on disk
reached up to it, not more than a checkpoint's interval was lost, and weights, optimizer, history and results are in the
end, bit for bit, those of a run that was never killed. Exit code 1 if one does not hold.
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

import e3va_cli.commands.train  # noqa: F401 (all that a run needs is loaded once, so that a trial takes seconds)
from e3va_cli.cli import main as e3va
from e3va_cli.runs.folder import CHECKPOINTS, LAST, METRICS, METRICS_HISTORY

FORK = multiprocessing.get_context("fork")
INTERVAL = 3
STEPS_PER_EPOCH = 8
LOOK_EVERY_S = 0.002
WORDS = [
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


class BrokenPromiseError(Exception):
    """What a trial was to show does not hold."""


@dataclass
class Trial:
    """One run, killed and resumed.

    Attributes:
        killed: where, in words.
        logged: steps in the history at that moment.
        kept: step of the checkpoint that it goes on from.
        half_written: whether it was killed within the writing of a file.
        failure: what does not hold, or nothing.
    """

    killed: str
    logged: int = 0
    kept: int = 0
    half_written: bool = False
    failure: str = ""


class Run:
    """A run of `e3va train` in a process of its own."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.folder, self.last = folder, folder / CHECKPOINTS / LAST
        self.log = folder.with_suffix(".log")
        self.process = FORK.Process(target=_train, args=([*words, f"hydra.run.dir={folder}"], self.log))
        self.process.start()

    def kill(self) -> None:
        """With signal 9, which leaves no time for anything."""
        self.process.kill()
        self.process.join()

    def finish(self) -> None:
        """Wait for the end, which must be a good one."""
        self.process.join()
        if self.process.exitcode != 0:
            raise BrokenPromiseError(f"exit code {self.process.exitcode}, see {self.log}")

    def states(self) -> Iterator[State]:
        """The last checkpoint, read again and again for as long as the run lives."""
        while self.process.is_alive():
            if self.last.exists():
                yield read(self.last)
            time.sleep(LOOK_EVERY_S)

    def writes(self) -> Iterator[Path]:
        """Each file that is being written, by the name that it has until it is whole."""
        seen: set[int] = set()
        while self.process.is_alive():
            with suppress(FileNotFoundError):
                for entry in os.scandir(self.last.parent):
                    if entry.name.endswith(".tmp") and entry.inode() not in seen:
                        seen.add(entry.inode())
                        yield Path(entry.path)


def _train(words: list[str], log: Path) -> None:
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["e3va", "train", *words]
    e3va()


def read(path: Path) -> State:
    """A checkpoint, which must be readable whenever it is there."""
    try:
        state: State = torch.load(path, weights_only=True)
    except Exception as error:  # torch.load raises pickle, zip, EOF, OS and runtime errors
        raise BrokenPromiseError(f"{path.name} could not be read: {error}") from error
    return state


def history(folder: Path) -> list[dict[str, str]]:
    """The rows on disk, without what is measured in time or memory."""
    with suppress(FileNotFoundError), (folder / METRICS_HISTORY).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
        return [{k: v for k, v in row.items() if not k.startswith("resources/")} for row in rows]
    return []


def evaluates(state: State) -> bool:
    """Whether this is the checkpoint that an evaluation begins with."""
    progress = state["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["current"]
    return bool(progress["started"] == 1 and progress["processed"] == 0)


# Where a run is killed; each returns once the moment has come.


def anywhere(run: Run, chance: random.Random, seconds: float) -> None:
    """At any moment from the first checkpoint on."""
    end = None
    for _ in run.states():
        end = end or time.monotonic() + chance.uniform(0, seconds)
        if time.monotonic() > end:
            return


def in_a_write(run: Run, chance: random.Random, seconds: float) -> None:
    """While one of the run's checkpoints is being written."""
    wanted = chance.randrange(1, 11)
    for number, _ in enumerate(run.writes(), start=1):
        if number == wanted:
            time.sleep(chance.uniform(0, 0.01))
            return


def in_an_evaluation(run: Run, chance: random.Random, seconds: float) -> None:
    """Somewhere within the first or the second evaluation."""
    wanted = STEPS_PER_EPOCH * chance.randrange(1, 3)
    for state in run.states():
        if evaluates(state) and state["global_step"] == wanted:
            time.sleep(chance.uniform(0, 0.3))
            return


MOMENTS: dict[str, Callable[[Run, random.Random, float], None]] = {
    "anywhere": anywhere,
    "in a write": in_a_write,
    "in an evaluation": in_an_evaluation,
}


def try_once(trial: Trial, folder: Path, reference: Path, chance: random.Random, seconds: float, *words: str) -> None:
    """Kill a run and resume it.

    Raises:
        BrokenPromiseError: something does not hold.
    """
    run = Run(folder, *WORDS, *words)
    MOMENTS[trial.killed](run, chance, seconds)
    run.kill()
    rows = history(folder)
    trial.logged = len(rows)
    trial.kept = read(run.last)["global_step"] if run.last.exists() else 0  # killed before there was one
    trial.half_written = bool(list(run.last.parent.glob(".*.tmp")))
    if [row["step"] for row in rows[: trial.kept]] != [str(step) for step in range(trial.kept)]:
        raise BrokenPromiseError(f"the history lacks steps before the checkpoint's, {trial.kept}")
    if trial.logged - trial.kept > INTERVAL:
        raise BrokenPromiseError(f"goes back from step {trial.logged} to {trial.kept}")
    resumed = Run(folder, f"resume={folder}", *words)
    for _ in resumed.states():
        pass
    resumed.finish()
    compare(folder, reference)


def compare(folder: Path, reference: Path) -> None:
    """Check that two runs have come to the same.

    Raises:
        BrokenPromiseError: they differ.
    """
    ours, theirs = (read(path / CHECKPOINTS / LAST) for path in (folder, reference))
    for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        try:
            torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)
        except AssertionError as error:
            raise BrokenPromiseError(f"other {part}: {error}") from error
    if history(folder) != history(reference):
        raise BrokenPromiseError("another history")
    results = [json.loads((place / METRICS).read_text(encoding="utf-8")) for place in (folder, reference)]
    if results[0] != results[1]:
        raise BrokenPromiseError("other results")
    left = [path.name for path in folder.rglob(".*.tmp")]
    if left:
        raise BrokenPromiseError(f"left behind: {', '.join(left)}")


def table_of(trials: list[Trial]) -> Table:
    """A row for each trial."""
    table = Table(box=SIMPLE_HEAD)
    for column in ("trial", "killed", "steps logged", "goes on from", "a file half written", "holds"):
        table.add_column(column, justify="left" if column in ("killed", "holds") else "right")
    for number, trial in enumerate(trials, start=1):
        half = "yes" if trial.half_written else ""
        holds = trial.failure or "yes"
        table.add_row(str(number), trial.killed, str(trial.logged), str(trial.kept), half, holds)
    return table


def main() -> None:
    """Run the trials and print what became of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments, as far as a clock lets them be repeated")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="kill_trials_") as place:
        reference = Path(place) / "reference"
        started = time.monotonic()
        Run(reference, *WORDS).finish()
        seconds = time.monotonic() - started
        console.print(f"A run of {2 * STEPS_PER_EPOCH} steps and 2 evaluations takes {seconds:.1f} s")
        trials = []
        for number in range(options.trials):
            trial = Trial(list(MOMENTS)[number % len(MOMENTS)])
            workers = f"data.num_workers={number // len(MOMENTS) % 2}"
            try:
                try_once(trial, Path(place) / f"trial_{number + 1}", reference, chance, seconds, workers)
            except BrokenPromiseError as failure:
                trial.failure = str(failure)
            trials.append(trial)
            console.print(f"Trial {number + 1} of {options.trials}, killed {trial.killed}: {trial.failure or 'holds'}")
    console.print(table_of(trials))
    held = sum(not trial.failure for trial in trials)
    half, most = sum(trial.half_written for trial in trials), max(trial.logged - trial.kept for trial in trials)
    console.print(
        f"{held} of {len(trials)} hold; {half} were killed within the writing of a file; at most {most} logged steps "
        f"were done again, with a checkpoint every {INTERVAL}"
    )
    sys.exit(0 if held == len(trials) else 1)


if __name__ == "__main__":
    main()
