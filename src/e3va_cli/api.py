"""Training, evaluation and prediction from Python: what `e3va train`, `e3va evaluate` and `e3va predict` do.

Options are those of the commands, as `KEY=VALUE` strings; results are dictionaries, as in a run's `metrics.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from e3va_cli.commands import evaluate as evaluate_command
from e3va_cli.commands import predict as predict_command
from e3va_cli.commands import train as train_command
from e3va_cli.commands.saved_config import validate_each
from e3va_cli.config.composition import load_config
from e3va_cli.config.quoting import quoted
from e3va_cli.evaluation import Results
from e3va_cli.inference.image_inputs import find_images
from e3va_cli.inference.prediction import ImagePrediction
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
    given = [*options] if resume is None else [f"resume={quoted(str(resume))}", *options]
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
    (overrides,) = validate_each("evaluate", [f"checkpoint={quoted(str(checkpoint))}", *options])
    place = _folder(folder, "evaluate")
    (results,) = evaluate_command.run(load_config("evaluate", overrides), folder=place).values()
    return dict(results)


def predict(
    checkpoint: str | Path, input: str | Path | Sequence[str | Path], *options: str, output: str | Path | None = None
) -> dict[Path, ImagePrediction]:
    """Run inference on images and save predictions as `e3va predict` does; return the predictions by file.

    Args:
        checkpoint: a run folder, a checkpoint in it, or an exported adapter.
        input: an image, a folder, a pattern, or a list of them; unreadable files are skipped.
        options: overrides such as `score_threshold=0.3`.
        output: folder for the results; a new one under `runs/` if not given.

    Raises:
        UserError: as `train`.
    """
    inputs = [input] if isinstance(input, str | Path) else input
    given = [f"checkpoint={quoted(str(checkpoint))}", f"input=[{','.join(quoted(str(one)) for one in inputs)}]"]
    if output is not None:
        given.append(f"output={quoted(str(output))}")
    (overrides,) = validate_each("predict", [*given, *options])
    config = load_config("predict", overrides)
    files = find_images(config.input)
    return {file: next(iter(found.values())) for file, found in predict_command.predict(config, files)}


def _folder(given: str | Path | None, command: str) -> Path:
    if given is None:
        return make_unique_folder(Path(RUNS) / f"{datetime.now():{NAME}}_{command}")
    Path(given).mkdir(parents=True, exist_ok=True)
    return Path(given)
