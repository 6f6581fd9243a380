"""Options of Lightning's trainer: how long, on what, in which precision, and what to do when something goes wrong."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from e3va_cli.components.options import Condition, Options, option

PRECISIONS = ("32", "16-mixed", "bf16-mixed")


@dataclass
class TrainerOptions(Options):
    """Options of a run's trainer."""

    max_epochs: int | None = option(
        help="passes over the training images; null: as schedule.epochs or schedule.iterations has it", gt=0
    )
    max_steps: int | None = option(None, help="optimizer steps; ends the run before max_epochs", gt=0)
    limit_train_batches: int | None = option(None, help="batches per epoch", gt=0)
    limit_val_batches: int | None = option(None, help="batches per evaluation; 0 leaves evaluation out", ge=0)
    val_every_epochs: int = option(
        help="from one evaluation to the next",
        gt=0,
        conditions=(Condition("limit_val_batches", lambda value: value != 0, "set it to null or above 0"),),
    )
    accelerator: str = option(help="cpu, gpu, or auto")
    devices: Any = option(help="a count, auto, or a list of indices such as [0,1]")
    num_nodes: int = option(help="machines", gt=0)
    strategy: str = option(help="ddp with several devices")
    precision: str = option(help="32; 16-mixed and bf16-mixed reduce memory")
    accumulate_grad_batches: int = option(help="batches per optimizer step", gt=0)
    gradient_clip_norm: float | None = option(None, help="largest norm of the gradients of a step", gt=0)
    early_stopping_patience: int | None = option(
        None, help="evaluations without a better result before the run stops", ge=0
    )
    deterministic: bool = option(help="true: the same bits on a GPU too, where PyTorch can; slower")
    log_every_n_steps: int = option(help="from one logged step to the next", gt=0)
    tensorboard: bool = option(help="write event files beside metrics.csv")
    checkpoint_every_steps: int | None = option(
        None, help="steps between two states of an epoch; null keeps one before and after each evaluation", gt=0
    )
    preemption_signal: str | None = option(
        None, help="preemption signal of a cluster; SIGTERM and Ctrl-C are handled anyway"
    )
    max_nonfinite_steps: int | None = option(
        None,
        former_name="max_bad_losses",
        help="steps in a row with a NaN or infinite loss or gradient that end the run; they change no weight",
        gt=0,
    )
    skip_oom: bool = option(
        help="true: a step whose batch does not fit into memory changes no weight and counts as such a step"
    )

    def errors(self, at: str) -> Iterator[str]:
        """Yield what is wrong with precision, devices, signal and early stopping."""
        if self.precision == "bf16-true":
            yield (
                f"{at}.precision=bf16-true: torchvision has no NMS in bfloat16, and box coordinates up to 1333 need "
                "more than its 8 bits; use bf16-mixed"
            )
        elif self.precision is not None and self.precision not in PRECISIONS:
            yield f"{at}.precision={self.precision}: one of {', '.join(PRECISIONS)}"
        devices = self.devices
        is_list = isinstance(devices, list) and len(devices) > 0 and all(isinstance(d, int) for d in devices)
        is_count = isinstance(devices, int) and not isinstance(devices, bool) and (devices > 0 or devices == -1)
        if devices is not None and devices != "auto" and not is_list and not is_count:
            yield f"{at}.devices={devices}: a count, auto, or a list of device indices such as [0,1]"
        signal_name = self.preemption_signal
        if signal_name is not None and signal_name not in signal.Signals.__members__:
            yield (f"{at}.preemption_signal={signal_name}: the name of a signal, such as SIGUSR1 or SIGUSR2, or null")
        if self.early_stopping_patience is not None and self.limit_val_batches == 0:
            yield (
                f"{at}.early_stopping_patience={self.early_stopping_patience}: waits for evaluations, which "
                f"{at}.limit_val_batches=0 leaves out; leave out one of them"
            )
