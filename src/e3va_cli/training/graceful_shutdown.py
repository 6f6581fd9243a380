"""A run that is told to stop ends its step, keeps its state, and says how to go on.

Lightning's own way does not serve: after SIGTERM it ends with exit code 0 and keeps nothing, and its handler starts a
collective operation that the other processes of a run do not expect.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import lightning as L  # noqa: N812 (Lightning's own alias)
import torch

from e3va_cli.training.process_watchdog import end_children, is_child
from e3va_cli.training.steps import is_optimizer_step
from e3va_cli.utils.command_line import format_command
from e3va_cli.utils.output import redirect_to_devnull

NOTICE = b"\nStopping after this step; press Ctrl-C once more to stop at once.\n"


class RunStopped(SystemExit):
    """The end of a run that a signal stopped; the first process's exit code is a shell's, 128 + the signal's number."""


class GracefulShutdown(L.Callback):
    """Stops a run at its next step when a signal asks for it; a second Ctrl-C ends the process at once.

    All processes of a run stop after the same step, whichever of them was asked. An evaluation stops after its batch:
    the state from its beginning is kept, and a resumed run repeats it. A terminal that closes (SIGHUP) is such a signal
    too, unless `nohup` has the process ignore it; what would be printed there is dropped from then on.

    Args:
        folder: of the run, for what is said at the end; None for an evaluation alone.
        preemption: name of the signal by which a cluster announces that it will end the run, or None.

    Attributes:
        agreed: number of the signal that all processes have agreed to stop for after this step, or 0.
    """

    def __init__(self, folder: Path | None, preemption: str | None) -> None:
        self.folder = folder
        self.signals = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            self.signals.append(signal.SIGHUP)
        if preemption is not None:
            self.signals.append(signal.Signals[preemption])
        self.asked = self.agreed = 0
        self.speaks = True
        self.terminals = [stream for stream in (1, 2) if os.isatty(stream)]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen, in place of Lightning's handlers; Lightning itself puts back what was there before."""
        self._listen(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen, where there is no training before."""
        self._listen(trainer)

    def _listen(self, trainer: L.Trainer) -> None:
        if trainer.received_sigterm:  # before there was anybody to listen
            self.asked = signal.SIGTERM
        self.speaks = trainer.is_global_zero
        for number in self.signals:
            if not self.asked:
                signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            if self.speaks:
                with suppress(OSError):
                    os.write(2, NOTICE)  # print() may be what was interrupted
        if number == signal.SIGHUP:
            redirect_to_devnull([stream for stream in self.terminals if not os.isatty(stream)])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Agree with the other processes, after a whole step; the state is kept by `CheckpointCallback`."""
        if not is_optimizer_step(trainer):
            return
        self.agreed = self.asked
        if trainer.world_size > 1:
            asked = torch.tensor(self.asked, device=pl_module.device)
            self.agreed = int(trainer.strategy.reduce(asked, reduce_op="max"))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop before the next batch is begun; what the last step measured has been logged by now."""
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
        """Stop an evaluation. Its processes have different numbers of batches, so that they cannot agree on one."""
        if self.agreed:
            self._stop(trainer, self.agreed)
        if self.asked and not is_child(trainer):
            self.say(trainer, self.asked)
            if end_children(trainer):  # which Lightning would take for an accident, and end this one too
                os._exit(128 + self.asked)
            raise RunStopped(128 + self.asked)

    def _stop(self, trainer: L.Trainer, number: int) -> NoReturn:
        if not trainer.is_global_zero:
            raise RunStopped(0)
        self.say(trainer, number)
        raise RunStopped(128 + number)

    def say(self, trainer: L.Trainer, number: int) -> None:
        """One line on what has stopped the run, where, and how it goes on."""
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        where = f" after step {trainer.global_step:,}" if self.folder else ""
        how = f"; go on with: {format_command('train', {'resume': str(self.folder)})}" if self.folder else ""
        print(f"e3va: stopped by {name}{where}{how}", file=sys.stderr, flush=True)
