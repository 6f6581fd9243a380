"""The processes of a run on several devices: rank 0 starts the others of its machine, and none outlives it."""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import NoReturn

import lightning as L  # noqa: N812 (Lightning's own alias)
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment

from e3va_cli.errors import UserError, first_line
from e3va_cli.training.lightning_private import child_processes, kill_children, launcher_log
from e3va_cli.utils.output import log

POLL_INTERVAL_S = 1.0
LOST = ("gloo", "nccl", "connection", "broken pipe", "socket", "timed out")  # in errors of collective operations


def is_child(trainer: L.Trainer) -> bool:
    """Return whether rank 0 has started this process; False if a cluster or torchrun starts all processes."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return isinstance(environment, LightningEnvironment) and trainer.local_rank != 0


def raise_on_all_ranks(trainer: L.Trainer, error: UserError) -> NoReturn:
    """Raise an error that all ranks have detected: rank 0 reports it, the others exit silently."""
    raise error if trainer.is_global_zero else SystemExit(0)


def is_lost_process(error: BaseException) -> bool:
    """Return whether an error means that another process of the run does not respond."""
    running = dist.is_available() and dist.is_initialized()
    return running and isinstance(error, RuntimeError) and any(word in str(error).lower() for word in LOST)


class ProcessWatchdog(L.Callback):
    """Ends all processes of a run, with an error message, when one of them dies.

    Lightning silently kills all processes when one that it has started dies; rank 0 may detect it earlier by a failed
    collective operation. When rank 0 dies, the others might wait until PyTorch's timeout, half an hour.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Watch the other processes, if there are any."""
        if is_child(trainer):
            threading.Thread(target=_exit_with_parent, args=(trainer.local_rank,), daemon=True).start()
        elif trainer.world_size > 1:
            launcher_log.setLevel(logging.INFO)
            launcher_log.handlers, launcher_log.propagate = [_LauncherHandler()], False

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Exit at once if another process is lost: Lightning's teardown would wait for it."""
        if not is_lost_process(exception):
            return
        if is_child(trainer):
            time.sleep(2 * POLL_INTERVAL_S)  # rank 0 reports it, unless rank 0 is the one that died
        else:
            _report(_describe_dead(trainer) or f"another process does not respond ({first_line(exception)})")
            kill_children(trainer)
        os._exit(1)


class _LauncherHandler(logging.Handler):
    """Reports what Lightning's launcher logs before it kills all processes."""

    def emit(self, record: logging.LogRecord) -> None:
        _report(record.getMessage().partition(". ")[0])


def _report(what: str) -> None:
    log.error(f"{what}; training stopped")


def _describe_dead(trainer: L.Trainer) -> str:
    """Return which child processes have died; a connection may fail a moment before its process ends."""
    processes = child_processes(trainer)
    deadline = time.monotonic() + POLL_INTERVAL_S
    while processes and time.monotonic() < deadline and not any(process.poll() for process in processes):
        time.sleep(POLL_INTERVAL_S / 20)
    codes = enumerate((process.poll() for process in processes), 1)
    return ", ".join(f"process {rank} ended with code {code}" for rank, code in codes if code)


def _exit_with_parent(local_rank: int) -> None:
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(POLL_INTERVAL_S)
    if local_rank == 1:
        _report("the first process has ended")
    os._exit(1)
