"""What `adapter_config.json` says of a trained run."""

from __future__ import annotations

import csv
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from e3va_cli.config.composition import parse
from e3va_cli.config.run_config import RunConfig
from e3va_cli.export.adapter_checkpoint import EXTRACTOR, AdapterCheckpoint
from e3va_cli.export.adapter_config import FORMAT, VERSION
from e3va_cli.models.model import DenseModel, parameter_counts
from e3va_cli.runs.folder import METRICS, METRICS_HISTORY, read_overrides
from e3va_cli.utils.environment import package_versions

NOT_OF_TRAINING = ("hydra", "resume", "checkpoint", "budget")
SIZES = ("short_side", "val_short_side", "train_short_sides", "max_size", "crop_size")  # keys of data sets, in pixels


def describe(trained: AdapterCheckpoint, model: DenseModel, run: Path) -> dict[str, Any]:
    """Everything but the entry on the weights' file.

    Args:
        trained: what the run trained.
        model: the model that it belongs in, perhaps as shapes only.
        run: the run's folder.
    """
    about = trained.about
    config = about["config"]
    backbone = model.extractor.backbone
    return {
        "format": FORMAT,
        "format_version": VERSION,
        "backbone": about["backbone"],
        "adapter": about["adapter"],
        "head": about["head"],
        "classes": about["classes"],
        "category_ids": about["category_ids"],
        "image_size": {
            **{key: config["dataset"][key] for key in SIZES if key in config["dataset"]},
            "largest_in_training": list(trained.config.dataset.largest_image),
        },
        "normalisation": {"mean": list(backbone.mean), "std": list(backbone.std)},
        "parameters": {**counts(trained.state), **parameter_counts(model)},
        "steps": trained.steps,
        "metrics": measured(run, trained.steps),
        "versions": package_versions(),
        "overrides": [
            word for word in read_overrides(run) if not parse([word])[0].key_or_group.startswith(NOT_OF_TRAINING)
        ],
        "config": {field.name: config[field.name] for field in fields(RunConfig)},
    }


def counts(state: dict[str, Tensor]) -> dict[str, int]:
    """How many numbers the file holds: all, and those on the backbone (adapters, output norms) and behind it."""
    on_backbone = sum(value.numel() for name, value in state.items() if name.startswith(EXTRACTOR))
    stored = sum(value.numel() for value in state.values())
    return {"stored": stored, "stored_on_backbone": on_backbone, "stored_neck_and_head": stored - on_backbone}


def measured(run: Path, steps: int) -> dict[str, Any] | None:
    """Results of the state after so many steps: all of them where it was evaluated last, else what the history has.

    None where that state was not evaluated.
    """
    rows: list[dict[str, str]] = []
    if (run / METRICS_HISTORY).is_file():
        with (run / METRICS_HISTORY).open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if any(v and k.startswith("val/") for k, v in row.items() if k)]
    if not rows:
        return None
    row = next((row for row in reversed(rows) if row["step"] == str(steps - 1)), None)
    if row is None:
        return None
    if row is rows[-1] and (run / METRICS).is_file():
        results: dict[str, Any] = json.loads((run / METRICS).read_text(encoding="utf-8"))
        return results
    found: dict[str, Any] = {}
    for name, value in row.items():
        if name.startswith("val/") and value:
            kind, _, measure = name.removeprefix("val/").partition("_")
            if kind in ("box", "mask"):
                found.setdefault(kind, {})[measure] = float(value)
            else:
                found[name.removeprefix("val/")] = float(value)
    return found
