"""A configuration as the words that compose it again, whatever the shipped defaults have become."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from e3va_cli.utils.command_line import to_override_value

COUNTS_CLASSES = ("ade20k", "shapes")  # data sets whose number of classes is an option
FREE = "backbone.model_args"  # its keys are no part of the schema


def overrides_of_config(config: dict[str, Any]) -> list[str]:
    """Return overrides that compose all of a plain configuration: each choice, then every value of its group.

    A variant such as mask_rcnn_nano is its `name` with other values.
    """
    dataset = config["dataset"]
    if dataset["name"] not in COUNTS_CLASSES:  # the annotations tell it; it was once a default that they need not have
        config = {**config, "dataset": {**dataset, "num_classes": None}}
    groups = [name for name, options in config.items() if isinstance(options, dict)]
    choices = [f"{name}={config[name]['name']}" for name in groups if "name" in config[name]]
    return choices + [word for name, value in config.items() for word in _leaves(name, value)]


def _leaves(key: str, value: Any) -> Iterator[str]:
    for name, inner in leaves(key, value):
        yield f"{'++' if name.startswith(FREE) else ''}{name}={to_override_value(inner)}"


def leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every value below `key` that is no dictionary, by dotted key."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(f"{key}.{name}", inner)
    else:
        yield key, value
