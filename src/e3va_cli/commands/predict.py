"""`e3va predict`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.progress import Progress
from torch import Tensor

from e3va_cli.commands.console import console
from e3va_cli.commands.image_inputs import find_images
from e3va_cli.commands.prediction_files import PREDICTIONS, PredictionFiles
from e3va_cli.composition import plain
from e3va_cli.errors import UserError
from e3va_cli.export.images import as_image
from e3va_cli.export.predictor import Together, load_adapters

DEVICES = {"auto": None, "cpu": "cpu", "gpu": "cuda"}


def run(cfg: DictConfig) -> None:
    """Find and draw; exit code 1 if a file could not be read."""
    config = plain(cfg)
    require_usable(config)
    files = find_images(_listed(config["input"]))
    device, option = DEVICES[config["accelerator"]], "checkpoint"
    together = load_adapters(_listed(config["checkpoint"]), device=device, option=option, **config["backbone"])
    folder = Path(config["output"]) if config["output"] else new_folder()
    output = PredictionFiles(folder, files, together.adapters, score=config["score"], pictures=config["pictures"])
    print_passes(together)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("Predicting", total=len(files))
        for batch in batches(files, config["batch_size"], output.skip):
            found = together.predict([image for _, image in batch], score=config["score"], batch_size=len(batch))
            for (index, _), of_adapters in zip(batch, found, strict=True):
                output.add(index, of_adapters)
            bar.update(task, completed=len(output.images) + len(output.skipped))
    output.finish()
    images = f"{len(output.images):,} image{'' if len(output.images) == 1 else 's'}"
    console.print(f"{images}: {folder / PREDICTIONS}", markup=False)
    if output.skipped:
        print(f"e3va: {len(output.skipped):,} of {len(files):,} files skipped, as they cannot be read", file=sys.stderr)
        sys.exit(1)


def require_usable(config: dict[str, Any]) -> None:
    """Raises UserError for values of options that cannot be used, before anything is loaded."""
    mistakes = []
    if config["score"] > 1:
        mistakes.append(f"score={config['score']}: from 0 to 1")
    if config["accelerator"] not in DEVICES:
        mistakes.append(f"accelerator={config['accelerator']}: one of {', '.join(DEVICES)}")
    elif config["accelerator"] == "gpu" and not torch.cuda.is_available():
        mistakes.append("accelerator=gpu: PyTorch sees no CUDA GPU here; use accelerator=cpu")
    if not _listed(config["checkpoint"]):
        mistakes.append("checkpoint=[]: nothing to do; give at least one run or adapter")
    if mistakes:
        raise UserError(*mistakes)


def new_folder() -> Path:
    """A folder under runs/ that is not there yet."""
    base = Path("runs") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_predict"
    path, number = base, 1
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


def print_passes(together: Together) -> None:
    """Which adapters there are, and which of them share a pass of the backbone."""
    for adapter in together.adapters:
        line = f"{adapter.name}: {adapter.task}, {len(adapter.classes)} classes, of {adapter.path}"
        console.print(line, markup=False)
    if len(together.adapters) < 2:
        return
    for adapters in together.passes:
        names = ", ".join(adapter.name for adapter in adapters)
        resize = adapters[0].resize
        sharing = "in one pass of the backbone" if len(adapters) > 1 else "a pass of its own"
        sides = f"images of short side {resize.size} and long side up to {resize.max_size}"
        how = adapters[0].alone or f"{sharing}, for {sides}"
        console.print(f"{names}: {how}", markup=False)


def batches(
    files: Sequence[Path], size: int, skip: Callable[[int, UserError], None]
) -> Iterator[list[tuple[int, Tensor]]]:
    """Images with their places in `files`, `size` at a time; `skip(index, error)` is called for what is unreadable."""
    batch: list[tuple[int, Tensor]] = []
    for index, file in enumerate(files):
        try:
            batch.append((index, as_image(file)))
        except UserError as error:
            skip(index, error)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _listed(value: Any) -> list[str]:
    return [str(one) for one in (value if isinstance(value, list) else [value])]
