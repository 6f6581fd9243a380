"""Training and evaluation from Python, without a command line: what `e3va train` and `e3va evaluate` do.

Options are those of the commands, as `KEY=VALUE` strings; results are dictionaries, as in a run's `metrics.json`.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from e3va_cli.commands import evaluate as evaluate_command
from e3va_cli.commands import train as train_command
from e3va_cli.commands.saved_config import validate_each
from e3va_cli.config.composition import load_config
from e3va_cli.evaluation import Results
from e3va_cli.runs.folder import check_unused, find_checkpoint, make_unique_folder, write_overrides

RUNS = "runs"  # where a folder is made, if none is given
NAME = "%Y-%m-%d_%H-%M-%S"


def train(*options: str, folder: str | Path | None = None, resume: str | Path | None = None) -> Results | None:
    """Train as `e3va train` does, in this process, and return the results of the last evaluation.

        results = e3va_cli.train("dataset=coco", "dataset.root=DATA", "backbone=swin_t", folder="runs/mine")

    Args:
        options: overrides such as `adapter.rank=8`.
        folder: the run folder, which holds what `e3va train` writes; a new one under `runs/` if not given.
        resume: a run folder or a checkpoint in it, to go on with.

    Returns:
        Such as `{"box": {"AP": ..., "AP50": ...}, "mask": {...}}`; None where nothing was evaluated.

    Raises:
        UserError: an option, data, weights or the folder cannot be used; it says what to do.
    """
    given = [*options] if resume is None else [f"resume='{resume}'", *options]
    (overrides,) = validate_each("train", given)
    place = (
        _folder(folder, "train") if resume is None or folder is not None else find_checkpoint(str(resume), "resume")[0]
    )
    check_unused(place, None if resume is None else find_checkpoint(str(resume), "resume")[0])
    if resume is None:
        write_overrides(place, given)
    return train_command.run(load_config("train", overrides), folder=place)


def evaluate(checkpoint: str | Path, *options: str, folder: str | Path | None = None) -> Results:
    """Measure a run, a checkpoint in it or an exported adapter as `e3va evaluate` does, and return the results.

    Args:
        checkpoint: what to measure.
        options: overrides such as `dataset.root=DATA`, on top of the run's own.
        folder: that the results are written to; a new one under `runs/` if not given.

    Raises:
        UserError: as `train`.
    """
    (overrides,) = validate_each("evaluate", [f"checkpoint='{checkpoint}'", *options])
    place = _folder(folder, "evaluate")
    (results,) = evaluate_command.run(load_config("evaluate", overrides), folder=place).values()
    return dict(results)


def _folder(given: str | Path | None, command: str) -> Path:
    if given is None:
        return make_unique_folder(Path(RUNS) / f"{datetime.now():{NAME}}_{command}")
    Path(given).mkdir(parents=True, exist_ok=True)
    return Path(given)
