"""ConvNeXt (arXiv 2201.03545), ConvNeXt V2 (arXiv 2301.00808) and DINOv3's ConvNeXt from timm, as residual branches.

A block has one branch, a depthwise convolution and an MLP, and ends after its layer scale `gamma` (V2 has none).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import timm
import torch
from timm.layers import GlobalResponseNormMlp
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from torch import Tensor, nn

from e3va_cli.models.backbones.base import BACKBONES, BackboneOptions, Branch, ResidualBackbone, Stage, pad_to_multiple
from e3va_cli.models.backbones.chunked import autocast_to_weights, chunked_images, chunked_tokens, is_chunked
from e3va_cli.models.backbones.convnext_weights import to_timm_layout

STAGES = 4  # of strides 4 to 32


@dataclass
class ConvNeXtOptions(BackboneOptions):
    """Options of a ConvNeXt of timm."""

    fixed_args = BackboneOptions.fixed_args | {"conv_mlp", "output_stride"}


def convnext_branch(block: ConvNeXtBlock, compiled: bool, x: Tensor) -> Tensor:
    """Compute the residual branch of `block` without drop path: (B, H, W, C) -> (B, H, W, C)."""
    with autocast_to_weights(block.mlp.fc1, x):
        x = block.conv_dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if not is_chunked(block):
            return mlp_forward(block, x)
        # The global response norm of V2 is over a whole image.
        in_chunks = chunked_images if isinstance(block.mlp, GlobalResponseNormMlp) else chunked_tokens
        return in_chunks(mlp_forward, block, x, compiled)


def mlp_forward(block: ConvNeXtBlock, x: Tensor) -> Tensor:
    """Compute norm, MLP and layer scale of `block`: (..., C) -> (..., C)."""
    x = block.mlp(block.norm(x))
    return x if block.gamma is None else x * block.gamma


def downsample(layer: nn.Module, x: Tensor) -> Tensor:
    """Downsample a stream to the next stage: (B, H, W, C) -> (B, H / 2, W / 2, C')."""
    x = layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return x.clone(memory_format=torch.contiguous_format)  # not a view: the highway is updated in place


class ConvNeXtBackbone(ResidualBackbone):
    """A timm ConvNeXt without its classifier.

    Attributes:
        model: the network, with timm's parameter names.
    """

    model: Any  # a ConvNeXt

    def __init__(self, model: ConvNeXt) -> None:
        super().__init__()
        self.model = model
        # The classifier's norm is replaced by an output norm per stage.
        self.model.norm_pre = self.model.head = nn.Identity()
        self.mean = tuple(self.model.pretrained_cfg["mean"])
        self.std = tuple(self.model.pretrained_cfg["std"])

    def stem(self, images: Tensor) -> Tensor:
        """Embed images (B, 3, H, W), padded to the coarsest stride, as (B, ceil(H/32) * 8, ceil(W/32) * 8, C)."""
        images = pad_to_multiple(images, self.model.feature_info[-1]["reduction"])
        return self.model.stem(images).permute(0, 2, 3, 1).contiguous()

    def convert_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the tensors of a file in one of the layouts of `convnext_weights` to timm's names."""
        return to_timm_layout(state, self.model)

    @property
    def stages(self) -> list[Stage]:
        """One stage per ConvNeXt stage; one branch per block."""
        stages = []
        for layer, info in zip(self.model.stages, self.model.feature_info, strict=True):
            branches = tuple(
                Branch("mlp", block, partial(convnext_branch, block, self.compiled), block.drop_path)
                for block in layer.blocks
            )
            identity = isinstance(layer.downsample, nn.Identity)
            down = layer.downsample if identity else partial(downsample, layer.downsample)
            stages.append(Stage(info["num_chs"], info["reduction"], down, branches))
        return stages


@BACKBONES.register("convnext", ConvNeXtOptions)
def build_convnext(options: ConvNeXtOptions, pretrained: bool) -> ConvNeXtBackbone:
    """Build a ConvNeXt from its options, with random weights unless `pretrained`.

    Raises:
        TypeError: `timm_name` is another network, or has MLPs of 1x1 convolutions (V2's smallest).
    """
    args = {"drop_path_rate": options.drop_path_rate, **options.model_args}
    model = timm.create_model(options.timm_name, pretrained=pretrained, num_classes=0, **args)
    blocks = [block for stage in getattr(model, "stages", ()) for block in getattr(stage, "blocks", ())]
    if not isinstance(model, ConvNeXt) or len(model.stages) != STAGES or any(b.use_conv_mlp for b in blocks):
        raise TypeError(f"{options.timm_name} is not a ConvNeXt with {STAGES} stages and linear MLPs")
    return ConvNeXtBackbone(cast(Any, model))
