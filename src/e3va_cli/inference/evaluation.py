"""Evaluation of trained adapters on the same images, with one pass of their backbone for all that can share it.

Several are evaluated as one model with one evaluator, so that training's own evaluation serves them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from e3va_cli.config.run_config import RunConfig, to_dict
from e3va_cli.data import DATASET_FORMATS, Batch, Target
from e3va_cli.data.segmentation_transforms import SegmentationTransforms
from e3va_cli.data.transforms import DetectionTransforms
from e3va_cli.errors import UserError
from e3va_cli.evaluation import Evaluator, Results, build_evaluator
from e3va_cli.export.adapter_checkpoint import AdapterCheckpoint, load_trained, read_checkpoint_or_adapter
from e3va_cli.inference.predictor import require_one_backbone
from e3va_cli.inference.shared_backbone import can_share_backbone
from e3va_cli.inference.shared_passes import Adapter, Found, find, group_by_input, image_size, names_of
from e3va_cli.models.backbones import build_backbone
from e3va_cli.models.heads import HEADS
from e3va_cli.models.model import DenseModel, build_from_backbone
from e3va_cli.training.checkpoints import METADATA_KEY, build_metadata, check_metadata
from e3va_cli.training.run import TrainingRun, build_run

OPTION = "checkpoint"


@dataclass(frozen=True)
class EvalSpec:
    """What is to be evaluated: trained weights, what they are called, and the configuration of the evaluation."""

    name: str
    trained: AdapterCheckpoint
    config: RunConfig

    @property
    def can_share_backbone(self) -> bool:
        """Whether others can use the same backbone."""
        return can_share_backbone(self.config.adapter.name)


class MultiModel(nn.Module):
    """Adapters that want images of one size as one model: it finds in an image what each of them finds, by name."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        super().__init__()
        self.models = nn.ModuleList(adapter.model for adapter in adapters)
        self.passes = group_by_input(adapters)

    def predict(self, images: Tensor, image_sizes: list[tuple[int, int]]) -> list[dict[str, Found]]:
        """As `DenseModel.predict`."""
        found = find(self.passes, lambda _: Batch(images, image_sizes, []))
        return [{name: of_all[index] for name, of_all in found.items()} for index in range(len(images))]


class MultiEvaluator:
    """The evaluators of several models as one (`metrics.Evaluator`); all that it takes and gives is by their names."""

    def __init__(self, evaluators: dict[str, Evaluator]) -> None:
        self.evaluators = evaluators
        name, first = next(iter(evaluators.items()))
        self.first, self.monitor = first, f"{name}/{first.monitor}"

    @property
    def num_images(self) -> int:
        """Images that were given since the last reset; all evaluators get the same."""
        return self.first.num_images

    def reset(self) -> None:
        """Forget everything."""
        for evaluator in self.evaluators.values():
            evaluator.reset()

    def update(self, found: dict[str, Found], target: Target) -> None:
        """Add what the models found in one image."""
        for name, evaluator in self.evaluators.items():
            evaluator.update(found[name], target)

    def state(self) -> dict[str, Any]:
        """What was collected."""
        return {name: evaluator.state() for name, evaluator in self.evaluators.items()}

    def merge(self, states: Sequence[dict[str, Any]]) -> None:
        """Take the shares of all processes."""
        for name, evaluator in self.evaluators.items():
            evaluator.merge([state[name] for state in states])

    def compute(self) -> Results:
        """All results."""
        return {name: evaluator.compute() for name, evaluator in self.evaluators.items()}

    def log_dict(self, results: Results) -> dict[str, float]:
        """Those that are worth a curve."""
        return {
            f"{name}/{score}": value
            for name, evaluator in self.evaluators.items()
            for score, value in evaluator.log_dict(results[name]).items()
        }

    def save(self, folder: Path) -> dict[str, str]:
        """The files of each evaluator, in a folder of its name."""
        return {
            f"{name}/{file}": what
            for name, evaluator in self.evaluators.items()
            for file, what in evaluator.save(folder / name).items()
        }


def read_candidates(paths: Sequence[str], configs: Sequence[RunConfig]) -> list[EvalSpec]:
    """What is to be evaluated together, on the data that the configurations agree on.

    Args:
        paths: run folders, checkpoints in them, or exported adapters.
        configs: of the evaluation of each.

    Raises:
        UserError: something cannot be read, backbones differ, or one data set and one way to measure do not do for all.
    """
    trained = [read_checkpoint_or_adapter(path, OPTION) for path in paths]
    require_one_backbone(trained, OPTION)
    candidates = [EvalSpec(*each) for each in zip(names_of(paths), trained, configs, strict=True)]
    for other in candidates[1:]:
        _require_together(candidates[0], other)
    return candidates


def _require_together(first: EvalSpec, other: EvalSpec) -> None:
    pair = f"{OPTION}: {first.name} and {other.name} cannot be evaluated together"
    apart = "or evaluate them one at a time"
    ours, theirs = measured_by(first.config), measured_by(other.config)
    for one in (first, other):
        if not HEADS[one.config.head.name].target_types <= DATASET_FORMATS[ours["dataset"]].target_types:
            raise UserError(
                f"{pair}: they are measured on one data set, and dataset={ours['dataset']} does not suit "
                f"head={one.config.head.name} of {one.name}; give one that suits both, {apart}"
            )
    differing = [key for key, value in ours.items() if theirs.get(key) != value]
    if "dataset" in differing:
        differing = ["dataset"]  # whose options are its own
    if differing:
        listed = ", ".join(f"{key}={ours[key]} and {key}={theirs[key]}" for key in differing)
        raise UserError(f"{pair}: {listed}; give {', '.join(f'{key}=' for key in differing)} for both, {apart}")
    for key in ("classes", "category_ids"):
        if first.trained.about[key] != other.trained.about[key]:
            raise UserError(f"{pair}: they were trained on other {key.replace('_', ' ')}; evaluate them one at a time")


def measured_by(config: RunConfig) -> dict[str, Any]:
    """What any model's results depend on beside the model and the size of its images, by option."""
    dataset, trainer = config.dataset, config.trainer
    resizing = {
        one.name
        for kind in (DetectionTransforms, SegmentationTransforms)
        if isinstance(dataset, kind)
        for one in fields(kind)
    }
    left_out = {"name", "num_classes", *resizing}
    return {
        "dataset": dataset.name,
        **{f"dataset.{k}": v for k, v in to_dict(dataset).items() if k not in left_out and not k.startswith("train_")},
        "data.val_batch_size": config.data.val_batch_size,
        "trainer.precision": trainer.precision,
        "trainer.limit_val_batches": trainer.limit_val_batches,
    }


def by_image_size(candidates: Sequence[EvalSpec]) -> list[list[EvalSpec]]:
    """Those that want images of the same size, together."""
    groups: dict[tuple[int, int], list[EvalSpec]] = {}
    for candidate in candidates:
        groups.setdefault(image_size(candidate.config), []).append(candidate)
    return list(groups.values())


@dataclass(frozen=True)
class Evaluation:
    """A run whose validation measures several adapters; evaluators and results are by their names."""

    run: TrainingRun
    adapters: list[Adapter]
    evaluators: dict[str, Evaluator]

    @property
    def results(self) -> Results:
        """Of each adapter, once they are measured."""
        assert self.run.lightning_module.results is not None
        return self.run.lightning_module.results


def build_evaluation(candidates: Sequence[EvalSpec], folder: Path) -> Evaluation:
    """The evaluation of candidates that want images of one size.

    Raises:
        UserError: data or weights of a backbone that cannot be used, or that what was trained does not fit.
    """
    first = next((one for one in candidates if one.can_share_backbone), candidates[0])
    run = build_run(first.config, folder, evaluate_only=True)
    metric = first.config.dataset.metric
    adapters: list[Adapter] = []
    evaluators: dict[str, Evaluator] = {}
    for one in candidates:
        is_first = one is first
        model = run.model if is_first else _model(one, run)
        about = build_metadata(model.identity, one.config, run.val.classes, run.val.category_ids)
        check_metadata({METADATA_KEY: one.trained.about}, one.trained.path, about)
        load_trained(model, one.trained)
        adapters.append(Adapter(one.name, one.trained.path, model, one.config, run.val.classes, run.val.category_ids))
        kinds = sorted(model.head.target_types)
        evaluators[one.name] = run.lightning_module.evaluator if is_first else build_evaluator(metric, run.val, kinds)
    run.lightning_module.model = cast(DenseModel, MultiModel(adapters))
    run.lightning_module.evaluator = MultiEvaluator(evaluators)
    return Evaluation(run, adapters, evaluators)


def _model(candidate: EvalSpec, run: TrainingRun) -> DenseModel:
    """The model of a candidate, on the backbone of the run's own model if both leave it as it is."""
    if candidate.can_share_backbone:
        backbone, identity = run.model.extractor.backbone, run.model.identity
    else:
        backbone, identity = build_backbone(candidate.config.backbone)
    return build_from_backbone(candidate.config, backbone, identity, len(run.val.classes))
