"""Build the content of `adapter_config.json` from a run."""

from __future__ import annotations

import csv
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from e3va_cli.config.composition import parse
from e3va_cli.config.run_config import RunConfig
from e3va_cli.export.adapter_checkpoint import EXTRACTOR_PREFIX, AdapterCheckpoint
from e3va_cli.export.adapter_config import FORMAT, METADATA_SCHEMA, VERSION
from e3va_cli.models.model import DenseModel, parameter_counts
from e3va_cli.runs.folder import METRICS, METRICS_HISTORY, read_overrides
from e3va_cli.utils.environment import package_versions

OMITTED_OVERRIDES = ("hydra", "resume", "checkpoint", "budget")  # prefixes of keys that do not affect the weights
SIZE_KEYS = ("short_side", "val_short_side", "train_short_sides", "max_size", "crop_size")  # of datasets, in pixels


def build_adapter_config(checkpoint: AdapterCheckpoint, model: DenseModel, run: Path) -> dict[str, Any]:
    """Return the content of `adapter_config.json` without `weights`, which `write_adapter` adds.

    Args:
        checkpoint: the trained weights.
        model: the model of these weights, which may be on the meta device.
        run: the run folder.
    """
    metadata = checkpoint.metadata
    config = metadata["config"]
    backbone = model.extractor.backbone
    return {
        "format": FORMAT,
        "format_version": VERSION,
        **{key: metadata[key] for key in METADATA_SCHEMA if key != "config"},
        "image_size": {
            **{key: config["dataset"][key] for key in SIZE_KEYS if key in config["dataset"]},
            "largest_in_training": list(checkpoint.config.dataset.largest_image),
        },
        "normalisation": {"mean": list(backbone.mean), "std": list(backbone.std)},
        "parameters": {**count_stored_parameters(checkpoint.state_dict), **parameter_counts(model)},
        "steps": checkpoint.steps,
        "metrics": read_metrics(run, checkpoint.steps),
        "versions": package_versions(),
        "overrides": [
            override
            for override in read_overrides(run)
            if not parse([override])[0].key_or_group.startswith(OMITTED_OVERRIDES)
        ],
        "config": {field.name: config[field.name] for field in fields(RunConfig)},
    }


def count_stored_parameters(state_dict: dict[str, Tensor]) -> dict[str, int]:
    """Count the stored values: all, those of the backbone (adapters, output norms), and those of neck and head."""
    on_backbone = sum(value.numel() for name, value in state_dict.items() if name.startswith(EXTRACTOR_PREFIX))
    stored = sum(value.numel() for value in state_dict.values())
    return {"stored": stored, "stored_on_backbone": on_backbone, "stored_neck_and_head": stored - on_backbone}


def read_metrics(run: Path, steps: int) -> dict[str, Any] | None:
    """Return the metrics after `steps` optimizer steps; None if the run was not evaluated there.

    Those of the last evaluation are complete, from `metrics.json`; earlier ones are those of the history.
    """
    rows: list[dict[str, str]] = []
    if (run / METRICS_HISTORY).is_file():
        with (run / METRICS_HISTORY).open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if any(v and k.startswith("val/") for k, v in row.items() if k)]
    row = next((row for row in reversed(rows) if row["step"] == str(steps - 1)), None)
    if row is None:
        return None
    if row is rows[-1] and (run / METRICS).is_file():
        results: dict[str, Any] = json.loads((run / METRICS).read_text(encoding="utf-8"))
        return results
    metrics: dict[str, Any] = {}
    for key, value in row.items():
        if key.startswith("val/") and value:
            name = key.removeprefix("val/")
            kind, _, metric = name.partition("_")
            if kind in ("box", "mask"):
                metrics.setdefault(kind, {})[metric] = float(value)
            else:
                metrics[name] = float(value)
    return metrics
