"""Trained models with the names and settings to run them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e3va_cli.config.run_config import RunConfig
from e3va_cli.data.images.intensity import IntensityScaling
from e3va_cli.data.transforms import ResizeShortestEdge
from e3va_cli.models.model import DenseModel
from e3va_cli.runs.folder import CHECKPOINTS, find_adapter_folder


@dataclass(frozen=True)
class LoadedAdapter:
    """A trained model on its backbone.

    Attributes:
        name: unique among the adapters that are used together; by default of its run or folder.
        path: of the checkpoint or the adapter folder.
        model: in eval mode.
        config: of the model and its data.
        classes, category_ids: of label k at index k - 1.
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
        """Return `trainer.precision` of the run."""
        return self.config.trainer.precision

    @property
    def resize(self) -> ResizeShortestEdge:
        """Return the resizing of validation images."""
        return val_resize(self.config)

    @property
    def scaling(self) -> IntensityScaling:
        """Return the conversion of images with more than 8 bits, as in training."""
        scaling: IntensityScaling = self.config.dataset.scaling
        return scaling

    @property
    def exclusive_reason(self) -> str:
        """Return why the model cannot share a forward pass of the backbone; empty if it can."""
        if not self.model.extractor.shares_backbone:
            return f"separate backbone, as adapter={self.config.adapter.name} changes its features"
        return (
            "separate forward passes, one per sliding window" if getattr(self.config.head, "slide_window", None) else ""
        )


def val_resize(config: RunConfig) -> ResizeShortestEdge:
    """Return the resizing of validation images."""
    val: Any = config.dataset.val_transforms()
    (resize,) = (step for step in val.transforms if isinstance(step, ResizeShortestEdge))
    return resize


def image_size(config: RunConfig) -> tuple[int, int]:
    """Return the short side and the maximum long side of validation images, in pixels."""
    resize = val_resize(config)
    return resize.size, resize.max_size


def adapter_names(paths: Iterable[str | Path]) -> list[str]:
    """Return a unique name for each path: of its run or folder, followed by that of the checkpoint if one is given."""
    return unique_names(_adapter_name(Path(path)) for path in paths)


def _adapter_name(path: Path) -> str:
    path = (find_adapter_folder(str(path)) or path).absolute()  # not resolved: a symbolic link gives its own name
    path = path.resolve() if path.name == ".." else path
    if path.is_file() and path.parent.name == CHECKPOINTS:
        return f"{path.parent.parent.name}-{path.stem}"
    return path.stem if path.is_file() else path.name


def unique_names(names: Iterable[str]) -> list[str]:
    """Number duplicate names; case is ignored, as file systems may ignore it."""
    used: set[str] = set()
    numbers: dict[str, int] = {}
    result = []
    for name in names:
        unique = name
        while unique.casefold() in used:
            number = numbers[name.casefold()] = numbers.get(name.casefold(), 1) + 1
            unique = f"{name}-{number}"
        used.add(unique.casefold())
        result.append(unique)
    return result
