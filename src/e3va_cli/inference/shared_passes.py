"""Trained adapters in use, and which of them share a pass of their backbone."""

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

Found = Detections | Segmentation


@dataclass(frozen=True)
class Adapter:
    """A trained model and what it takes to use it.

    Attributes:
        name: its run's or folder's; no two that are used together have the same.
        path: what it was read from.
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
        """Detection or segmentation."""
        return "segmentation" if "semantic" in self.model.head.target_types else "detection"

    @property
    def precision(self) -> str:
        """Of its run, `trainer.precision`."""
        return self.config.trainer.precision

    @property
    def resize(self) -> ResizeShortestEdge:
        """How its images are resized, as in evaluation."""
        return resize_of(self.config)

    @property
    def scaling(self) -> IntensityScaling:
        """How its images of more than 8 bits are read, as in training."""
        scaling: IntensityScaling = self.config.dataset.scaling
        return scaling

    @property
    def alone(self) -> str:
        """Why it cannot share a pass of the backbone with others; empty if it can."""
        return exclusive_reason(self.config)


def resize_of(config: RunConfig) -> ResizeShortestEdge:
    """How the images of an evaluation are resized."""
    val: Any = config.dataset.val_transforms()
    (resize,) = (step for step in val.transforms if isinstance(step, ResizeShortestEdge))
    return resize


def image_size(config: RunConfig) -> tuple[int, int]:
    """The short side and the most of the long side, in pixels, that images of an evaluation are resized to."""
    resize = resize_of(config)
    return resize.size, resize.max_size


def exclusive_reason(config: RunConfig) -> str:
    """Why the model of a configuration cannot share a pass of its backbone with others; empty if it can."""
    method = config.adapter.name
    if not can_share_backbone(method):
        return f"on a backbone of its own, which adapter={method} changes"
    return "in passes of its own, as its windows slide" if getattr(config.head, "slide_window", None) else ""


def group_by_input(adapters: Iterable[Adapter]) -> list[list[Adapter]]:
    """The adapters of each pass of a backbone: several where they see the same pixels and none is alone."""
    passes: dict[Any, list[Adapter]] = {}
    for adapter in adapters:
        sees = image_size(adapter.config), adapter.scaling, adapter.precision
        passes.setdefault((sees, adapter.alone and adapter.name), []).append(adapter)
    return list(passes.values())


def find(passes: Iterable[Sequence[Adapter]], batch_for: Callable[[Adapter], Batch]) -> dict[str, Sequence[Found]]:
    """What is found in each image of a batch, by the adapters' names.

    Args:
        passes: of `group_by_input`.
        batch_for: the images as an adapter wants them; asked for once for each pass.
    """
    found: dict[str, Sequence[Found]] = {}
    for adapters in passes:
        batch = batch_for(adapters[0])
        results = predict_shared([adapter.model for adapter in adapters], batch.images, batch.image_sizes)
        found.update(zip((adapter.name for adapter in adapters), results, strict=True))
    return found


def names_of(paths: Iterable[str | Path]) -> list[str]:
    """What adapters read from these paths are called, each otherwise."""
    return unique_names(_name(Path(path)) for path in paths)


def _name(path: Path) -> str:
    """A run's or folder's name; of a checkpoint given by itself, with its own."""
    path = (find_adapter_folder(str(path)) or path).absolute()  # a link keeps the name that it was given by
    path = path.resolve() if path.name == ".." else path
    if path.is_file() and path.parent.name == CHECKPOINTS:
        return f"{path.parent.parent.name}-{path.stem}"
    return path.stem if path.is_file() else path.name


def unique_names(names: Iterable[str]) -> list[str]:
    """The names, numbered where they would be the same: in files too, where upper and lower case may count as one."""
    taken: set[str] = set()
    times: Counter[str] = Counter()
    found = []
    for name in names:
        candidate = name
        while candidate.casefold() in taken:
            times[name.casefold()] += 1
            candidate = f"{name}-{times[name.casefold()] + 1}"
        taken.add(candidate.casefold())
        found.append(candidate)
    return found
