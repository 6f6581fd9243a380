"""Read and validate `adapter_config.json`, an untrusted file, before a model is built from it."""

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
METADATA_SCHEMA: dict[str, Any] = {  # [type] is a list of any length
    "backbone": {"name": str, "timm_name": str, "weights": str, "fingerprint": str},
    "adapter": dict,
    "head": dict,
    "classes": [str],
    "category_ids": [int],
    "config": dict,
}
UNGROUPED = {"neck": str, "seed": int, "num_visualizations": int}  # options that are in no group
CONFIG_SCHEMA = {one.name: UNGROUPED.get(one.name, dict) for one in fields(RunConfig)}
SCHEMA: dict[str, Any] = {
    **METADATA_SCHEMA,
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
# Their options may be missing if they were added after the run; building the model fails if one is required.
EXTENSIBLE_GROUPS = ("backbone", "adapter", "head", "data", "optimizer", "schedule", "trainer")
SHA256 = re.compile(r"[0-9a-f]{64}")
WEIGHT_SOURCES = ("pretrained", "file", "random")


def config_digest(config: dict[str, Any]) -> str:
    """Return the SHA-256 of all entries but `weights`, whose file has this digest in its metadata."""
    covered = {key: value for key, value in config.items() if key != "weights"}
    return hashlib.sha256(json.dumps(covered, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of `adapter_config.json` under current option names; raises as `read_raw_config`."""
    return metadata_in_current_names(read_raw_config(folder))


def read_raw_config(folder: Path) -> dict[str, Any]:
    """Return the validated content of `adapter_config.json` as written, which its digest covers.

    Raises:
        UserError: it is missing or invalid; one line with the first error.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: {ADAPTER_CONFIG} is missing; copy the whole exported folder")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_reject_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({first_line(error)}); export the adapter again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(
            f"{path}: not an exported adapter: its format is not {FORMAT!r}; use the output of `e3va export-adapter`"
        )
    if content.get("format_version") != VERSION:
        raise UserError(
            f"{path}: format_version {content.get('format_version')!r}, but this e3va reads {VERSION}; "
            "use the version of e3va that wrote it, or export the adapter again"
        )
    if message := next(_content_errors(metadata_in_current_names(content)), None):
        raise UserError(f"{path}: {message}; export the adapter again")
    return content


def _reject_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _content_errors(content: dict[str, Any]) -> Iterator[str]:
    """Yield errors; a later check assumes that the earlier ones found none, so stop at the first."""
    yield from _schema_errors(content, SCHEMA)
    yield from metadata_errors({key: content[key] for key in METADATA_SCHEMA})
    if not SHA256.fullmatch(content["weights"]["sha256"]):
        yield "weights.sha256 is not a SHA-256"
    if content["weights"]["precision"] not in EXPORT_PRECISIONS:
        yield f"weights.precision is not one of {', '.join(EXPORT_PRECISIONS)}"
    for key in ("mean", "std"):
        if len(content["normalisation"][key]) != 3:
            yield f"normalisation.{key} must have 3 numbers, for RGB"


def metadata_errors(content: Any) -> Iterator[str]:
    """Yield errors of the metadata of a checkpoint or an exported adapter; stop at the first, as `_content_errors`."""
    yield from _schema_errors(content, METADATA_SCHEMA)
    backbone, config = content["backbone"], content["config"]
    yield from _config_errors(config)
    if backbone["weights"] not in WEIGHT_SOURCES:
        yield f"backbone.weights is not one of {', '.join(WEIGHT_SOURCES)}"
    if not SHA256.fullmatch(backbone["fingerprint"]):
        yield "backbone.fingerprint is not a SHA-256"
    if not content["classes"]:
        yield "classes is empty"
    if wrong := [name for name in content["classes"] if not is_printable_name(name)]:
        yield f"classes has {shorten(wrong[0])}, which is not a printable name"
    if not len(content["classes"]) == len(content["category_ids"]) == len(set(content["category_ids"])):
        yield "category_ids must have one unique number per class"
    for part in ("adapter", "head"):
        if content[part] != config[part]:
            yield f"{part} and config.{part} differ"
    for key in ("name", "timm_name"):
        if backbone[key] != config["backbone"][key]:
            yield f"backbone.{key} and config.backbone.{key} differ"


def _schema_errors(value: Any, schema: Any, at: str = "") -> Iterator[str]:
    """Yield keys of a JSON value that are missing or unknown in `schema`, and values of other types."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            yield f"{at or 'the content'} is not an object"
            return
        for error, keys in (("is missing", schema.keys() - value.keys()), ("is unknown", value.keys() - schema.keys())):
            for key in sorted(keys):
                yield f"{at}{'.' if at else ''}{key} {error}"
        for key in schema:
            yield from _schema_errors(value[key], schema[key], f"{at}{'.' if at else ''}{key}")
    elif isinstance(schema, list):
        if not isinstance(value, list):
            yield f"{at} is not a list"
            return
        for index, entry in enumerate(value):
            yield from _schema_errors(entry, schema[0], f"{at}[{index}]")
    elif isinstance(value, bool) or not isinstance(value, (int, float) if schema is float else schema):
        yield f"{at} has the wrong type ({type(value).__name__})"


def _config_errors(config: dict[str, Any]) -> Iterator[str]:
    """Yield errors of the run's configuration: keys, types and values of options."""
    older = {key: value for key, value, _ in older_options(RunConfig, config)}
    yield from _schema_errors({**older, **config}, CONFIG_SCHEMA, "config")
    for at, text in _strings(config, "config"):
        if "${" in text:  # OmegaConf would read environment variables
            yield f"{at} has an interpolation ${{...}}, which is not allowed"
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
        if group in EXTENSIBLE_GROUPS:
            missing = [key for key in missing if "." in key]
        if missing:
            yield f"config.{group}.{missing[0]} is missing"
            return
        if _was_converted(OmegaConf.to_container(typed), options):
            yield f"config.{group} has values of the wrong type"
            return
    yield from (f"config.{error}" for error in errors_in(structured(config)) if not error.endswith(NEEDED))


def _was_converted(typed: Any, given: Any) -> bool:
    """Return whether a value was converted to fit its type."""
    if isinstance(typed, dict) and isinstance(given, dict):
        return any(_was_converted(typed[key], value) for key, value in given.items())
    return bool(typed != given)


def _strings(value: Any, at: str) -> Iterator[tuple[str, str]]:
    """Yield the strings of a JSON value, keys included, with their locations."""
    if isinstance(value, str):
        yield at, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield at, key
            yield from _strings(inner, f"{at}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, at)
