"""Options that are newer than some trained weights, with the value that stands for what was done before them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LEGACY_OPTIONS: dict[str, dict[str, Any]] = {  # by group; heads by their name
    "head": {
        "mask_rcnn": {"rpn": {"inside_only": False, "exact_anchors": False}},
        "cascade_mask_rcnn": {
            "rpn": {"inside_only": False, "exact_anchors": False},
            "box": {"class_agnostic": True, "aligned": False, "score_averaging": "probabilities"},
            "mask": {"aligned": False},
        },
        "retinanet": {"p6_from": "p5", "exact_anchors": False},
    },
}


def fill_legacy_options(config: dict[str, Any]) -> None:
    """Add to the plain configuration of a run, in place, the options that are newer than it."""
    for group, options in LEGACY_OPTIONS.items():
        part = config.get(group)
        if isinstance(part, dict):
            _fill(part, options.get(part.get("name"), {}) if group == "head" else options)


def _fill(config: dict[str, Any], options: Mapping[str, Any]) -> None:
    for key, value in options.items():
        if not isinstance(value, Mapping):
            config.setdefault(key, value)
        elif isinstance(config.get(key), dict):
            _fill(config[key], value)
