"""Length and learning rate of a run: those of a recipe, scaled to the run's total batch size.

A recipe states a learning rate and numbers of steps for a total batch size, the images of one optimizer step on all
devices. A run with another total batch size sees the same number of images, so a smaller batch takes more steps. Its
learning rate is scaled by the square root of the batch size, as theory and experiments suggest for Adam (arXiv
2205.10287), and as timm does for AdamW. Linear scaling (arXiv 1706.02677; mmdetection's `auto_scale_lr`) is the rule
for SGD, whose updates are proportional to the gradient; Adam's are not, and small batches would get too low a rate.

For small data sets, `min_steps` adds epochs until there are enough steps to learn from, and `warmup_max_fraction`
limits the warm-up to a fraction of the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from e3va_cli.components.options import Condition, Options, option

LR_FACTORS = {"linear": lambda ratio: ratio, "sqrt": lambda ratio: ratio**0.5, "none": lambda ratio: 1.0}


@dataclass
class ScheduleOptions(Options):
    """Options of every schedule: the length of a run and the warm-up of its learning rate."""

    name: str = option()
    epochs: int | None = option(None, help="epochs of the recipe; trainer.max_epochs overrides it", gt=0)
    min_steps: int = option(
        0, help="least number of optimizer steps; small data sets get more epochs until they have it", ge=0
    )
    iterations: int | None = option(
        None,
        help="optimizer steps instead of epochs, rounded up to whole epochs; trainer.max_epochs may end them earlier",
        gt=0,
    )
    warmup_steps: int = option(help="steps of linear warm-up", ge=0)
    warmup_ratio: float = option(
        help="ratio of the first learning rate to the highest",
        gt=0,
        le=1,
        conditions=(Condition("warmup_steps", bool, "set it above 0"),),
    )
    warmup_max_fraction: float = option(
        1.0, help="largest fraction of the run that the warm-up may take", gt=0, le=1, legacy_value=1.0
    )
    total_batch: int | None = option(
        None,
        help="total batch size for which the learning rate and the numbers of steps are meant",
        gt=0,
    )
    lr_scaling: str = option(
        help="scaling of the learning rate to the run's total batch size: sqrt, as for Adam, linear or none",
        choices=tuple(LR_FACTORS),
        conditions=(
            Condition(
                "total_batch", lambda value: value is not None, "set the batch size that the recipe is meant for"
            ),
        ),
    )


@dataclass(frozen=True)
class TrainSchedule:
    """Length and learning rate of a run.

    Attributes:
        total_batch: images per optimizer step, on all devices together.
        lr: highest learning rate.
        warmup_steps: steps of linear warm-up.
        recipe_warmup: the same before `warmup_max_fraction` is applied.
        epochs: passes over the training images; a recipe's iterations are rounded up to whole epochs.
        stretch: ratio of these epochs to the recipe's, above 1 where `min_steps` adds epochs.
        steps_per_epoch: optimizer steps per epoch.
        total_steps: optimizer steps of the run, up to `trainer.max_steps`.
        recipe_batch: total batch size that the recipe is meant for, or None.
    """

    total_batch: int
    lr: float
    warmup_steps: int
    recipe_warmup: int
    epochs: int
    stretch: float
    steps_per_epoch: int
    total_steps: int
    recipe_batch: int | None

    @property
    def rescaled(self) -> bool:
        """Return whether the recipe has another total batch size."""
        return self.recipe_batch not in (None, self.total_batch)


def build_train_schedule(
    schedule: ScheduleOptions,
    *,
    lr: float,
    batch_size: int,
    accumulated: int = 1,
    max_epochs: int | None = None,
    max_steps: int | None = None,
    batches_per_epoch: int,
    devices: int,
) -> TrainSchedule:
    """Return the length and learning rate of a run.

    Args:
        schedule: options of the recipe.
        lr: learning rate of the recipe.
        batch_size: images per batch and device.
        accumulated: batches per optimizer step.
        max_epochs, max_steps: limits of the run, or None.
        batches_per_epoch: batches per epoch and device.
        devices: number of devices.
    """
    total_batch = batch_size * accumulated * devices
    ratio = total_batch / schedule.total_batch if schedule.total_batch else 1.0
    steps_per_epoch = max(1, -(-batches_per_epoch // accumulated))
    epochs, stretch = _length(schedule, max_epochs, ratio, steps_per_epoch)
    total_steps = epochs * steps_per_epoch
    if max_steps is not None:
        total_steps = min(total_steps, max_steps)
    warmup = round(schedule.warmup_steps / ratio)
    return TrainSchedule(
        total_batch=total_batch,
        lr=lr * LR_FACTORS[schedule.lr_scaling](ratio),
        warmup_steps=min(warmup, math.ceil(schedule.warmup_max_fraction * total_steps)),
        recipe_warmup=warmup,
        epochs=epochs,
        stretch=stretch,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        recipe_batch=schedule.total_batch,
    )


def is_complete(run: TrainSchedule, epochs: int, step: int, max_steps: int | None) -> bool:
    """Return whether a run is complete after `epochs` epochs and `step` optimizer steps."""
    return epochs >= run.epochs or (max_steps is not None and step >= max_steps)


def extended_length(schedule: ScheduleOptions, run: TrainSchedule, max_steps: int | None) -> dict[str, int | None]:
    """Return options that double the length of a complete run."""
    whole = run.epochs * run.steps_per_epoch
    options: dict[str, int | None] = {}
    if max_steps is not None and max_steps <= whole:
        options["trainer.max_steps"] = 2 * max_steps
    if max_steps is None or max_steps >= whole:
        options["trainer.max_epochs"] = 2 * run.epochs
        if schedule.iterations is not None:
            options["schedule.iterations"] = None
    return options


def _length(schedule: ScheduleOptions, max_epochs: int | None, ratio: float, steps_per_epoch: int) -> tuple[int, float]:
    """Return the epochs of a run, and their ratio to those of the recipe."""
    if schedule.iterations is not None:
        epochs = math.ceil(schedule.iterations / ratio / steps_per_epoch)
        return epochs if max_epochs is None else min(epochs, max_epochs), 1.0
    if max_epochs is not None:
        return max_epochs, 1.0
    assert schedule.epochs is not None  # checked by RunConfig
    epochs = max(schedule.epochs, math.ceil(schedule.min_steps / steps_per_epoch))
    return epochs, epochs / schedule.epochs
