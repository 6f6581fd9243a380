"""`e3va predict`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

import torch

from e3va_cli.commands.console import as_list, console, print_passes
from e3va_cli.commands.error_handling import friendly_errors, prediction_oom_message
from e3va_cli.config.run_config import PredictConfig
from e3va_cli.data.images.formats import describe_unsupported
from e3va_cli.data.images.reading import RawImage, read_raw
from e3va_cli.errors import UserError
from e3va_cli.inference.image_inputs import find_images
from e3va_cli.inference.prediction import ImagePrediction
from e3va_cli.inference.prediction_writer import PREDICTIONS, PredictionWriter
from e3va_cli.inference.predictor import load_adapters
from e3va_cli.runs.folder import make_unique_folder
from e3va_cli.utils.terminal import TerminalProgress
from e3va_cli.utils.text import pluralize

RUNS = "runs"  # where a folder for results is made, if none is given
NAME = "%Y-%m-%d_%H-%M-%S_predict"  # of a folder for results
DEVICES = {"auto": None, "cpu": "cpu", "gpu": "cuda"}


def run(config: PredictConfig) -> None:
    """Run inference and save predictions; exit code 1 if a file could not be read."""
    files = find_images(as_list(config.input))
    if unread := describe_unsupported(file.name for file in files):
        print(f"e3va: note: input: {unread}", file=sys.stderr)
    if skipped := len(files) - sum(1 for _ in predict(config, files)):
        of_all = f"{skipped:,} of {pluralize(len(files), 'file')}"
        print(f"e3va: {of_all} skipped: not readable as images", file=sys.stderr)
        sys.exit(1)


def predict(config: PredictConfig, files: Sequence[Path]) -> Iterator[tuple[Path, dict[str, ImagePrediction]]]:
    """Run inference, save predictions, and yield those of each readable file by adapter name."""
    require_usable(config)
    with friendly_errors(Path(config.output or RUNS), prediction_oom_message):
        yield from _predict(config, files)


def _predict(config: PredictConfig, files: Sequence[Path]) -> Iterator[tuple[Path, dict[str, ImagePrediction]]]:
    device = DEVICES[config.accelerator]
    together = load_adapters(as_list(config.checkpoint), device=device, option="checkpoint", **vars(config.backbone))
    folder = Path(config.output) if config.output else make_unique_folder(Path(RUNS) / f"{datetime.now():{NAME}}")
    output = PredictionWriter(
        folder, files, together.adapters, score_threshold=config.score_threshold, save_images=config.save_images
    )
    for adapter in together.adapters:
        line = (
            f"{adapter.name}: {adapter.task}, {pluralize(len(adapter.classes), 'class', 'classes')}, of {adapter.path}"
        )
        console.print(line, markup=False)
    if len(together.adapters) > 1:
        print_passes(together.passes)
    with TerminalProgress(console=console, transient=True) as bar:
        task = bar.add_task("Predicting", total=len(files))
        for batch in batches(files, config.batch_size, output.skip):
            found = together.predict(
                [image for _, image in batch], score_threshold=config.score_threshold, batch_size=len(batch)
            )
            for (index, raw), of_adapters in zip(batch, found, strict=True):
                output.add(index, of_adapters, orientation=raw.orientation)
                yield files[index], of_adapters
            bar.update(task, completed=len(output.images) + len(output.skipped))
    output.finish()
    console.print(f"{pluralize(len(output.images), 'image')}: {folder / PREDICTIONS}", markup=False)


def require_usable(config: PredictConfig) -> None:
    """Raise UserError if there is no GPU or no checkpoint, before anything is loaded."""
    if config.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("accelerator=gpu: PyTorch sees no CUDA GPU here; use accelerator=cpu")
    if not as_list(config.checkpoint):
        raise UserError("checkpoint=[]: nothing to do; give at least one run or adapter")


def batches(
    files: Sequence[Path], size: int, skip: Callable[[int, UserError], None]
) -> Iterator[list[tuple[int, RawImage]]]:
    """Yield batches of images with their indices; `skip(index, error)` is called for each unreadable file."""
    batch: list[tuple[int, RawImage]] = []
    for index, file in enumerate(files):
        try:
            batch.append((index, read_raw(file)))
        except UserError as error:
            skip(index, error)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
