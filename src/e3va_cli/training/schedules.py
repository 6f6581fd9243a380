"""Learning rate over a run, as a factor of the step: a linear warm-up, then the curve chosen by `schedule=`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from e3va_cli.training.course import Course

Factor = Callable[[int], float]


def multistep(course: Course, *, milestones: Sequence[int], gamma: float) -> Factor:
    """Falls by `gamma` at the end of each milestone epoch, which moves back where the course is stretched."""
    boundaries = [round(epoch * course.stretch) * course.steps_per_epoch for epoch in milestones]
    return lambda step: gamma ** sum(step >= boundary for boundary in boundaries)


def cosine(course: Course, *, min_ratio: float) -> Factor:
    """Falls along a half cosine from 1 to `min_ratio` (arXiv 1608.03983, without restarts)."""
    total = course.total_steps
    return lambda step: min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * min(1, step / total))) / 2


def poly(course: Course, *, power: float, min_ratio: float) -> Factor:
    """Falls as (1 - step / total) ** power from 1 to `min_ratio`."""
    return lambda step: max(min_ratio, (1 - min(1, step / course.total_steps)) ** power)


SCHEDULES: dict[str, Callable[..., Factor]] = {"multistep": multistep, "cosine": cosine, "poly": poly}


def build_schedule(name: str, course: Course, *, warmup_ratio: float, **options: object) -> Factor:
    """The schedule called `name`, with a linear rise from `warmup_ratio` to 1 over the course's warm-up."""
    after = SCHEDULES[name](course, **options)
    warmup = course.warmup_steps

    def factor(step: int) -> float:
        rise = 1.0 if step >= warmup else warmup_ratio + (1 - warmup_ratio) * step / warmup
        return rise * after(step)

    return factor
