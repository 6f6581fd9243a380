"""Options that are younger than trained weights: what they were before they existed.

A run, checkpoint or adapter made before an option existed lacks it, and was trained as if it had the value here, which
need not be today's default.
"""

from __future__ import annotations

import warnings
from typing import Any

LEGACY_OPTIONS: dict[str, dict[str, Any]] = {
    "backbone": {"pad_before_shift": False},
}


class LegacyWarning(UserWarning):
    """Weights are used as they were trained, which differs from how new ones are."""


def missing_options(config: dict[str, Any]) -> dict[str, Any]:
    """Return the legacy values of the options that a plain configuration lacks, by dotted key."""
    return {
        f"{group}.{option}": value
        for group, options in LEGACY_OPTIONS.items()
        for option, value in options.items()
        if isinstance(config.get(group), dict) and option not in config[group]
    }


def fill_legacy_options(config: dict[str, Any]) -> dict[str, Any]:
    """Return a plain configuration with the legacy values of the options that it lacks."""
    return {**config, **{group: {**options, **config[group]} for group, options in LEGACY_OPTIONS.items()}}


def warn_of_legacy_options(place: object, config: dict[str, Any]) -> None:
    """Warn where weights from `place` lack options, with the values that they are used with."""
    if missing := missing_options(config):
        listed = ", ".join(f"{key}={str(value).lower()}" for key, value in missing.items())
        warnings.warn(f"{place}: made by an older e3va; used as it was trained, with {listed}", LegacyWarning, 2)
