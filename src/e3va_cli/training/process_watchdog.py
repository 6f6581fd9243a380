"""The processes of a run on several devices: the first one starts the others on its machine, and none outlives it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from typing import NoReturn

import lightning as L  # noqa: N812 (Lightning's own alias)
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from e3va_cli.errors import UserError, first_line

OBSERVER = "lightning.fabric.strategies.launchers.subprocess_script"  # says when a process has died, then ends all
LOOK_EVERY_S = 1.0
LOST = ("gloo", "nccl", "connection", "broken pipe", "socket", "timed out")  # in errors of collective operations


def is_child(trainer: L.Trainer) -> bool:
    """Whether another process of the run has started this one; not so where a cluster or torchrun starts them all."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return isinstance(environment, LightningEnvironment) and trainer.local_rank != 0


def end_children(trainer: L.Trainer) -> bool:
    """End the processes that this one has started; returns whether there were any."""
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher) or not launcher.procs:
        return False
    launcher.kill(signal.SIGKILL)
    return True


def raise_on_all_ranks(trainer: L.Trainer, error: UserError) -> NoReturn:
    """Raise an error that all processes have come to: the first one says it, the others end without a word."""
    raise error if trainer.is_global_zero else SystemExit(0)


def is_lost_process(error: BaseException) -> bool:
    """Whether an error means that another process of the run no longer answers."""
    running = dist.is_available() and dist.is_initialized()
    return running and isinstance(error, RuntimeError) and any(word in str(error).lower() for word in LOST)


class ProcessWatchdog(L.Callback):
    """Ends all processes of a run, with a message, when one of them dies.

    Lightning ends them where a process that it has started dies, but without a word; the first one may learn of it
    earlier, from an operation that they do together. Where the first one dies, the others may wait for it for half an
    hour, the time that PyTorch gives an operation.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Look after each other, where there are several."""
        if is_child(trainer):
            threading.Thread(target=_end_with_parent, args=(trainer.local_rank,), daemon=True).start()
        elif trainer.world_size > 1:
            observer = logging.getLogger(OBSERVER)
            observer.setLevel(logging.INFO)
            observer.handlers, observer.propagate = [_Announcement()], False

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """End at once: nothing that is left to do works without the process that died."""
        if not is_lost_process(exception):
            return
        if is_child(trainer):
            time.sleep(2 * LOOK_EVERY_S)  # it is for the first one to say it, unless that is the one that died
        else:
            _say(_dead_children(trainer) or f"another process no longer answers ({first_line(exception)})")
            end_children(trainer)
        os._exit(1)


class _Announcement(logging.Handler):
    """Says why Lightning is about to end all processes."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(record.getMessage().partition(". ")[0])


def _say(what: str) -> None:
    print(f"e3va: error: {what}; the run ends", file=sys.stderr, flush=True)


def _dead_children(trainer: L.Trainer) -> str:
    """Say which of the processes that this one has started have died; a connection may end a moment before they do."""
    procs = getattr(trainer.strategy.launcher, "procs", [])
    until = time.monotonic() + LOOK_EVERY_S
    while procs and time.monotonic() < until and not any(proc.poll() for proc in procs):
        time.sleep(LOOK_EVERY_S / 20)
    dead = [f"process {rank} ended with code {proc.returncode}" for rank, proc in enumerate(procs, 1) if proc.poll()]
    return ", ".join(dead)


def _end_with_parent(local_rank: int) -> None:
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY_S)
    if local_rank == 1:
        _say("the first process has ended")
    os._exit(1)
