"""Learning rate over a run, as a factor of the step: a linear warm-up, then the curve chosen by `schedule=`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from e3va_cli.components.options import option
from e3va_cli.components.registry import Registry
from e3va_cli.optim.train_schedule import ScheduleOptions, TrainSchedule

Factor = Callable[[int], float]
SCHEDULES: Registry[Callable[[TrainSchedule, Any], Factor]] = Registry("schedule")


@dataclass
class MultiStepOptions(ScheduleOptions):
    """Options of the learning rate that falls in steps."""

    milestones: list[int] = option(
        help="epochs after which the learning rate falls, of `epochs` where min_steps makes them more"
    )
    gamma: float = option(help="factor of each fall")

    def errors(self, at: str) -> Iterator[str]:
        """Yield what is wrong with the milestones."""
        if self.milestones is not None and list(self.milestones) != sorted(set(self.milestones)):
            yield f"{at}.milestones={self.milestones}: must rise"


@dataclass
class CosineOptions(ScheduleOptions):
    """Options of the learning rate that falls along a half cosine."""

    min_ratio: float = option(help="of the learning rate, at the last step")


@dataclass
class PolyOptions(CosineOptions):
    """Options of the learning rate that falls as a power of what is left of the run."""

    power: float = option(help="of the part of the run that is left")


@SCHEDULES.register("multistep", MultiStepOptions)
def multistep(course: TrainSchedule, options: MultiStepOptions) -> Factor:
    """Falls by `gamma` at the end of each milestone epoch, which moves back where the course is stretched."""
    boundaries = [round(epoch * course.stretch) * course.steps_per_epoch for epoch in options.milestones]
    return lambda step: options.gamma ** sum(step >= boundary for boundary in boundaries)


@SCHEDULES.register("cosine", CosineOptions)
def cosine(course: TrainSchedule, options: CosineOptions) -> Factor:
    """Falls along a half cosine from 1 to `min_ratio` (arXiv 1608.03983, without restarts)."""
    total, least = course.total_steps, options.min_ratio
    return lambda step: least + (1 - least) * (1 + math.cos(math.pi * min(1, step / total))) / 2


@SCHEDULES.register("poly", PolyOptions)
def poly(course: TrainSchedule, options: PolyOptions) -> Factor:
    """Falls as (1 - step / total) ** power from 1 to `min_ratio`."""
    return lambda step: max(options.min_ratio, (1 - min(1, step / course.total_steps)) ** options.power)


def build_schedule(options: ScheduleOptions, course: TrainSchedule) -> Factor:
    """Return the schedule of the options, with a linear rise from `warmup_ratio` to 1 over the course's warm-up."""
    after = SCHEDULES[options.name](course, options)
    warmup, ratio = course.warmup_steps, options.warmup_ratio

    def factor(step: int) -> float:
        rise = 1.0 if step >= warmup else ratio + (1 - ratio) * step / warmup
        return rise * after(step)

    return factor
