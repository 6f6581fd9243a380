"""A run that gets a signal finishes its step, saves its state, and prints the command that resumes it.

Lightning's own handlers are not used: after SIGTERM a run would end with exit code 0 without saving, and they start a
collective operation that the other ranks do not expect.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import lightning as L  # noqa: N812 (Lightning's own alias)
import torch

from e3va_cli.training.lightning_private import is_optimizer_step, kill_children
from e3va_cli.training.process_watchdog import is_child
from e3va_cli.utils.command_line import format_command
from e3va_cli.utils.output import log, redirect_to_devnull

NOTICE = b"\nStopping after this step; press Ctrl-C again to stop at once.\n"


class RunStopped(SystemExit):
    """Raised where a signal has stopped a run; the exit code of rank 0 is 128 + the number of the signal."""


class GracefulShutdown(L.Callback):
    """Stops a run after its current step when it gets a signal; a second Ctrl-C ends the process at once.

    All ranks stop after the same step, whichever got the signal. An evaluation stops after its batch: the state from
    its start is saved, and a resumed run repeats it. SIGHUP, from a terminal that is closed, stops a run too unless
    `nohup` has the process ignore it; the output to that terminal is discarded.

    Args:
        folder: the run folder, for the message at the end; None for an evaluation alone.
        preemption_signal: name of the signal by which a cluster announces preemption, or None.

    Attributes:
        agreed: number of the signal for which all ranks stop after this step, or 0.
    """

    def __init__(self, folder: Path | None, preemption_signal: str | None) -> None:
        self.folder = folder
        self.signals = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            self.signals.append(signal.SIGHUP)
        if preemption_signal is not None:
            self.signals.append(signal.Signals[preemption_signal])
        self.received = self.agreed = 0
        self.is_global_zero = True
        self.terminals = [stream for stream in (1, 2) if os.isatty(stream)]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install the handlers in place of Lightning's; Lightning restores those from before at the end."""
        self._install(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install the handlers for an evaluation alone."""
        self._install(trainer)

    def _install(self, trainer: L.Trainer) -> None:
        if trainer.received_sigterm:  # before these handlers were installed
            self.received = signal.SIGTERM
        self.is_global_zero = trainer.is_global_zero
        for number in self.signals:
            if not self.received:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            if self.is_global_zero:
                with suppress(OSError):
                    os.write(2, NOTICE)  # the signal may have interrupted print()
        if number == signal.SIGHUP:
            redirect_to_devnull([stream for stream in self.terminals if not os.isatty(stream)])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Agree with the other ranks after a whole step, whose state `CheckpointCallback` then saves."""
        if not is_optimizer_step(trainer):
            return
        self.agreed = self.received
        if trainer.world_size > 1:
            received = torch.tensor(self.received, device=pl_module.device)
            self.agreed = int(trainer.strategy.reduce(received, reduce_op="max"))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop before the next batch, when the metrics of the last step have been logged."""
        if self.agreed:
            self._stop(trainer, self.agreed)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop an evaluation. Ranks may have different numbers of batches, so they do not agree on one."""
        if self.agreed:
            self._stop(trainer, self.agreed)
        if self.received and not is_child(trainer):
            self._report(trainer, self.received)
            if kill_children(trainer):  # Lightning would report their deaths and kill this process too
                os._exit(128 + self.received)
            raise RunStopped(128 + self.received)

    def _stop(self, trainer: L.Trainer, number: int) -> NoReturn:
        if not trainer.is_global_zero:
            raise RunStopped(0)
        self._report(trainer, number)
        raise RunStopped(128 + number)

    def _report(self, trainer: L.Trainer, number: int) -> None:
        """Log which signal has stopped the run, at which step, and the command that resumes it."""
        message = f"stopped by {'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name}"
        if self.folder is not None:
            command = format_command("train", {"resume": str(self.folder)})
            message += f" after step {trainer.global_step:,}; resume with: {command}"
        log.info(message)
