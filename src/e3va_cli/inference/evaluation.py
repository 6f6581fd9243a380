"""Evaluate several trained adapters on the same images, with one forward pass of the backbone where they can share it.

They are combined into one model and one evaluator, so that the validation loop of training evaluates them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from e3va_cli.config.run_config import RunConfig, to_dict
from e3va_cli.data import DATASET_FORMATS, Target
from e3va_cli.data.segmentation_transforms import SegmentationTransforms
from e3va_cli.data.transforms import DetectionTransforms
from e3va_cli.errors import UserError
from e3va_cli.evaluation import Evaluator, Results, build_evaluator
from e3va_cli.export.adapter_checkpoint import AdapterCheckpoint, load_trained_weights, read_checkpoint_or_adapter
from e3va_cli.inference.loaded_adapter import LoadedAdapter, adapter_names, image_size
from e3va_cli.inference.predictor import check_same_backbone
from e3va_cli.inference.shared_backbone import Predictions, group_by_input, predict_group
from e3va_cli.models.backbones import build_backbone
from e3va_cli.models.heads import HEADS, Detections, Segmentation
from e3va_cli.models.model import DenseModel, build_from_backbone
from e3va_cli.training.checkpoints import METADATA_KEY, build_metadata, check_metadata
from e3va_cli.training.run import TrainingRun, build_run

OPTION = "checkpoint"  # name of the option in error messages


@dataclass(frozen=True)
class EvalSpec:
    """An adapter to evaluate: its name, its weights, and the configuration of the evaluation."""

    name: str
    checkpoint: AdapterCheckpoint
    config: RunConfig


class MultiModel(nn.Module):
    """Adapters that use images of the same size as one model, which returns the predictions of each by name."""

    def __init__(self, adapters: Sequence[LoadedAdapter]) -> None:
        super().__init__()
        self.models = nn.ModuleList(adapter.model for adapter in adapters)
        self.passes = group_by_input(adapters)

    def predict(self, images: Tensor, image_sizes: list[tuple[int, int]]) -> list[dict[str, Detections | Segmentation]]:
        """Return the predictions for each image by adapter name; arguments as of `DenseModel.predict`."""
        predictions: dict[str, Predictions] = {}
        for adapters in self.passes:
            predictions |= predict_group(adapters, images, image_sizes)
        return [{name: of_images[index] for name, of_images in predictions.items()} for index in range(len(images))]


class MultiEvaluator:
    """The evaluators of several adapters as one `Evaluator`; predictions, states and results are by adapter name."""

    def __init__(self, evaluators: dict[str, Evaluator]) -> None:
        self.evaluators = evaluators
        name, self.first = next(iter(evaluators.items()))
        self.monitor = f"{name}/{self.first.monitor}"

    @property
    def num_images(self) -> int:
        """Return the number of images since the last reset, the same for all evaluators."""
        return self.first.num_images

    def reset(self) -> None:
        """Discard all predictions."""
        for evaluator in self.evaluators.values():
            evaluator.reset()

    def update(self, predictions: dict[str, Detections | Segmentation], target: Target) -> None:
        """Add the predictions of all adapters for one image."""
        for name, evaluator in self.evaluators.items():
            evaluator.update(predictions[name], target)

    def state(self) -> dict[str, Any]:
        """Return the collected predictions in a form that can be pickled."""
        return {name: evaluator.state() for name, evaluator in self.evaluators.items()}

    def merge(self, states: Sequence[dict[str, Any]]) -> None:
        """Replace the collected predictions by those of all ranks, this one included."""
        for name, evaluator in self.evaluators.items():
            evaluator.merge([state[name] for state in states])

    def compute(self) -> Results:
        """Return the results."""
        return {name: evaluator.compute() for name, evaluator in self.evaluators.items()}

    def log_dict(self, results: Results) -> dict[str, float]:
        """Return the results to log, named `adapter/metric`."""
        return {
            f"{name}/{metric}": value
            for name, evaluator in self.evaluators.items()
            for metric, value in evaluator.log_dict(results[name]).items()
        }

    def save(self, folder: Path) -> dict[str, str]:
        """Write the files of each evaluator to a subfolder; return a description of each by its relative path."""
        return {
            f"{name}/{file}": description
            for name, evaluator in self.evaluators.items()
            for file, description in evaluator.save(folder / name).items()
        }


def read_eval_specs(paths: Sequence[str], configs: Sequence[RunConfig]) -> list[EvalSpec]:
    """Read adapters and check that they can be evaluated together.

    Args:
        paths: run folders, checkpoints in them, or exported adapters.
        configs: configuration of the evaluation of each.

    Raises:
        UserError: a file cannot be read, or backbones, datasets or options of the evaluation differ.
    """
    checkpoints = [read_checkpoint_or_adapter(path, OPTION) for path in paths]
    check_same_backbone(checkpoints, OPTION)
    specs = [EvalSpec(*spec) for spec in zip(adapter_names(paths), checkpoints, configs, strict=True)]
    for other in specs[1:]:
        _check_comparable(specs[0], other)
    return specs


def _check_comparable(first: EvalSpec, other: EvalSpec) -> None:
    pair = f"{OPTION}: {first.name} and {other.name} cannot be evaluated together"
    ours, theirs = evaluation_options(first.config), evaluation_options(other.config)
    for spec in (first, other):
        if not HEADS[spec.config.head.name].target_types <= DATASET_FORMATS[ours["dataset"]].target_types:
            raise UserError(
                f"{pair}: dataset={ours['dataset']} does not have the annotations for head={spec.config.head.name} of "
                f"{spec.name}; set a dataset for both, or evaluate them one at a time"
            )
    differing = [key for key, value in ours.items() if theirs.get(key) != value]
    if "dataset" in differing:
        differing = ["dataset"]  # options differ by dataset format
    if differing:
        listed = ", ".join(f"{key}={ours[key]} and {key}={theirs[key]}" for key in differing)
        keys = ", ".join(f"{key}=" for key in differing)
        raise UserError(f"{pair}: {listed}; set {keys} for both, or evaluate them one at a time")
    for key in ("classes", "category_ids"):
        if first.checkpoint.metadata[key] != other.checkpoint.metadata[key]:
            name = key.replace("_", " ")
            raise UserError(f"{pair}: they were trained on different {name}; evaluate them one at a time")


def evaluation_options(config: RunConfig) -> dict[str, Any]:
    """Return the options that affect results beside the model and its image size, by key."""
    dataset, trainer = config.dataset, config.trainer
    resizing = {
        field.name
        for transforms in (DetectionTransforms, SegmentationTransforms)
        if isinstance(dataset, transforms)
        for field in fields(transforms)
    }
    excluded = {"name", "num_classes", *resizing}
    return {
        "dataset": dataset.name,
        **{f"dataset.{k}": v for k, v in to_dict(dataset).items() if k not in excluded and not k.startswith("train_")},
        "data.val_batch_size": config.data.val_batch_size,
        "trainer.precision": trainer.precision,
        "trainer.limit_val_batches": trainer.limit_val_batches,
    }


def group_by_image_size(specs: Sequence[EvalSpec]) -> list[list[EvalSpec]]:
    """Group adapters that use images of the same size."""
    groups: dict[tuple[int, int], list[EvalSpec]] = {}
    for spec in specs:
        groups.setdefault(image_size(spec.config), []).append(spec)
    return list(groups.values())


@dataclass(frozen=True)
class Evaluation:
    """A run whose validation loop evaluates several adapters; evaluators are by adapter name."""

    run: TrainingRun
    adapters: list[LoadedAdapter]
    evaluators: dict[str, Evaluator]

    @property
    def results(self) -> Results:
        """Return the results by adapter name, after the validation."""
        assert self.run.lightning_module.results is not None
        return self.run.lightning_module.results


def build_evaluation(specs: Sequence[EvalSpec], folder: Path) -> Evaluation:
    """Build the evaluation of adapters that use images of the same size.

    Args:
        specs: the adapters.
        folder: for the outputs.

    Raises:
        UserError: the data or the backbone's weights cannot be used, or adapter weights do not fit the model.
    """
    first = next((spec for spec in specs if spec.checkpoint.shares_backbone), specs[0])
    run = build_run(first.config, folder, evaluate_only=True)
    classes, category_ids = run.val.classes, run.val.category_ids
    adapters: list[LoadedAdapter] = []
    evaluators: dict[str, Evaluator] = {}
    for spec in specs:
        model = run.model if spec is first else _build_model(spec, run)
        metadata = build_metadata(model.identity, spec.config, classes, category_ids)
        check_metadata({METADATA_KEY: spec.checkpoint.metadata}, spec.checkpoint.path, metadata)
        load_trained_weights(model, spec.checkpoint)
        adapters.append(LoadedAdapter(spec.name, spec.checkpoint.path, model, spec.config, classes, category_ids))
        target_types = sorted(model.head.target_types)
        evaluators[spec.name] = build_evaluator(first.config.dataset.metric, run.val, target_types)
    run.lightning_module.model = MultiModel(adapters)
    run.lightning_module.evaluator = MultiEvaluator(evaluators)
    return Evaluation(run, adapters, evaluators)


def _build_model(spec: EvalSpec, run: TrainingRun) -> DenseModel:
    """Build the model of an adapter, on the backbone of the run's own model if they can share it."""
    if spec.checkpoint.shares_backbone:
        backbone, identity = run.model.extractor.backbone, run.model.identity
    else:
        backbone, identity = build_backbone(spec.config.backbone)
    return build_from_backbone(spec.config, backbone, identity, len(run.val.classes))
