"""Options that are read only under another one: given where they do nothing, they are refused."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple


class Condition(NamedTuple):
    """What an option is read under: another option, the values of it, and what to do about it."""

    option: str
    holds: Callable[[Any], bool]
    remedy: str


def _given(value: Any) -> bool:
    return value is not None


def _missing(value: Any) -> bool:
    return value is None


def _positive(value: Any) -> bool:
    return bool(value and value > 0)


READ_UNDER: dict[str, tuple[Condition, ...]] = {
    "head.stride": (Condition("head.window", _given, "set head.window, such as 512"),),
    "head.auxiliary_stage": (Condition("head.auxiliary_weight", _positive, "set it above 0"),),
    "head.auxiliary_channels": (Condition("head.auxiliary_weight", _positive, "set it above 0"),),
    "adapter.compress_bits": (
        Condition("adapter.activations", lambda value: value == "compress", "set adapter.activations=compress"),
    ),
    "schedule.warmup_ratio": (Condition("schedule.warmup_steps", _positive, "set it above 0"),),
    "schedule.lr_scaling": (Condition("schedule.total_batch", _given, "set the batch that the recipe is meant for"),),
    "trainer.val_every_epochs": (
        Condition("trainer.limit_val_batches", lambda value: value != 0, "set it to null or above 0"),
    ),
    "dataset.intensity_percentiles": (Condition("dataset.intensity_range", _missing, "set it to null"),),
    "dataset.reduce_zero_label": (Condition("dataset.label_map", _missing, "which tells the classes by itself"),),
    "backbone.seed": (
        Condition("backbone.pretrained", lambda value: not value, "whose weights are not random"),
        Condition("backbone.weights", _missing, "whose weights are not random"),
    ),
    "warmup": (Condition("measure", lambda value: value is not False, "plans have no steps; set measure=true"),),
    "repeats": (Condition("measure", lambda value: value is not False, "plans have no steps; set measure=true"),),
}


def idle_options(given: Collection[str], value: Callable[[str], Any]) -> Iterator[str]:
    """One line for each option that was given and does nothing.

    Args:
        given: dotted keys of the command line.
        value: of a dotted key; None where there is none.
    """
    for key in given:
        for condition in READ_UNDER.get(key, ()):
            other = value(condition.option)
            if value(key) is not None and not condition.holds(other):
                written = "null" if other is None else str(other).lower() if isinstance(other, bool) else other
                yield (
                    f"{key}={value(key)}: does nothing with {condition.option}={written}: {condition.remedy}, or leave "
                    f"out {key}"
                )
