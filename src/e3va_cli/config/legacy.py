"""Options that are younger than trained weights: what they were before they existed.

A run, checkpoint or adapter made before an option existed lacks it, and was trained as if it had the value here, which
need not be today's default.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

NO_CROP = {"crop_probability": 0.0, "crop_short_sides": [400, 500, 600], "crop_range": [384, 600]}
LEGACY_OPTIONS: dict[str, dict[str, Any]] = {  # by group; heads and data sets by their name
    "backbone": {"drop_path_rate": 0.1},
    "dataset": {
        "shapes": NO_CROP,
        "coco": NO_CROP | {"filter_empty": False},
        "voc": NO_CROP | {"filter_empty": False},
    },
    "optimizer": {"decay_biases": False},
    "schedule": {"warmup_max_fraction": 1.0},
}
BY_NAME = ("dataset", "head")
OF_TRAINING = re.compile(  # they change nothing of how trained weights are used
    r"backbone\.drop_path_rate|dataset\.(crop_(probability|short_sides|range)|filter_empty)|(optimizer|schedule)\."
)


class LegacyWarning(UserWarning):
    """Weights are used as they were trained, which differs from how new ones are."""


def missing_options(config: dict[str, Any]) -> dict[str, Any]:
    """Return the legacy values of the options that a plain configuration lacks, by dotted key."""
    missing: dict[str, Any] = {}
    for group, options in LEGACY_OPTIONS.items():
        given = config.get(group)
        if isinstance(given, dict):
            missing |= _missing(given, options.get(str(given.get("name")), {}) if group in BY_NAME else options, group)
    return missing


def _missing(given: dict[str, Any], options: Mapping[str, Any], at: str) -> Iterator[tuple[str, Any]]:
    for option, value in options.items():
        if option not in given:
            yield f"{at}.{option}", value
        elif isinstance(value, Mapping) and isinstance(given[option], dict):
            yield from _missing(given[option], value, f"{at}.{option}")


def fill_legacy_options(config: dict[str, Any]) -> dict[str, Any]:
    """Return a plain configuration with the legacy values of the options that it lacks."""
    filled = deepcopy(config)
    for key, value in missing_options(config).items():
        *path, option = key.split(".")
        part = filled
        for name in path:
            part = part[name]
        part[option] = deepcopy(value)
    return filled


def warn_of_legacy_options(place: object, config: dict[str, Any]) -> None:
    """Warn where weights from `place` lack options, with the values that they are used with."""
    missing = {key: value for key, value in missing_options(config).items() if not OF_TRAINING.match(key)}
    if missing:
        listed = ", ".join(f"{key}={str(value).lower()}" for key, value in missing.items())
        warnings.warn(f"{place}: made by an older e3va; used as it was trained, with {listed}", LegacyWarning, 2)
