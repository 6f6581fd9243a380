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
from typing import Any

COURSE_OPTIONS = frozenset(
    {"epochs", "min_steps", "iterations", "warmup_steps", "warmup_max_fraction", "total_batch", "lr_scaling"}
)  # of a schedule, that are settled here
LR_FACTORS = {"linear": lambda ratio: ratio, "sqrt": lambda ratio: ratio**0.5, "none": lambda ratio: 1.0}


@dataclass(frozen=True)
class Course:
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


def plan_course(config: dict[str, Any], *, batches_per_epoch: int, devices: int) -> Course:
    """The course of a run with this plain configuration.

    Args:
        batches_per_epoch: on each device.
        devices: that share the images.
    """
    schedule, trainer = config["schedule"], config["trainer"]
    accumulated = trainer["accumulate_grad_batches"]
    total_batch = config["data"]["batch_size"] * accumulated * devices
    recipe_batch = schedule["total_batch"]
    ratio = total_batch / recipe_batch if recipe_batch else 1.0
    if trainer["limit_train_batches"] is not None:
        batches_per_epoch = min(batches_per_epoch, trainer["limit_train_batches"])
    steps_per_epoch = max(1, -(-batches_per_epoch // accumulated))
    epochs, stretch = _length(schedule, trainer["max_epochs"], ratio, steps_per_epoch)
    total_steps = epochs * steps_per_epoch
    if trainer["max_steps"] is not None:
        total_steps = min(total_steps, trainer["max_steps"])
    warmup = round(schedule["warmup_steps"] / ratio)
    return Course(
        total_batch=total_batch,
        lr=config["optimizer"]["lr"] * LR_FACTORS[schedule["lr_scaling"]](ratio),
        warmup_steps=min(warmup, math.ceil(schedule["warmup_max_fraction"] * total_steps)),
        recipe_warmup=warmup,
        epochs=epochs,
        stretch=stretch,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        recipe_batch=recipe_batch,
    )


def is_complete(config: dict[str, Any], course: Course, epochs: int, step: int) -> bool:
    """Whether a run that has done so many epochs and steps has come to its end."""
    limit = config["trainer"]["max_steps"]
    return epochs >= course.epochs or (limit is not None and step >= limit)


def longer(config: dict[str, Any], course: Course) -> dict[str, int | None]:
    """The options by which a run that has come to its end goes on, for as long again."""
    limit, whole = config["trainer"]["max_steps"], course.epochs * course.steps_per_epoch
    options: dict[str, int | None] = {}
    if limit is not None and limit <= whole:
        options["trainer.max_steps"] = 2 * limit
    if limit is None or limit >= whole:
        options["trainer.max_epochs"] = 2 * course.epochs
        if config["schedule"]["iterations"] is not None:
            options["schedule.iterations"] = None
    return options


def _length(schedule: dict[str, Any], max_epochs: int | None, ratio: float, steps_per_epoch: int) -> tuple[int, float]:
    """Epochs of a run, and by how much they are more than the recipe's to make up its least number of steps."""
    if schedule["iterations"] is not None:
        epochs = math.ceil(schedule["iterations"] / ratio / steps_per_epoch)
        return epochs if max_epochs is None else min(epochs, max_epochs), 1.0
    if max_epochs is not None:
        return max_epochs, 1.0
    epochs = max(schedule["epochs"], math.ceil(schedule["min_steps"] / steps_per_epoch))
    return epochs, epochs / schedule["epochs"]
