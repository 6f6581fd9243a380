"""What an option's value was before the option existed, for adapters, checkpoints and runs that were made then."""

from __future__ import annotations

from typing import Any

EIGHT_OF_16_BITS = {"intensity_range": [0.0, 65535.0], "intensity_percentiles": [0.1, 99.9]}

LEGACY_OPTIONS: dict[str, dict[str, Any]] = {
    "dataset": {
        "coco": EIGHT_OF_16_BITS | {"use_iscrowd": True},
        "voc": EIGHT_OF_16_BITS | {"encoding": "latin-1"},
        "ade20k": EIGHT_OF_16_BITS | {"reduce_zero_label": True, "ignore_index": None, "label_map": None},
    },
}
"""By group: options of all choices, and under a choice's name a dictionary of its own options."""


def fill_legacy_options(config: dict[str, Any]) -> dict[str, Any]:
    """A plain configuration with the options that it lacks at the values that they had before they existed."""
    filled = dict(config)
    for group, table in LEGACY_OPTIONS.items():
        options = config.get(group)
        if isinstance(options, dict):
            of_all = {key: value for key, value in table.items() if not isinstance(value, dict)}
            filled[group] = {**of_all, **table.get(str(options.get("name")), {}), **options}
    return filled
