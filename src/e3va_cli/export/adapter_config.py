"""`adapter_config.json`: read from anywhere, so taken for data and checked before anything is made of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from e3va_cli.components.options import older_options
from e3va_cli.config.run_config import (
    EXPORT_PRECISIONS,
    NEEDED,
    RunConfig,
    errors_in,
    kind_of,
    metadata_in_current_names,
    structured,
    with_older_options,
)
from e3va_cli.errors import UserError, first_line
from e3va_cli.runs.folder import ADAPTER_CONFIG
from e3va_cli.utils.text import is_printable_name, shorten

FORMAT = "e3va-adapter"
VERSION = 1
ABOUT_FORM: dict[str, Any] = {  # a list of one stands for a list of any length
    "backbone": {"name": str, "timm_name": str, "weights": str, "fingerprint": str},
    "adapter": dict,
    "head": dict,
    "classes": [str],
    "category_ids": [int],
    "config": dict,
}
SINGLE_OPTIONS = {"neck": str, "seed": int, "num_visualizations": int}  # that are in no group
CONFIG_FORM = {one.name: SINGLE_OPTIONS.get(one.name, dict) for one in fields(RunConfig)}
FORM: dict[str, Any] = {
    **ABOUT_FORM,
    "format": str,
    "format_version": int,
    "image_size": dict,
    "normalisation": {"mean": [float], "std": [float]},
    "parameters": dict,
    "steps": int,
    "metrics": (dict, type(None)),
    "versions": dict,
    "overrides": [str],
    "weights": {"sha256": str, "bytes": int, "precision": str},
}
LATER_OPTIONS = ("backbone", "adapter", "head", "data", "optimizer", "schedule", "trainer")
"""Where an option may be missing: one that is newer than the run. Building the model tells if it was needed."""
DIGEST = re.compile(r"[0-9a-f]{64}")
HUB_WEIGHTS = ("pretrained", "file", "random")


def config_digest(config: dict[str, Any]) -> str:
    """SHA-256 of everything but the entry on the weights' file, which holds this digest."""
    covered = {key: value for key, value in config.items() if key != "weights"}
    return hashlib.sha256(json.dumps(covered, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """Return the checked content of a folder's `adapter_config.json` under current option names; as `read_written`."""
    return metadata_in_current_names(read_written(folder))


def read_written(folder: Path) -> dict[str, Any]:
    """Return the checked content of a folder's `adapter_config.json` as written, which its digest covers.

    Raises:
        UserError: there is none, or it is not what an export writes; one line with the first thing that is wrong.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: no {ADAPTER_CONFIG} in it; copy the whole exported folder")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({first_line(error)}); export the adapter again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not written by `e3va export-adapter`: its format is not {FORMAT!r}")
    if content.get("format_version") != VERSION:
        raise UserError(
            f"{path}: format_version {content.get('format_version')!r}, but this e3va reads {VERSION}; "
            "use the e3va that wrote it, or export the adapter again"
        )
    found = next(_mistakes(metadata_in_current_names(content)), None)
    if found:
        raise UserError(f"{path}: {found}; it is not as `e3va export-adapter` wrote it")
    return content


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _mistakes(content: dict[str, Any]) -> Iterator[str]:
    """What is wrong, most basic first: a later check relies on the earlier ones."""
    yield from _of_another_form(content, FORM)
    yield from about_mistakes({key: content[key] for key in ABOUT_FORM})
    if not DIGEST.fullmatch(content["weights"]["sha256"]):
        yield "weights.sha256 is no SHA-256"
    if content["weights"]["precision"] not in EXPORT_PRECISIONS:
        yield f"weights.precision is none of {', '.join(EXPORT_PRECISIONS)}"
    for key in ("mean", "std"):
        if len(content["normalisation"][key]) != 3:
            yield f"normalisation.{key} has not one number for each of red, green and blue"


def about_mistakes(content: Any) -> Iterator[str]:
    """What is wrong with what trained weights belong to, as it stands in a checkpoint or an exported adapter."""
    yield from _of_another_form(content, ABOUT_FORM)
    backbone, config = content["backbone"], content["config"]
    yield from _of_another_kind(config)
    if backbone["weights"] not in HUB_WEIGHTS:
        yield f"backbone.weights is none of {', '.join(HUB_WEIGHTS)}"
    if not DIGEST.fullmatch(backbone["fingerprint"]):
        yield "backbone.fingerprint is no SHA-256"
    if not content["classes"]:
        yield "classes is empty"
    if wrong := [name for name in content["classes"] if not is_printable_name(name)]:
        yield f"classes has {shorten(wrong[0])}, which is no name"
    if not len(content["classes"]) == len(content["category_ids"]) == len(set(content["category_ids"])):
        yield "category_ids has not one number of its own for each class"
    for part in ("adapter", "head"):
        if content[part] != config[part]:
            yield f"{part} and config.{part} contradict each other"
    for key in ("name", "timm_name"):
        if backbone[key] != config["backbone"][key]:
            yield f"backbone.{key} and config.backbone.{key} contradict each other"


def _of_another_form(value: Any, form: Any, at: str = "") -> Iterator[str]:
    """Keys and types of JSON that are not those of `form`."""
    if isinstance(form, dict):
        if not isinstance(value, dict):
            yield f"{at or 'the whole'} is no object"
            return
        for wrong, keys in (("is missing", form.keys() - value.keys()), ("is unknown", value.keys() - form.keys())):
            for key in sorted(keys):
                yield f"{at}{'.' if at else ''}{key} {wrong}"
        for key in form:
            yield from _of_another_form(value[key], form[key], f"{at}{'.' if at else ''}{key}")
    elif isinstance(form, list):
        if not isinstance(value, list):
            yield f"{at} is no list"
            return
        for index, entry in enumerate(value):
            yield from _of_another_form(entry, form[0], f"{at}[{index}]")
    elif isinstance(value, bool) or not isinstance(value, (int, float) if form is float else form):
        yield f"{at} is of the wrong type ({type(value).__name__})"


def _of_another_kind(config: dict[str, Any]) -> Iterator[str]:
    """Parts of the run's configuration that the schema does not allow."""
    older = {key: value for key, value, _ in older_options(RunConfig, config)}
    yield from _of_another_form({**older, **config}, CONFIG_FORM, "config")
    for at, text in _texts(config, "config"):
        if "${" in text:  # would be looked up in the environment
            yield f"{at} is no plain text"
    config = with_older_options(config)
    for group, options in config.items():
        if not isinstance(options, dict):
            continue
        kind = kind_of(group, options)
        if kind is None:
            yield f"config.{group}.name={options.get('name')}: no such {group}"
            return
        try:
            typed = cast(DictConfig, OmegaConf.merge(OmegaConf.structured(kind), options))
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            yield f"config.{group}: {first_line(error)}"
            return
        missing = sorted(OmegaConf.missing_keys(typed)) or sorted(set(typed) - options.keys())
        if group in LATER_OPTIONS:
            missing = [key for key in missing if "." in key]
        if missing:
            yield f"config.{group}.{missing[0]} is missing"
            return
        if _differs(OmegaConf.to_container(typed), options):
            yield f"config.{group} has values of the wrong type"
            return
    yield from (f"config.{error}" for error in errors_in(structured(config)) if not error.endswith(NEEDED))


def _differs(typed: Any, given: Any) -> bool:
    """Whether what is given was changed to make it fit its type."""
    if isinstance(typed, dict) and isinstance(given, dict):
        return any(_differs(typed[key], value) for key, value in given.items())
    return bool(typed != given)


def _texts(value: Any, at: str) -> Iterator[tuple[str, str]]:
    """Every text in a JSON value, keys included, with its place."""
    if isinstance(value, str):
        yield at, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield at, key
            yield from _texts(inner, f"{at}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, at)
