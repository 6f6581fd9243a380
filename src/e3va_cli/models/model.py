"""The whole network: a tuned backbone with a head on it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from e3va_cli.components.options import Options, option
from e3va_cli.errors import UserError
from e3va_cli.models.adapters import METHODS, AdapterOptions, FeatureExtractor, FrozenBackbone, tune
from e3va_cli.models.backbones import (
    BackboneFingerprint,
    BackboneOptions,
    ResidualBackbone,
    build_backbone,
    build_meta_backbone,
)
from e3va_cli.models.heads import Detections, Head, HeadOptions, Segmentation, Target, build_head
from e3va_cli.models.necks.fpn import STRIDES
from e3va_cli.models.necks.rescale import Rescale, rescaled_channels
from e3va_cli.utils.amp import guard_convolutions


@dataclass
class ModelConfig(Options):
    """What a model is made from: a backbone, the tuning method and the head on it."""

    backbone: BackboneOptions = option()
    adapter: AdapterOptions = option()
    head: HeadOptions = option()


class DenseModel(nn.Module):
    """Images to losses or findings. Knows neither the tuning method nor the head, only their protocols.

    Attributes:
        extractor: the backbone under its tuning method.
        rescale: brings feature maps to strides 4, 8, 16, 32, where the backbone's are others.
        head: a detection or segmentation head, with its neck.
        identity: the backbone that the extractor's adapters belong to.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, extractor: FeatureExtractor, head: Head, identity: BackboneFingerprint, rescale: Rescale | None = None
    ) -> None:
        super().__init__()
        self.extractor = extractor
        self.rescale = rescale or nn.Identity()
        self.head = head
        self.identity = identity
        self.register_buffer("mean", 255 * torch.tensor(extractor.backbone.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(extractor.backbone.std).view(3, 1, 1), persistent=False)

    def normalize(self, images: Tensor, image_sizes: list[tuple[int, int]]) -> ImageList:
        """Uint8 (B, 3, H, W) to what the backbone was trained with; the padding becomes zero, the mean colour."""
        normalized = (images - self.mean) / self.std
        for image, (height, width) in zip(normalized, image_sizes, strict=True):
            image[:, height:] = 0
            image[:, :, width:] = 0
        return ImageList(normalized, image_sizes)

    def features(self, images: Tensor) -> list[Tensor]:
        """Feature maps of normalized images, one per stage that the head reads."""
        return self.rescale(self.extractor(images))

    def losses(self, images: Tensor, image_sizes: list[tuple[int, int]], targets: list[Target]) -> dict[str, Tensor]:
        """Named scalar losses of a batch: images uint8 (B, 3, H, W) padded from `image_sizes`."""
        batch = self.normalize(images, image_sizes)
        return self.head.losses(self.features(batch.tensors), batch, targets)

    @torch.no_grad()
    def predict(self, images: Tensor, image_sizes: list[tuple[int, int]]) -> list[Detections] | list[Segmentation]:
        """What is found in each image, in pixels of the images as given."""
        return self.head.predict(self.features, self.normalize(images, image_sizes))


def check_frozen(config: ModelConfig) -> None:
    """Check that no gradient goes through a backbone kept in 16 bits or compiled.

    Raises:
        UserError: it does; names the methods that go with such a backbone.
    """
    method = config.adapter.name
    if issubclass(METHODS[method], FrozenBackbone):
        return
    methods = " or ".join(name for name, kind in METHODS.items() if issubclass(kind, FrozenBackbone))
    for name, usual in (("dtype", "float32"), ("compile", False)):
        value = getattr(config.backbone, name)
        if value != usual:
            given, needed = (f"backbone.{name}={str(one).lower()}" for one in (value, usual))
            raise UserError(
                f"{given}: adapter={method} sends gradients through the backbone, which takes {needed}; "
                f"with {given}: adapter={methods}"
            )


def build_model(config: ModelConfig, *, num_classes: int) -> DenseModel:
    """The model of a configuration, to be trained."""
    model = build_from_backbone(config, *build_backbone(config.backbone), num_classes)
    guard_convolutions(model)
    return model


def build_random_model(config: ModelConfig, *, num_classes: int) -> DenseModel:
    """The same model on random weights, whatever the configuration says: for measurements."""
    backbone = replace(config.backbone, pretrained=False, weights=None)
    return build_model(replace(config, backbone=backbone), num_classes=num_classes)


def build_meta_model(config: ModelConfig, *, num_classes: int) -> DenseModel:
    """The same model as shapes only, on the meta device."""
    with torch.device("meta"):
        return build_from_backbone(config, *build_meta_backbone(config.backbone), num_classes)


def build_from_backbone(
    config: ModelConfig, backbone: ResidualBackbone, identity: BackboneFingerprint, num_classes: int
) -> DenseModel:
    """The model of a configuration on a backbone that is there already."""
    check_frozen(config)
    extractor = tune(backbone, config.adapter)
    channels, strides = backbone.out_channels, backbone.strides
    one_resolution = tuple(strides) != STRIDES
    head_channels = rescaled_channels(channels, strides) if one_resolution else channels
    head = build_head(config.head, channels=head_channels, num_classes=num_classes)
    extractor.set_out_indices(head.out_indices)
    rescale = Rescale(channels, strides, head.out_indices) if one_resolution else None
    return DenseModel(extractor, head, identity, rescale)


def parameter_counts(model: DenseModel) -> dict[str, int | float]:
    """Trainable parameters of the tuned backbone and of everything.

    The backbone's are counted as the published tables do: adapters, output norms and what of the network itself is
    trained, without neck and head; the percentage is of the backbone's own parameters.
    """

    def count(module: nn.Module, *, trainable: bool) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)

    tuned, backbone = count(model.extractor, trainable=True), count(model.extractor.backbone, trainable=False)
    return {
        "trainable_backbone_params": tuned,
        "backbone_params": backbone,
        "trainable_backbone_pct": 100 * tuned / backbone,
        "trainable_params": count(model, trainable=True),
        "total_params": count(model, trainable=False),
    }
