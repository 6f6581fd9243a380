"""The dense prediction model: a backbone under a tuning method, with a head."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from e3va_cli.components.options import Options, option, require_valid
from e3va_cli.errors import UserError
from e3va_cli.models.adapters import METHODS, AdapterOptions, FeatureExtractor, FrozenBackbone
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
from e3va_cli.models.necks.simple_pyramid import SimplePyramid
from e3va_cli.utils.amp import guard_convolutions

NECKS = ("rescale", "simple_pyramid")


@dataclass
class ModelConfig(Options):
    """Options of a model: backbone, tuning method, head, and what lies between backbone and head."""

    backbone: BackboneOptions = option()
    adapter: AdapterOptions = option()
    head: HeadOptions = option()
    neck: str = option(
        "rescale",
        help="for ViTs: rescale, each pyramid level from its own stage; simple_pyramid, all from the last (ViTDet)",
        choices=NECKS,
        legacy_value="rescale",
    )


class DenseModel(nn.Module):
    """Compute losses or predictions of images, with any tuning method and head.

    Attributes:
        extractor: the backbone under its tuning method.
        rescale: a `Rescale` or `SimplePyramid`, if the strides of the backbone are not 4, 8, 16 and 32; else the
            identity.
        head: a detection or segmentation head, with its neck.
        identity: fingerprint of the backbone.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, extractor: FeatureExtractor, head: Head, identity: BackboneFingerprint, rescale: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.extractor = extractor
        self.rescale = rescale or nn.Identity()
        self.head = head
        self.identity = identity
        self.register_buffer("mean", 255 * torch.tensor(extractor.backbone.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(extractor.backbone.std).view(3, 1, 1), persistent=False)

    def normalize(self, images: Tensor, image_sizes: list[tuple[int, int]]) -> ImageList:
        """Normalize uint8 (B, 3, H, W) by the backbone's mean and std; padding becomes zero, the mean color."""
        normalized = (images - self.mean) / self.std
        for image, (height, width) in zip(normalized, image_sizes, strict=True):
            image[:, height:] = 0
            image[:, :, width:] = 0
        return ImageList(normalized, image_sizes)

    def features(self, images: Tensor) -> list[Tensor]:
        """Return feature maps of normalized images, one per level that the head reads."""
        return self.rescale(self.extractor(images))

    def losses(self, images: Tensor, image_sizes: list[tuple[int, int]], targets: list[Target]) -> dict[str, Tensor]:
        """Return named scalar losses of a batch: images uint8 (B, 3, H, W) padded from `image_sizes`."""
        batch = self.normalize(images, image_sizes)
        return self.head.losses(self.features(batch.tensors), batch, targets) | self.extractor.regularization()

    @torch.no_grad()
    def predict(self, images: Tensor, image_sizes: list[tuple[int, int]]) -> list[Detections] | list[Segmentation]:
        """Return the predictions for each image, in its pixels."""
        return self.head.predict(self.features, self.normalize(images, image_sizes))


def check_frozen(config: ModelConfig) -> None:
    """Check that a backbone in fewer bits, offloaded or compiled has a method without gradients through it.

    Raises:
        UserError: it has another method; names those that are supported.
    """
    method = config.adapter.name
    if issubclass(METHODS[method], FrozenBackbone):
        return
    methods = " or ".join(name for name, one in METHODS.items() if issubclass(one, FrozenBackbone))
    for name, default in (("dtype", "float32"), ("offload", "none"), ("compile", False)):
        value = getattr(config.backbone, name)
        if value != default:
            given, needed = (f"backbone.{name}={str(one).lower()}" for one in (value, default))
            raise UserError(
                f"{given}: not supported by adapter={method}, which computes gradients through the backbone; "
                f"set {needed}, or adapter={methods}"
            )


def check_neck(config: ModelConfig, backbone: ResidualBackbone) -> None:
    """Check that a simple pyramid has a backbone of one resolution.

    Raises:
        UserError: the outputs of the backbone have several strides.
    """
    if config.neck == "simple_pyramid" and len(set(backbone.strides)) > 1:
        raise UserError(
            f"neck=simple_pyramid: makes a pyramid of a ViT's last output, but backbone={config.backbone.name} has "
            f"outputs of strides {', '.join(map(str, backbone.strides))}; leave out neck, or use a ViT such as "
            "backbone=dinov2_s"
        )


def build_model(
    config: ModelConfig, *, num_classes: int, backbone: tuple[ResidualBackbone, BackboneFingerprint] | None = None
) -> DenseModel:
    """Build the model of a configuration, for training, on a new backbone unless one is given."""
    model = build_from_backbone(config, *(backbone or build_backbone(config.backbone)), num_classes)
    guard_convolutions(model)
    return model


def build_random_model(config: ModelConfig, *, num_classes: int) -> DenseModel:
    """Build the model with random weights, for measurements."""
    backbone = replace(config.backbone, pretrained=False, weights=None)
    return build_model(replace(config, backbone=backbone), num_classes=num_classes)


def build_meta_model(config: ModelConfig, *, num_classes: int) -> DenseModel:
    """Build the model on the meta device, without weights."""
    with torch.device("meta"):
        return build_from_backbone(config, *build_meta_backbone(config.backbone), num_classes)


def build_from_backbone(
    config: ModelConfig, backbone: ResidualBackbone, identity: BackboneFingerprint, num_classes: int
) -> DenseModel:
    """Build the model of a configuration on a given backbone.

    Raises:
        UserError: an option is out of range, or the method does not support the backbone.
    """
    check_frozen(config)
    check_neck(config, backbone)
    require_valid(config.adapter, "adapter")
    extractor = METHODS[config.adapter.name](backbone, config.adapter)
    channels, strides = backbone.out_channels, backbone.strides
    if config.neck == "simple_pyramid":
        channels = channels[-1:] * len(channels)
    rescaled = tuple(strides) != STRIDES
    head_channels = rescaled_channels(channels, strides) if rescaled else channels
    head = build_head(config.head, channels=head_channels, num_classes=num_classes)
    if config.neck == "simple_pyramid":
        extractor.set_out_indices((len(strides) - 1,))
        return DenseModel(extractor, head, identity, SimplePyramid(channels[-1], strides[-1], head.out_indices))
    extractor.set_out_indices(head.out_indices)
    rescale = Rescale(channels, strides, head.out_indices) if rescaled else None
    return DenseModel(extractor, head, identity, rescale)


def parameter_counts(model: DenseModel) -> dict[str, int | float]:
    """Count the parameters of the backbone with adapters, and of the model.

    As in published tables, the backbone's trainable parameters include adapters and output norms, without neck and
    head; the percentage is relative to the backbone's own parameters.
    """

    def count_trainable(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    tuned, backbone = count_trainable(model.extractor), model.extractor.backbone.num_params
    others = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.extractor.backbone.parameters())
    return {
        "trainable_backbone_params": tuned,
        "backbone_params": backbone,
        "trainable_backbone_pct": 100 * tuned / backbone,
        "trainable_params": count_trainable(model),
        "total_params": backbone + others,
    }
