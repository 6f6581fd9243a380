"""Normalization of COCO values that tools write differently: numbers as strings or floats, booleans for 0 and 1."""

from __future__ import annotations

import re
from typing import Any

Entry = dict[str, Any]

WHOLE = re.compile(r"\s*[+-]?\d{1,19}\s*", re.ASCII)
NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*", re.ASCII | re.IGNORECASE)
FLAGS = {"": 0, "0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}
MAX_EXACT = 2.0**53  # of integers in a float


def normalize_images(entries: list[Entry]) -> None:
    """Convert ids and sizes of images to integers, in place; other values are unchanged."""
    for entry in entries:
        _replace(entry, ("id", "height", "width"))


def normalize_categories(entries: list[Entry]) -> None:
    """Convert ids of categories to integers and numeric names to strings, in place."""
    for entry in entries:
        _replace(entry, ("id",))
        if type(entry.get("name")) in (int, float):
            entry["name"] = str(entry["name"])


def normalize_annotations(entries: list[Entry]) -> None:
    """Convert the numbers of annotations, in place; other values are unchanged."""
    for entry in entries:
        _replace(entry, ("id", "image_id", "category_id"))
        if entry.get("iscrowd") is not None and type(entry["iscrowd"]) is not int:
            entry["iscrowd"] = _flag(entry["iscrowd"])
        if type(entry.get("area")) is str:
            entry["area"] = _number(entry["area"])
        box, segmentation = entry.get("bbox"), entry.get("segmentation")
        if type(box) is list and str in map(type, box):
            entry["bbox"] = list(map(_number, box))
        if type(segmentation) is list and any(type(p) is list and p and type(p[0]) is str for p in segmentation):
            entry["segmentation"] = [list(map(_number, p)) if type(p) is list else p for p in segmentation]


def _replace(entry: Entry, keys: tuple[str, ...]) -> None:
    for key in keys:
        value: Any = entry.get(key)
        if type(value) is not int and _is_whole(value):
            entry[key] = int(value)


def _is_whole(value: Any) -> bool:
    if type(value) is float:
        return value.is_integer() and abs(value) <= MAX_EXACT
    return type(value) is str and WHOLE.fullmatch(value) is not None


def _number(value: Any) -> Any:
    return float(value) if type(value) is str and NUMBER.fullmatch(value) else value


def _flag(value: Any) -> Any:
    return FLAGS.get(str(value).strip().lower(), value) if isinstance(value, str | bool | float) else value
