"""Out-of-memory and full-disk errors as one line that says what to do."""

from __future__ import annotations

import os
import resource
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L  # noqa: N812 (Lightning's own alias)
import torch
from torch._dynamo.exc import TorchDynamoException

from e3va_cli.commands.data_loading import loading_failure
from e3va_cli.commands.memory_check import peak_mib, run_spec, what_would_fit
from e3va_cli.config.run_config import RunConfig
from e3va_cli.errors import UserError, first_line
from e3va_cli.memory.benchmark import free_mib
from e3va_cli.training.lightning_module import DenseLightningModule
from e3va_cli.utils.environment import MIB, is_out_of_memory, process_peak_rss_mib
from e3va_cli.utils.files import UNWRITABLE, UnwritableError

MARGIN = 0.9  # of the estimate, where a step ran out of memory although the estimate fits


@contextmanager
def friendly_errors(
    folder: Path, oom_message: Callable[[str], str], *, then: Callable[[], str] = str
) -> Iterator[None]:
    """Convert out-of-memory, full-disk, data-loading and compilation errors to a `UserError`.

    Args:
        folder: folder that the command writes to.
        oom_message: makes the message of an out-of-memory error from the first line of PyTorch's.
        then: appended to the message on a file that cannot be written: how to continue.
    """
    threading.excepthook = _without_unwritable
    try:
        yield
    except Exception as error:  # others are raised again
        loading = loading_failure(error)
        if loading is not None:
            raise UserError(loading) from error
        if is_out_of_memory(error):
            raise UserError(oom_message(first_line(error))) from error
        if isinstance(error, TorchDynamoException):
            raise UserError(
                f"backbone.compile=true: PyTorch could not compile on this machine ({first_line(error)}); use "
                "backbone.compile=false"
            ) from error
        if isinstance(error, OSError) and (error.errno in UNWRITABLE or _lies_in(error, folder)):
            error = UnwritableError(_place(error) or folder, error)
        if isinstance(error, UnwritableError):
            raise UserError(*(f"{message}{then()}" for message in error.messages)) from error
        raise
    finally:
        threading.excepthook = threading.__excepthook__


def _place(error: OSError) -> Path | None:
    return None if error.filename is None else Path(os.fsdecode(error.filename))


def _lies_in(error: OSError, folder: Path) -> bool:
    """Return whether the file of an error is in a folder, even if it no longer exists."""
    place = _place(error)
    return place is not None and place.absolute().is_relative_to(folder.absolute())


def _without_unwritable(arguments: threading.ExceptHookArgs) -> None:
    """Ignore write errors in the thread of TensorBoard, which reports them to the main thread too."""
    is_tensorboard = type(arguments.thread).__module__.startswith("tensorboard")
    if not (isinstance(arguments.exc_value, OSError) and is_tensorboard):
        threading.__excepthook__(arguments)


def training_oom_message(config: RunConfig, trainer: L.Trainer, task: DenseLightningModule, what: str) -> str:
    """Return the message of an out-of-memory error: the step, its images, the estimate, and what would fit.

    By now Lightning has moved the model from its device, and no longer knows whether it was evaluating.
    """
    sizes = describe_sizes(task.batch_records[-1].image_sizes if task.batch_records else [])
    if task.evaluating:
        return evaluation_oom_message(what, f" after step {trainer.global_step:,}, with images of {sizes}")
    spec = run_spec(config)
    estimate, available = peak_mib(config, spec), available_mib(trainer.strategy.root_device)
    height, width = spec.size.image_size
    remedies = what_would_fit(config, spec, min(available, MARGIN * estimate))
    hint = ", or ".join(remedies) if remedies else "a smaller dataset.max_size"
    return (
        f"out of memory in step {trainer.global_step:,}, with images of {sizes} ({what}); estimate "
        f"{estimate:.0f} MiB at the largest image, {height}x{width}; {available:.0f} MiB were available; "
        f"would fit: {hint}; for a rare batch of unusual size: trainer.skip_oom=true"
    )


def evaluation_oom_message(what: str, where: str = "") -> str:
    """Return the message of an out-of-memory error in an evaluation."""
    return f"out of memory in the evaluation{where} ({what}); use data.val_batch_size=1 or a smaller dataset.max_size"


def prediction_oom_message(what: str) -> str:
    """Return the message of an out-of-memory error in a prediction."""
    return f"out of memory ({what}); use batch_size=1, accelerator=cpu or smaller images"


def describe_sizes(sizes: list[tuple[int, int]]) -> str:
    """Format heights and widths, each once with its count."""
    counts = Counter(f"{height}x{width}" for height, width in sizes)
    return ", ".join(f"{size} ({count} of them)" if count > 1 else size for size, count in counts.items())


def available_mib(device: torch.device) -> float:
    """Return the memory in MiB that this process uses or could have used."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return (free + torch.cuda.memory_reserved(device)) / MIB
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    total = free_mib() + process_peak_rss_mib()
    return total if limit == resource.RLIM_INFINITY else min(total, limit / MIB)
