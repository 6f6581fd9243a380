"""Loader processes: a warning about shared memory before a run, and their failures as one line."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from pathlib import Path
from typing import cast

from e3va_cli import data
from e3va_cli.commands.memory_check import run_spec
from e3va_cli.config.run_config import RunConfig
from e3va_cli.errors import first_line
from e3va_cli.models.heads import HEADS
from e3va_cli.utils.environment import MIB, is_out_of_memory

SHARED_MEMORY = Path("/dev/shm")  # on Linux
MORE_SHARED_MEMORY = "in Docker, use --shm-size=2g or --ipc=host; or use data.num_workers=0"
PREFETCHED = 2  # batches of each process, PyTorch's default
IN_PROCESS = "in DataLoader worker process"
ENDED = "DataLoader worker (pid"
SHARED_MEMORY_ERRORS = ("shared memory", "Bus error")
DATA = Path(data.__file__).parent
PROCESSES = Path(multiprocessing.__file__).parent
STARTING = ("synchronize.py", "popen_fork.py")  # modules of `multiprocessing` that start a process
OPEN_FILES_ERRORS = ("Communication with the workers", "items of ancdata")  # of PyTorch and Python


def shared_memory_note(config: RunConfig, *, evaluates: bool = False) -> str | None:
    """Return a warning if the batches of the loaders, prefetched and in use, may not fit into shared memory.

    Args:
        config: of the run.
        evaluates: whether only evaluation is wanted, whose masks stay encoded.
    """
    options, size = config.data, run_spec(config).size
    if not options.num_workers or not SHARED_MEMORY.is_dir():
        return None
    space = os.statvfs(SHARED_MEMORY)
    free_mib = space.f_bavail * space.f_frsize / MIB
    height, width = size.image_size
    bytes_per_pixel, batch_size = 3, options.val_batch_size if evaluates else options.batch_size
    if not evaluates:
        needs = HEADS[config.head.name].target_types
        bytes_per_pixel += size.instances_per_image * ("masks" in needs) + 2 * ("semantic" in needs)
    batches = PREFETCHED * options.num_workers + 1
    needed_mib = batches * batch_size * height * width * bytes_per_pixel / MIB
    if needed_mib <= free_mib:
        return None
    return (
        f"{free_mib:,.0f} MiB of shared memory ({SHARED_MEMORY}) are free, but {options.num_workers} loader "
        f"processes may need {needed_mib:,.0f} MiB at the largest images, {height}x{width}; if the run fails: "
        f"{MORE_SHARED_MEMORY}"
    )


def loading_failure(error: Exception) -> str | None:
    """Return the message on an error of a loader process or of loading images in this one; None for others."""
    if ENDED in str(error) and ENDED in str(error.__cause__):
        error = cast(Exception, error.__cause__)  # which has the signal
    text, in_process = str(error), IN_PROCESS in str(error)
    semaphore, fork = (isinstance(error, OSError) and _passed(error, PROCESSES / name) for name in STARTING)
    if any(words in text for words in OPEN_FILES_ERRORS) or (
        "Too many open files" in text and (in_process or semaphore or fork)
    ):
        return (
            "too many open files for the loader processes; raise the limit with `ulimit -n`, or use data.num_workers=0"
        )
    if fork:
        return f"loader processes cannot be started ({first_line(error)}); use a smaller data.num_workers, or 0"
    if semaphore or ((in_process or ENDED in text) and any(words in text for words in SHARED_MEMORY_ERRORS)):
        reason = f": {first_line(error)}" if semaphore else ""
        return (
            f"shared memory ({_size()}) is too small for the batches of the loader processes{reason}; "
            f"{MORE_SHARED_MEMORY}, a smaller data.num_workers or a smaller data.batch_size"
        )
    if _is_out_of_memory(error, in_process):
        return (
            f"out of memory while loading images ({first_line(error)}); use a smaller data.num_workers or "
            "data.batch_size, or smaller images"
        )
    if ENDED in text:
        likely = "loader processes may be out of memory" if "signal" in text else "the cause may be printed above"
        return f"{first_line(error).rstrip('.')}; {likely}; use a smaller data.num_workers, or 0"
    return None


def _is_out_of_memory(error: Exception, in_process: bool) -> bool:
    if in_process:
        return is_out_of_memory(error) or "MemoryError" in first_line(error)  # NumPy's subclass arrives as another type
    return is_out_of_memory(error) and _passed(error, DATA)


def _passed(error: Exception, place: Path) -> bool:
    """Return whether the traceback of an error passes through a file or folder."""
    files = (Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__))
    return any(place in (file, *file.parents) for file in files)


def _size() -> str:
    if not SHARED_MEMORY.is_dir():
        return f"{SHARED_MEMORY}, missing"
    space = os.statvfs(SHARED_MEMORY)
    return f"{SHARED_MEMORY}, {space.f_blocks * space.f_frsize / MIB:,.0f} MiB in total"
