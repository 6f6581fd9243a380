"""Learning rate schedules: a factor of the learning rate at each step, after a linear warm-up."""

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
    """Options of `multistep`."""

    milestones: list[int] = option(
        help="epochs after which the learning rate is reduced; scaled where min_steps adds epochs"
    )
    gamma: float = option(help="factor of each reduction")

    def errors(self, at: str) -> Iterator[str]:
        """Yield an error for milestones that do not increase."""
        if self.milestones is not None and list(self.milestones) != sorted(set(self.milestones)):
            yield f"{at}.milestones={self.milestones}: must increase"


@dataclass
class CosineOptions(ScheduleOptions):
    """Options of `cosine`."""

    min_ratio: float = option(help="ratio of the last learning rate to the highest")


@dataclass
class PolyOptions(CosineOptions):
    """Options of `poly`."""

    power: float = option(help="exponent of the remaining fraction of the run")


@SCHEDULES.register("multistep", MultiStepOptions)
def multistep(schedule: TrainSchedule, options: MultiStepOptions) -> Factor:
    """Reduce by `gamma` after each milestone epoch; milestones are scaled as the run's epochs are."""
    boundaries = [round(epoch * schedule.stretch) * schedule.steps_per_epoch for epoch in options.milestones]
    return lambda step: options.gamma ** sum(step >= boundary for boundary in boundaries)


@SCHEDULES.register("cosine", CosineOptions)
def cosine(schedule: TrainSchedule, options: CosineOptions) -> Factor:
    """Decay along a half cosine from 1 to `min_ratio` (arXiv 1608.03983, without restarts)."""
    total, least = schedule.total_steps, options.min_ratio
    return lambda step: least + (1 - least) * (1 + math.cos(math.pi * min(1, step / total))) / 2


@SCHEDULES.register("poly", PolyOptions)
def poly(schedule: TrainSchedule, options: PolyOptions) -> Factor:
    """Decay as (1 - step / total) ** power from 1 to `min_ratio`."""
    return lambda step: max(options.min_ratio, (1 - min(1, step / schedule.total_steps)) ** options.power)


def build_schedule(options: ScheduleOptions, train_schedule: TrainSchedule) -> Factor:
    """Return the factor of the learning rate at each step, with a linear warm-up from `warmup_ratio`."""
    decay = SCHEDULES[options.name](train_schedule, options)
    warmup, ratio = train_schedule.warmup_steps, options.warmup_ratio

    def factor(step: int) -> float:
        rise = 1.0 if step >= warmup else ratio + (1 - ratio) * step / warmup
        return rise * decay(step)

    return factor
