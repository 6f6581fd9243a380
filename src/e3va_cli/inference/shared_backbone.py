"""One forward pass of a frozen backbone for several models.

Neither E3VA's highway nor a head on frozen features changes the backbone's activations, so that models can share them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from e3va_cli.models.adapters import METHODS, FeatureExtractor
from e3va_cli.models.adapters.e3va import E3VA, Highway, forward_shared_backbone
from e3va_cli.models.adapters.frozen import Frozen
from e3va_cli.models.heads import Detections, Segmentation
from e3va_cli.models.model import DenseModel


def can_share_backbone(method: str) -> bool:
    """Return whether a tuning method leaves the backbone's activations unchanged, so that other models can use them."""
    return METHODS[method].shares_backbone


class IdentityHighway:
    """A `Frozen` extractor as a `Highway`: its adapters add the branches' outputs unchanged."""

    def __init__(self, frozen: Frozen) -> None:
        self.backbone, self.out_indices, self.output = frozen.backbone, frozen.out_indices, frozen.output
        self.adapters = [[Tensor.add_ for _ in stage.branches] for stage in frozen.backbone.stages]


@torch.no_grad()
def predict_shared(
    models: Sequence[DenseModel], images: Tensor, image_sizes: list[tuple[int, int]]
) -> list[list[Detections] | list[Segmentation]]:
    """Return `DenseModel.predict` of each model, computed with one forward pass of the backbone.

    Args:
        models: one of any kind, or several that share a backbone module which their methods leave unchanged; their
            heads use the features of whole images, once.
        images: uint8 (B, 3, H, W), padded from `image_sizes`.
    """
    if len(models) == 1:
        return [models[0].predict(images, image_sizes)]
    batch = models[0].normalize(images, image_sizes)
    features = forward_shared_backbone([_highway(model.extractor) for model in models], batch.tensors)
    rescaled = [model.rescale(maps) for model, maps in zip(models, features, strict=True)]
    return [model.head.predict(lambda _: rescaled.pop(0), batch) for model in models]


def _highway(extractor: FeatureExtractor) -> Highway:
    if isinstance(extractor, Frozen):
        return IdentityHighway(extractor)
    assert isinstance(extractor, E3VA)
    return extractor
