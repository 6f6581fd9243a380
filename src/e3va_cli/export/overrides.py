"""A configuration as the words that compose it again, whatever the shipped defaults have become."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from e3va_cli.command_line import as_value

MODEL = ("backbone", "adapter", "head")
MEASURED_WITH = ("precision", "limit_val_batches")  # of the trainer
COUNTS_CLASSES = ("ade20k", "shapes")  # data sets whose number of classes is an option
FREE = "backbone.model_args"  # its keys are no part of the schema


def model_words(config: dict[str, Any]) -> list[str]:
    """Overrides that make the backbone, adapter and head of a plain configuration."""
    return [word for group in MODEL for word in _group(config, group)]


def evaluation_words(config: dict[str, Any]) -> list[str]:
    """Overrides that make all of a plain configuration that an evaluation depends on."""
    trainer = {key: config["trainer"][key] for key in MEASURED_WITH if key in config["trainer"]}
    measured: dict[str, Any] = {key: config[key] for key in ("data", "seed", "pictures")} | {"trainer": trainer}
    dataset = dict(config["dataset"])
    if dataset["name"] not in COUNTS_CLASSES:
        dataset["num_classes"] = None  # the annotations tell it; it was once a default that they did not have to have
    words = [*model_words(config), *_group({"dataset": dataset}, "dataset")]
    return words + [word for key, value in measured.items() for word in _leaves(key, value)]


def _group(config: dict[str, Any], group: str) -> Iterator[str]:
    """The choice, then every value: a variant such as mask_rcnn_nano is its `name` with other values."""
    yield f"{group}={config[group]['name']}"
    yield from _leaves(group, config[group])


def _leaves(key: str, value: Any) -> Iterator[str]:
    for name, inner in leaves(key, value):
        yield f"{'++' if name.startswith(FREE) else ''}{name}={as_value(inner)}"


def leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every value below `key` that is no dictionary, by dotted key."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(f"{key}.{name}", inner)
    else:
        yield key, value
