"""The gradient highway beside a frozen backbone, on which the adapters of E3VA and E3VA+ work.

Paper: D. Yin, X. Han, B. Li, H. Feng, J. Bai, "Parameter-efficient is not sufficient: Exploring Parameter, Memory,
and Time Efficient Adapter Tuning for Dense Predictions", arXiv 2306.09729, section 3 and figure 2.

Per stage s the frozen backbone computes, without gradients, the outputs z_l of its residual branches (attention and
MLP), and its stream x_l, their sum. The highway h adds the adapted outputs instead,

    h_{1,0} = stem(images)                      no gradient
    h_{s,0} = Down_s(h_{s-1,L})                 the backbone's own downsampling, frozen but differentiable
    h_{s,l} = h_{s,l-1} + E(z_l, x_l)
    F_s     = LayerNorm_s(h_{s,L})              trainable

so the backward pass runs through adapters, downsampling and norms, never through attention or MLP. As E(z, x) = z at
initialization, training starts at the backbone's own features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from e3va_cli.components.options import Condition, option
from e3va_cli.models.adapters.activation_storage import ActivationStorage, build_storage
from e3va_cli.models.adapters.base import AdapterOptions, FrozenBackbone
from e3va_cli.models.adapters.checkpointed_stage import checkpointed_stage
from e3va_cli.models.backbones.base import ResidualBackbone, Stage


@dataclass
class HighwayOptions(AdapterOptions):
    """Options of methods with a highway."""

    activations: str = option(
        "keep",
        help="inputs of adapters for the backward pass: keep, compress, or recompute (least memory, slowest)",
        choices=("keep", "compress", "recompute"),
        free=True,
    )
    compress_bits: int = option(
        8,
        help="with compress: 16 (bfloat16) or 8 (integers with scales); rounds the gradients of A slightly",
        choices=(16, 8),
        free=True,
        conditions=(Condition("activations", lambda value: value == "compress", "set adapter.activations=compress"),),
    )


class HighwayExtractor(FrozenBackbone):
    """The highway: one adapter per residual branch of the frozen backbone; subclasses build the adapters.

    Args:
        backbone: any residual backbone; it is frozen and put into eval mode.
        options: of the method.
    """

    shares_backbone = True
    adapters: Any  # [stage][branch], the order of the backbone's stages and their branches

    def __init__(self, backbone: ResidualBackbone, options: HighwayOptions) -> None:
        super().__init__(backbone, options)
        self.activations = options.activations
        storage = build_storage(options.activations, options.compress_bits)
        self.adapters = nn.ModuleList(
            nn.ModuleList(self.build_adapter(stage.width, options, storage) for _ in stage.branches)
            for stage in backbone.stages
        )

    def build_adapter(self, width: int, options: Any, storage: ActivationStorage) -> nn.Module:
        """Return an adapter, a `HighwayAdapter`, for a stream of `width` channels."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one feature map (B, C_s, H_s, W_s) per stage in `out_indices`."""
        if self.activations == "recompute" and torch.is_grad_enabled():
            return self._forward_checkpointed(images)
        return forward_shared_backbone([self], images)[0]

    def _forward_checkpointed(self, images: Tensor) -> list[Tensor]:
        """Return the same feature maps, saving only the input of each stage."""
        with torch.no_grad():
            x = self.backbone.stem(images)
        highway = initial_highway(self.backbone, x)
        outputs = []
        for index, stage in enumerate(self.backbone.stages):
            with torch.no_grad():
                x, branches = stage.start(x)
            highway = checkpointed_downsample(stage, highway)
            highway, x = checkpointed_stage(highway, x, self.backbone.patches, branches, list(self.adapters[index]))
            if index in self.out_indices:
                outputs.append(self.output(index, highway))
        return outputs


class Highway(Protocol):
    """Interface of an extractor for `forward_shared_backbone`; attributes as in `HighwayExtractor`."""

    backbone: ResidualBackbone
    adapters: Any
    out_indices: tuple[int, ...]

    def output(self, stage: int, stream: Tensor) -> Tensor:
        """Normalize the stream at the end of a stage: (B, H, W, C) -> (B, C, H, W)."""
        ...


def initial_highway(backbone: ResidualBackbone, x: Tensor) -> Tensor:
    """Return the patches of the stem's stream, in a storage of their own."""
    return backbone.patches(x).clone(memory_format=torch.contiguous_format)


def checkpointed_downsample(stage: Stage, highway: Tensor) -> Tensor:
    """Downsample the highway to the resolution of `stage`; the backward pass recomputes the layer's activations."""
    # Deterministic; the check would fail in memory estimates, which simulate a GPU's autocast rules.
    return checkpoint(
        stage.downsample, highway, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
    )


def forward_shared_backbone(extractors: Sequence[Highway], images: Tensor) -> list[list[Tensor]]:
    """Return the feature maps of several extractors that share one backbone module, in one pass of it."""
    backbone = extractors[0].backbone
    with torch.no_grad():
        x = backbone.stem(images)
    highways = [initial_highway(backbone, x) for _ in extractors]
    outputs: list[list[Tensor]] = [[] for _ in extractors]
    for index, stage in enumerate(backbone.stages):
        with torch.no_grad():
            x, branches = stage.start(x)
        highways = [checkpointed_downsample(stage, highway) for highway in highways]
        for position, branch in enumerate(branches):
            with torch.no_grad():
                z = backbone.patches(branch.add_to_(x))
            stream = backbone.patches(x)
            adapters = [extractor.adapters[index][position] for extractor in extractors]
            highways = [adapter(highway, z, stream) for adapter, highway in zip(adapters, highways, strict=True)]
        for extractor, highway, features in zip(extractors, highways, outputs, strict=True):
            if index in extractor.out_indices:
                features.append(extractor.output(index, highway))
    return outputs
