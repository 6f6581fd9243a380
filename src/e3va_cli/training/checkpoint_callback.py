"""When the state of a run is kept: at its start, every so many steps, around evaluations, and when it is stopped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812 (Lightning's own alias)
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from e3va_cli.runs.folder import BEST_CHECKPOINT, LAST_CHECKPOINT
from e3va_cli.training.graceful_shutdown import GracefulShutdown
from e3va_cli.training.history import histories
from e3va_cli.training.steps import is_optimizer_step


class CheckpointCallback(Checkpoint):
    """Keeps the last state and the best one; each file is replaced as a whole.

    Lightning calls it after all other callbacks. It goes on from each of these states exactly: `last.ckpt` is written

    - before the first step;
    - after every `every_steps`-th step, and after the step that a signal or `trainer.max_steps` ends a run with;
    - when an evaluation begins, which a resumed run then repeats;
    - after every epoch, with the results of its evaluation; after every `every_epochs`-th where epochs are short.

    Args:
        folder: where `last.ckpt` and `best.ckpt` (after every better evaluation) go.
        monitor: the logged metric that decides what is best; higher is better.
        every_steps: steps between two states within an epoch, or None.
        stop: knows whether a signal has stopped the run.
    """

    def __init__(self, folder: Path, monitor: str, every_steps: int | None, stop: GracefulShutdown) -> None:
        super().__init__()
        self.folder, self.monitor = folder, monitor
        self.every_steps, self.stop = every_steps, stop
        self.best = -math.inf
        self.every_epochs = 1

    @property
    def state_key(self) -> str:
        """The callback's key in a checkpoint, which is older than the class's name."""
        return "Checkpoints"

    def state_dict(self) -> dict[str, Any]:
        """The best result so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best result of the resumed run."""
        self.best = state_dict["best"]

    def save(self, trainer: L.Trainer) -> None:
        """Keep the state in place of the one before, once the history up to it is on disk."""
        for history in histories(trainer):
            history.flush()
        trainer.save_checkpoint(self.folder / LAST_CHECKPOINT)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From now on there is a state to go on from."""
        if trainer.global_step == 0:
            self.save(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the state of this step, unless it is an epoch's last, whose evaluation follows."""
        if trainer.is_last_batch or not is_optimizer_step(trainer):
            return
        due = self.every_steps is not None and trainer.global_step % self.every_steps == 0
        if due or self.stop.agreed or trainer.global_step == trainer.max_steps:
            self.save(trainer)

    def before_evaluation(self, trainer: L.Trainer) -> None:
        """Keep the state of an evaluation that begins.

        Of Lightning's states only one within the first `validation_step` makes a resumed run repeat the evaluation;
        with one from any hook before or after that step it is passed over. It counts batches over all beginnings of
        an evaluation, and would pass over one that is begun for the third time.
        """
        if trainer.state.fn == TrainerFn.FITTING:
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            progress.total.load_state_dict(progress.current.state_dict())
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the state if the evaluation was the best so far."""
        value = trainer.callback_metrics.get(self.monitor)
        if trainer.sanity_checking or value is None or not value > self.best:
            return
        self.best = float(value)
        trainer.save_checkpoint(self.folder / BEST_CHECKPOINT)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the state of an epoch's end; one that `trainer.max_steps` cut short has kept its own."""
        epoch, evaluates = trainer.current_epoch + 1, trainer.check_val_every_n_epoch or 1
        due = epoch % self.every_epochs == 0 or epoch % evaluates == 0 or epoch == trainer.max_epochs
        if trainer.is_last_batch and due:
            self.save(trainer)
