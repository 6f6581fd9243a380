"""One pass of a frozen backbone for any number of trained models beside it.

Neither E3VA's highway nor a head on the bare features changes what the backbone computes, so what it computes serves
all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from e3va_cli.models.adapters import METHODS, FeatureExtractor, FrozenBackbone
from e3va_cli.models.adapters.e3va import E3VA, forward_shared_backbone
from e3va_cli.models.adapters.frozen import Frozen
from e3va_cli.models.heads import Detections, Segmentation
from e3va_cli.models.model import DenseModel


def can_share_backbone(method: str) -> bool:
    """Whether the method called `method` computes the backbone's own activations, so that others can use them."""
    return METHODS[method].shares_backbone


class IdentityHighway(E3VA):
    """The backbone's own stream as a highway of adapters that change nothing: `Frozen` for a shared pass."""

    def __init__(self, frozen: Frozen) -> None:
        FrozenBackbone.__init__(self, frozen.backbone)
        self.norms, self.out_indices = frozen.norms, frozen.out_indices
        self.adapters = [[Tensor.add_ for _ in stage.branches] for stage in frozen.backbone.stages]


@torch.no_grad()
def predict_shared(
    models: Sequence[DenseModel], images: Tensor, image_sizes: list[tuple[int, int]]
) -> list[list[Detections] | list[Segmentation]]:
    """What `DenseModel.predict` of each model gives, with one pass of the backbone for all.

    Args:
        models: one of any kind, or several on one and the same backbone module, under methods that leave it as it is;
            their heads ask for the features of whole images, once.
        images: uint8 (B, 3, H, W), padded from `image_sizes`.
    """
    if len(models) == 1:
        return [models[0].predict(images, image_sizes)]
    batch = models[0].normalize(images, image_sizes)
    features = forward_shared_backbone([_highway(model.extractor) for model in models], batch.tensors)
    rescaled = [model.rescale(of_model) for model, of_model in zip(models, features, strict=True)]
    return [model.head.predict(lambda _: rescaled.pop(0), batch) for model in models]


def _highway(extractor: FeatureExtractor) -> E3VA:
    if isinstance(extractor, Frozen):
        return IdentityHighway(extractor)
    assert isinstance(extractor, E3VA)
    return extractor
