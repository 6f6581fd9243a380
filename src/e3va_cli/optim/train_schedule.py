"""How long a run is and how fast it learns: a recipe's figures, brought to the total batch of this run.

A recipe states learning rate and counts of steps for a total batch, the images of one optimizer step on all devices.
A run with another total batch sees the same number of images: counts of steps grow as the batch shrinks. Its learning
rate goes with the square root of the batch, as theory and experiments have it for Adam (arXiv 2205.10287), and as timm
does for AdamW. In proportion to the batch (arXiv 1706.02677; mmdetection's `auto_scale_lr`) is the rule of SGD, whose
steps grow with the gradient; Adam's do not, so that it makes the rate of a small batch too low.

Two things keep a small data set from a run in which nothing is learned: it is passed over until there are enough steps,
and a warm-up takes no more than a part of the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from e3va_cli.components.options import Condition, Options, option

LR_FACTORS = {"linear": lambda ratio: ratio, "sqrt": lambda ratio: ratio**0.5, "none": lambda ratio: 1.0}


@dataclass
class ScheduleOptions(Options):
    """Options of every schedule: how long a run is, and how its learning rate rises."""

    name: str = option()
    epochs: int | None = option(
        None, help="passes over the training images; trainer.max_epochs, where it is given, holds instead", above=0
    )
    min_steps: int = option(
        0, help="optimizer steps; a small data set is passed over more often until there are so many", least=0
    )
    iterations: int | None = option(
        None,
        help="optimizer steps instead of epochs, rounded up to whole ones; trainer.max_epochs may end them earlier",
        above=0,
    )
    warmup_steps: int = option(help="over which the learning rate rises", least=0)
    warmup_ratio: float = option(
        help="of the learning rate, at the first step",
        above=0,
        most=1,
        under=(Condition("warmup_steps", bool, "set it above 0"),),
    )
    warmup_max_fraction: float = option(
        1.0, help="of the run; a longer warm-up is shortened to it", above=0, most=1, before=1.0
    )
    total_batch: int | None = option(
        None,
        help="images per optimizer step that the learning rate and the counts of steps are meant for",
        above=0,
    )
    lr_scaling: str = option(
        help="of the learning rate to another total batch: its square root, as for Adam; linear or none",
        choices=tuple(LR_FACTORS),
        under=(
            Condition("total_batch", lambda value: value is not None, "set the batch that the recipe is meant for"),
        ),
    )


@dataclass(frozen=True)
class TrainSchedule:
    """What a run comes to.

    Attributes:
        total_batch: images per optimizer step, on all devices together.
        lr: the highest learning rate.
        warmup_steps: over which it rises.
        recipe_warmup: the same before it was shortened to a part of the run.
        epochs: passes over the training images; a recipe's iterations are rounded up to whole ones.
        stretch: how many times as many these are as the recipe's, to make up its least number of steps.
        steps_per_epoch: optimizer steps of one pass.
        total_steps: of the whole run, which `trainer.max_steps` may end earlier.
        recipe_batch: total batch that the recipe is meant for, None if it names none.
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
        """Whether the recipe is meant for another total batch."""
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
    """Return the course of a run.

    Args:
        schedule: of the recipe.
        lr: the recipe's learning rate.
        batch_size: images of a batch on each device.
        accumulated: batches of an optimizer step.
        max_epochs, max_steps: that end the run, if given.
        batches_per_epoch: on each device.
        devices: that share the images.
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


def is_complete(course: TrainSchedule, epochs: int, step: int, max_steps: int | None) -> bool:
    """Return whether a run that has done so many epochs and steps has come to its end."""
    return epochs >= course.epochs or (max_steps is not None and step >= max_steps)


def longer(schedule: ScheduleOptions, course: TrainSchedule, max_steps: int | None) -> dict[str, int | None]:
    """Return the options by which a run that has come to its end goes on, for as long again."""
    whole = course.epochs * course.steps_per_epoch
    options: dict[str, int | None] = {}
    if max_steps is not None and max_steps <= whole:
        options["trainer.max_steps"] = 2 * max_steps
    if max_steps is None or max_steps >= whole:
        options["trainer.max_epochs"] = 2 * course.epochs
        if schedule.iterations is not None:
            options["schedule.iterations"] = None
    return options


def _length(schedule: ScheduleOptions, max_epochs: int | None, ratio: float, steps_per_epoch: int) -> tuple[int, float]:
    """Epochs of a run, and by how much they are more than the recipe's to make up its least number of steps."""
    if schedule.iterations is not None:
        epochs = math.ceil(schedule.iterations / ratio / steps_per_epoch)
        return epochs if max_epochs is None else min(epochs, max_epochs), 1.0
    if max_epochs is not None:
        return max_epochs, 1.0
    assert schedule.epochs is not None  # or the configuration is refused
    epochs = max(schedule.epochs, math.ceil(schedule.min_steps / steps_per_epoch))
    return epochs, epochs / schedule.epochs
