"""Predictions of several models that share one forward pass of a frozen backbone.

Neither E3VA's highway nor a head on the frozen features changes the activations of the backbone, so that all these
models can use the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from e3va_cli.inference.loaded_adapter import LoadedAdapter, image_size
from e3va_cli.models.adapters import FeatureExtractor
from e3va_cli.models.adapters.frozen import Frozen
from e3va_cli.models.adapters.highway import Highway, HighwayExtractor, forward_shared_backbone
from e3va_cli.models.heads import Detections, Segmentation
from e3va_cli.models.model import DenseModel

Predictions = list[Detections] | list[Segmentation]  # one per image


class FrozenHighway:
    """The features of a frozen backbone as a highway that adds the outputs of its branches unchanged."""

    def __init__(self, frozen: Frozen) -> None:
        self.backbone, self.out_indices, self.output = frozen.backbone, frozen.out_indices, frozen.output
        self.adapters = [[add_unchanged for _ in stage.branches] for stage in frozen.backbone.stages]


def add_unchanged(highway: Tensor, z: Tensor, x: Tensor) -> Tensor:
    """Add z to the highway in place; all (B, H, W, C)."""
    return highway.add_(z)


@torch.no_grad()
def predict_shared(
    models: Sequence[DenseModel], images: Tensor, image_sizes: list[tuple[int, int]]
) -> list[Predictions]:
    """Return the same as `DenseModel.predict` of each model, with one forward pass of the backbone.

    Args:
        models: any one model, or several on the same backbone module whose extractors have `shares_backbone` and whose
            heads use the features of whole images once.
        images: uint8 (B, 3, H, W), padded from `image_sizes`.
        image_sizes: (height, width) of each image before padding.
    """
    if len(models) == 1:
        return [models[0].predict(images, image_sizes)]
    batch = models[0].normalize(images, image_sizes)
    features = forward_shared_backbone([_to_highway(model.extractor) for model in models], batch.tensors)
    rescaled = [model.rescale(of_model) for model, of_model in zip(models, features, strict=True)]
    return [model.head.predict(lambda _: rescaled.pop(0), batch) for model in models]


def _to_highway(extractor: FeatureExtractor) -> Highway:
    if isinstance(extractor, Frozen):
        return FrozenHighway(extractor)
    assert isinstance(extractor, HighwayExtractor)
    return extractor


def group_by_input(adapters: Iterable[LoadedAdapter]) -> list[list[LoadedAdapter]]:
    """Group adapters that can share a forward pass: same image size, scaling and precision, no `exclusive_reason`."""
    groups: dict[Any, list[LoadedAdapter]] = {}
    for adapter in adapters:
        inputs = image_size(adapter.config), adapter.scaling, adapter.precision
        groups.setdefault((inputs, adapter.exclusive_reason and adapter.name), []).append(adapter)
    return list(groups.values())


def predict_group(
    adapters: Sequence[LoadedAdapter], images: Tensor, image_sizes: list[tuple[int, int]]
) -> dict[str, Predictions]:
    """Return the predictions of a group by adapter name; arguments as of `predict_shared`."""
    predictions = predict_shared([adapter.model for adapter in adapters], images, image_sizes)
    return dict(zip((adapter.name for adapter in adapters), predictions, strict=True))
