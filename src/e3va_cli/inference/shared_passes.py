"""Loaded adapters, and groups of them that share a forward pass of their backbone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e3va_cli.config.run_config import RunConfig
from e3va_cli.data import Batch
from e3va_cli.data.images.intensity import IntensityScaling
from e3va_cli.data.transforms import ResizeShortestEdge
from e3va_cli.inference.shared_backbone import can_share_backbone, predict_shared
from e3va_cli.models.heads import Detections, Segmentation
from e3va_cli.models.model import DenseModel
from e3va_cli.runs.folder import CHECKPOINTS, find_adapter_folder

HeadPrediction = Detections | Segmentation


@dataclass(frozen=True)
class LoadedAdapter:
    """A trained model with its configuration.

    Attributes:
        name: of its run or folder, unique among the adapters that are used together.
        path: the file or folder that it was loaded from.
        model: in eval mode.
        config: of the run.
        classes, category_ids: those of label k at index k - 1.
    """

    name: str
    path: Path
    model: DenseModel
    config: RunConfig
    classes: list[str]
    category_ids: list[int]

    @property
    def task(self) -> str:
        """Return `detection` or `segmentation`."""
        return "segmentation" if "semantic" in self.model.head.target_types else "detection"

    @property
    def precision(self) -> str:
        """Return `trainer.precision` of its run."""
        return self.config.trainer.precision

    @property
    def resize(self) -> ResizeShortestEdge:
        """Return the resizing of images, as in evaluation."""
        return eval_resize(self.config)

    @property
    def scaling(self) -> IntensityScaling:
        """Return the scaling of images of more than 8 bits, as in training."""
        scaling: IntensityScaling = self.config.dataset.scaling
        return scaling

    @property
    def exclusive_reason(self) -> str:
        """Return why it cannot share a forward pass of the backbone; empty if it can."""
        method = self.config.adapter.name
        if not can_share_backbone(method):
            return f"on a backbone of its own, which adapter={method} changes"
        return (
            "in passes of its own, for its sliding windows" if getattr(self.config.head, "slide_window", None) else ""
        )


def eval_resize(config: RunConfig) -> ResizeShortestEdge:
    """Return the resizing of images in evaluation."""
    val: Any = config.dataset.val_transforms()
    (resize,) = (step for step in val.transforms if isinstance(step, ResizeShortestEdge))
    return resize


def eval_image_size(config: RunConfig) -> tuple[int, int]:
    """Return the short side and the maximum of the long side of images in evaluation, in pixels."""
    resize = eval_resize(config)
    return resize.size, resize.max_size


def group_by_pass(adapters: Iterable[LoadedAdapter]) -> list[list[LoadedAdapter]]:
    """Group adapters that can share a forward pass of the backbone: same input pixels, precision and backbone."""
    groups: dict[Any, list[LoadedAdapter]] = {}
    for adapter in adapters:
        inputs = eval_image_size(adapter.config), adapter.scaling, adapter.precision
        groups.setdefault((inputs, adapter.exclusive_reason and adapter.name), []).append(adapter)
    return list(groups.values())


def predict_groups(
    groups: Iterable[Sequence[LoadedAdapter]], batch_for: Callable[[LoadedAdapter], Batch]
) -> dict[str, Sequence[HeadPrediction]]:
    """Return the predictions of each adapter for each image of a batch, by the adapter's name.

    Args:
        groups: of `group_by_pass`.
        batch_for: returns the images as an adapter expects them; called once per group.
    """
    predictions: dict[str, Sequence[HeadPrediction]] = {}
    for adapters in groups:
        batch = batch_for(adapters[0])
        results = predict_shared([adapter.model for adapter in adapters], batch.images, batch.image_sizes)
        predictions.update(zip((adapter.name for adapter in adapters), results, strict=True))
    return predictions


def adapter_names(paths: Iterable[str | Path]) -> list[str]:
    """Return a unique name for the adapter of each path."""
    return unique_names(_adapter_name(Path(path)) for path in paths)


def _adapter_name(path: Path) -> str:
    """Return the name of a run or folder, with that of the file for a checkpoint."""
    path = (find_adapter_folder(str(path)) or path).absolute()  # a link keeps its name
    path = path.resolve() if path.name == ".." else path
    if path.is_file() and path.parent.name == CHECKPOINTS:
        return f"{path.parent.parent.name}-{path.stem}"
    return path.stem if path.is_file() else path.name


def unique_names(names: Iterable[str]) -> list[str]:
    """Return the names, numbered where they are equal, as file names without upper and lower case too."""
    taken: set[str] = set()
    counts: Counter[str] = Counter()
    unique = []
    for name in names:
        candidate = name
        while candidate.casefold() in taken:
            counts[name.casefold()] += 1
            candidate = f"{name}-{counts[name.casefold()] + 1}"
        taken.add(candidate.casefold())
        unique.append(candidate)
    return unique
