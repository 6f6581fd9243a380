"""Evaluation of trained adapters on the same images, sharing forward passes of their backbone where possible.

Several are evaluated as one model with one evaluator, by the validation loop of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from e3va_cli.config.run_config import RunConfig, to_dict
from e3va_cli.data import DATASET_FORMATS, Batch, Target
from e3va_cli.data.segmentation_transforms import SegmentationTransforms
from e3va_cli.data.transforms import DetectionTransforms
from e3va_cli.errors import UserError
from e3va_cli.evaluation import Evaluator, Results, build_evaluator
from e3va_cli.export.adapter_checkpoint import AdapterCheckpoint, load_trained, read_checkpoint_or_adapter
from e3va_cli.inference.predictor import check_shared_backbone
from e3va_cli.inference.shared_backbone import can_share_backbone
from e3va_cli.inference.shared_passes import (
    HeadPrediction,
    LoadedAdapter,
    adapter_names,
    eval_image_size,
    group_by_pass,
    predict_groups,
)
from e3va_cli.models.backbones import build_backbone
from e3va_cli.models.heads import HEADS
from e3va_cli.models.model import DenseModel, build_from_backbone
from e3va_cli.training.checkpoints import METADATA_KEY, build_metadata, check_metadata
from e3va_cli.training.run import TrainingRun, build_run

OPTION = "checkpoint"


@dataclass(frozen=True)
class EvalSpec:
    """Trained weights to evaluate, their name, and the configuration of the evaluation."""

    name: str
    trained: AdapterCheckpoint
    config: RunConfig

    @property
    def can_share_backbone(self) -> bool:
        """Return whether others can use the same backbone."""
        return can_share_backbone(self.config.adapter.name)


class MultiModel(nn.Module):
    """Adapters with images of the same size as one model, whose predictions are by the adapters' names."""

    def __init__(self, adapters: Sequence[LoadedAdapter]) -> None:
        super().__init__()
        self.models = nn.ModuleList(adapter.model for adapter in adapters)
        self.groups = group_by_pass(adapters)

    def predict(self, images: Tensor, image_sizes: list[tuple[int, int]]) -> list[dict[str, HeadPrediction]]:
        """Return the predictions for each image, as `DenseModel.predict`, by the adapters' names."""
        predictions = predict_groups(self.groups, lambda _: Batch(images, image_sizes, []))
        return [{name: batch[index] for name, batch in predictions.items()} for index in range(len(images))]


class MultiEvaluator:
    """Several evaluators as one; predictions and results are by their names."""

    def __init__(self, evaluators: dict[str, Evaluator]) -> None:
        self.evaluators = evaluators
        name, first = next(iter(evaluators.items()))
        self.first, self.monitor = first, f"{name}/{first.monitor}"

    @property
    def num_images(self) -> int:
        """Images since the last reset, the same for all evaluators."""
        return self.first.num_images

    def reset(self) -> None:
        """Discard all predictions."""
        for evaluator in self.evaluators.values():
            evaluator.reset()

    def update(self, predictions: dict[str, HeadPrediction], target: Target) -> None:
        """Add the predictions for one image."""
        for name, evaluator in self.evaluators.items():
            evaluator.update(predictions[name], target)

    def state(self) -> dict[str, Any]:
        """Return the collected predictions."""
        return {name: evaluator.state() for name, evaluator in self.evaluators.items()}

    def merge(self, states: Sequence[dict[str, Any]]) -> None:
        """Replace the collected predictions by those of all ranks."""
        for name, evaluator in self.evaluators.items():
            evaluator.merge([state[name] for state in states])

    def compute(self) -> Results:
        """Return all results."""
        return {name: evaluator.compute() for name, evaluator in self.evaluators.items()}

    def log_dict(self, results: Results) -> dict[str, float]:
        """Return the results to log, by name."""
        return {
            f"{name}/{score}": value
            for name, evaluator in self.evaluators.items()
            for score, value in evaluator.log_dict(results[name]).items()
        }

    def save(self, folder: Path) -> dict[str, str]:
        """Write the files of each evaluator to a subfolder with its name; return descriptions by file name."""
        return {
            f"{name}/{file}": what
            for name, evaluator in self.evaluators.items()
            for file, what in evaluator.save(folder / name).items()
        }


def read_eval_specs(paths: Sequence[str], configs: Sequence[RunConfig]) -> list[EvalSpec]:
    """Read the adapters of an evaluation on shared data.

    Args:
        paths: run folders, checkpoints in them, or exported adapters.
        configs: configuration of the evaluation of each.

    Raises:
        UserError: a path cannot be read, or backbones, data or options of the evaluation differ.
    """
    trained = [read_checkpoint_or_adapter(path, OPTION) for path in paths]
    check_shared_backbone(trained, OPTION)
    specs = [EvalSpec(*each) for each in zip(adapter_names(paths), trained, configs, strict=True)]
    for other in specs[1:]:
        _check_compatible(specs[0], other)
    return specs


def _check_compatible(first: EvalSpec, other: EvalSpec) -> None:
    pair = f"{OPTION}: {first.name} and {other.name} cannot be evaluated together"
    hint = "or evaluate them one at a time"
    ours, theirs = shared_options(first.config), shared_options(other.config)
    for one in (first, other):
        if not HEADS[one.config.head.name].target_types <= DATASET_FORMATS[ours["dataset"]].target_types:
            raise UserError(
                f"{pair}: dataset={ours['dataset']} does not have the targets of head={one.config.head.name} "
                f"({one.name}); use a data set for both, {hint}"
            )
    differing = [key for key, value in ours.items() if theirs.get(key) != value]
    if "dataset" in differing:
        differing = ["dataset"]  # whose options are its own
    if differing:
        listed = ", ".join(f"{key}={ours[key]} and {key}={theirs[key]}" for key in differing)
        raise UserError(f"{pair}: {listed}; set {', '.join(f'{key}=' for key in differing)} for both, {hint}")
    for key in ("classes", "category_ids"):
        if first.trained.about[key] != other.trained.about[key]:
            raise UserError(f"{pair}: trained on different {key.replace('_', ' ')}; evaluate them one at a time")


def shared_options(config: RunConfig) -> dict[str, Any]:
    """Return the options that results depend on besides the model and its image size, which must be equal."""
    dataset, trainer = config.dataset, config.trainer
    resizing = {
        one.name
        for kind in (DetectionTransforms, SegmentationTransforms)
        if isinstance(dataset, kind)
        for one in fields(kind)
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
    """Group the specifications by the size of their images."""
    groups: dict[tuple[int, int], list[EvalSpec]] = {}
    for spec in specs:
        groups.setdefault(eval_image_size(spec.config), []).append(spec)
    return list(groups.values())


@dataclass(frozen=True)
class Evaluation:
    """A run whose validation evaluates several adapters; evaluators and results are by their names."""

    run: TrainingRun
    adapters: list[LoadedAdapter]
    evaluators: dict[str, Evaluator]

    @property
    def results(self) -> Results:
        """Return the results of each adapter, after the validation."""
        assert self.run.lightning_module.results is not None
        return self.run.lightning_module.results


def build_evaluation(specs: Sequence[EvalSpec], folder: Path) -> Evaluation:
    """Build the evaluation of adapters with images of the same size.

    Raises:
        UserError: data or backbone weights cannot be used, or trained weights do not match.
    """
    first = next((one for one in specs if one.can_share_backbone), specs[0])
    run = build_run(first.config, folder, evaluate_only=True)
    metric = first.config.dataset.metric
    adapters: list[LoadedAdapter] = []
    evaluators: dict[str, Evaluator] = {}
    for one in specs:
        is_first = one is first
        model = run.model if is_first else _model(one, run)
        metadata = build_metadata(model.identity, one.config, run.val.classes, run.val.category_ids)
        check_metadata({METADATA_KEY: one.trained.about}, one.trained.path, metadata)
        load_trained(model, one.trained)
        adapters.append(
            LoadedAdapter(one.name, one.trained.path, model, one.config, run.val.classes, run.val.category_ids)
        )
        kinds = sorted(model.head.target_types)
        evaluators[one.name] = run.lightning_module.evaluator if is_first else build_evaluator(metric, run.val, kinds)
    run.lightning_module.evaluated_model = MultiModel(adapters)
    run.lightning_module.evaluator = MultiEvaluator(evaluators)
    return Evaluation(run, adapters, evaluators)


def _model(spec: EvalSpec, run: TrainingRun) -> DenseModel:
    """Build the model of an adapter, on the backbone of the run's model if both leave it unchanged."""
    if spec.can_share_backbone:
        backbone, identity = run.model.extractor.backbone, run.model.identity
    else:
        backbone, identity = build_backbone(spec.config.backbone)
    return build_from_backbone(spec.config, backbone, identity, len(run.val.classes))
