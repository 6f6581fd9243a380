"""Initialize a model for training with the weights that another run has trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from e3va_cli.errors import UserError
from e3va_cli.export.adapter_checkpoint import EXTRACTOR_PREFIX, AdapterCheckpoint, build_trained_meta_model
from e3va_cli.models.heads import ClassRows, Head
from e3va_cli.models.model import DenseModel
from e3va_cli.training.checkpoints import backbone_errors, checkpoint_options, trainable_state_dict
from e3va_cli.utils.command_line import to_override_value

HEAD_PREFIX = "head."
PARTS = {  # by prefix of the weights' names; the first that fits
    f"{EXTRACTOR_PREFIX}norms.": "output norms",
    f"{EXTRACTOR_PREFIX}backbone.": "backbone",
    EXTRACTOR_PREFIX: "adapters",
    f"{HEAD_PREFIX}neck.": "neck",
    "rescale.": "neck",
    HEAD_PREFIX: "head",
}


@dataclass(frozen=True)
class Initialization:
    """What of a model comes from another run; the rest is as it was.

    Attributes:
        path: of the checkpoint or the adapter folder.
        steps: number of its optimizer steps.
        loaded: number of tensors loaded from it, by part of the model.
        matched_classes: classes whose rows were loaded.
        new_classes: the other classes of the model.
        fresh: weights that were not loaded, and why.
    """

    path: Path
    steps: int
    loaded: dict[str, int]
    matched_classes: list[str]
    new_classes: list[str]
    fresh: dict[str, str]


def part_of(name: str) -> str:
    """Return the part of a model that a weight belongs to."""
    return next(part for prefix, part in PARTS.items() if name.startswith(prefix))


def initialize(model: DenseModel, checkpoint: AdapterCheckpoint, metadata: dict[str, Any]) -> Initialization:
    """Copy the weights of a run into a model where name and shape agree, and rows of classes by the classes' names.

    A layer is copied as a whole or not at all. Adapters need the backbone and the options that they were trained with,
    a neck the same outputs of the backbone.

    Args:
        model: to be trained.
        checkpoint: of the run.
        metadata: of the model, as `build_metadata` returns it.

    Raises:
        UserError: adapters were trained on another backbone, or no weight fits.
    """
    trained = build_trained_meta_model(checkpoint)
    target, source = trainable_state_dict(model), checkpoint.state_dict
    rows, their_rows = class_rows_by_weight(model.head), class_rows_by_weight(trained.head)
    pairs = matching_classes(checkpoint.metadata["classes"], metadata["classes"])
    unfit = dict(unfit_parts(model, trained, checkpoint, metadata))
    reasons: dict[str, str] = {}  # by layer
    for name, weight in target.items():
        layer = name.rpartition(".")[0]
        layouts = rows.get(name), their_rows.get(name)
        reason = unfit.get(part_of(name)) or mismatch(source.get(name), weight, *layouts, any_class=bool(pairs))
        reasons[layer] = reasons.get(layer) or reason
    loaded: Counter[str] = Counter()
    fresh: dict[str, str] = {}
    for name, weight in target.items():
        if reason := reasons[name.rpartition(".")[0]]:
            fresh[name] = reason
            continue
        loaded[part_of(name)] += 1
        if name in rows:
            copy_class_rows(source[name], weight, rows[name], pairs)
        else:
            weight.copy_(source[name])
    if not loaded:
        why = "; ".join(dict.fromkeys(fresh.values()))
        raise UserError(
            f"init_from={checkpoint.path}: none of its weights fits this model ({why}); use the adapter and head that "
            "they were trained with, and their options"
        )
    matched = {label for _, label in pairs} if rows.keys() - fresh.keys() else set()
    classes = list(enumerate(metadata["classes"]))
    return Initialization(
        checkpoint.path,
        checkpoint.steps,
        dict(loaded),
        [name for label, name in classes if label in matched],
        [name for label, name in classes if label not in matched],
        fresh,
    )


def matching_classes(source: list[str], target: list[str]) -> list[tuple[int, int]]:
    """Return the indices of classes of the same name in two lists; equal lists match also where names repeat."""
    if source == target:
        return [(label, label) for label in range(len(target))]
    return [(source.index(name), label) for label, name in enumerate(target) if name in source]


def mismatch(
    source: Tensor | None, target: Tensor, rows: ClassRows | None, source_rows: ClassRows | None, *, any_class: bool
) -> str:
    """Return why a weight cannot have the values of another, or an empty string.

    Args:
        source, target: the weights; None if there is none of that name.
        rows, source_rows: how classes divide `target` and `source`; None if they do not.
        any_class: whether the models have a class in common.
    """
    if source is None:
        return "not in the source"
    if rows != source_rows:
        return "other rows of each class in the source"
    if rows is not None and not rows.background and not any_class:
        return "no class in common"
    shapes = [one.shape if rows is None else rows.split(one).shape[2:] for one in (source, target)]
    return "" if shapes[0] == shapes[1] else "another shape in the source"


def unfit_parts(
    model: DenseModel, trained: DenseModel, checkpoint: AdapterCheckpoint, metadata: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    """Yield parts of a model that cannot have the weights of a run, whatever their shapes, with the reason.

    Raises:
        UserError: adapters were trained on another backbone.
    """
    saved = checkpoint.metadata
    has_adapters = any(part_of(name) in ("adapters", "backbone") for name in checkpoint.state_dict)
    other_backbone = list(backbone_errors(checkpoint.path, saved, metadata))
    if has_adapters and other_backbone:
        raise UserError(*other_backbone)
    theirs, ours = (checkpoint_options("adapter", one["adapter"]) for one in (saved, metadata))
    differing = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
    reason = ""
    if other_backbone:
        reason = "trained on another backbone"
    elif has_adapters and theirs["name"] != ours["name"]:
        reason = f"trained with adapter={theirs['name']}"
    elif has_adapters and differing:
        options = (f"adapter.{key}={to_override_value(theirs[key])}" for key in differing if key in theirs)
        reason = f"trained with {' '.join(options)}"
    if reason:
        yield from ((part, reason) for part in ("output norms", "backbone", "adapters"))
    if checkpoint.config.neck != metadata["config"]["neck"]:
        yield "neck", f"trained with neck={checkpoint.config.neck}"
    elif model.head.out_indices != trained.head.out_indices:
        yield "neck", f"trained with head={saved['head']['name']}"


def class_rows_by_weight(head: Head) -> dict[str, ClassRows]:
    """Return the weights of a model that have rows for each class."""
    return {
        f"{HEAD_PREFIX}{layer}.{name}": rows for layer, rows in head.class_rows().items() for name in ("weight", "bias")
    }


def copy_class_rows(source: Tensor, target: Tensor, rows: ClassRows, pairs: list[tuple[int, int]]) -> None:
    """Copy the rows of background, and of classes by `pairs` of their indices from 0 in both weights."""
    old, new = rows.split(source), rows.split(target)  # groups, classes, rows, ...
    for a, b in [(0, 0), *((a + 1, b + 1) for a, b in pairs)] if rows.background else pairs:
        new[:, b] = old[:, a]
