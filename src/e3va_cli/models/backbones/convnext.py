"""ConvNeXt (arXiv 2201.03545), ConvNeXt V2 (arXiv 2301.00808) and DINOv3's ConvNeXt from timm, as residual branches.

A block has one branch, a depthwise convolution and an MLP, and ends after its layer scale `gamma` (V2 has none).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import timm
import torch
from timm.layers import GlobalResponseNormMlp
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from torch import Tensor, nn

from e3va_cli.models.backbones.base import BACKBONES, BackboneOptions, Branch, ResidualBackbone, Stage
from e3va_cli.models.backbones.swin import in_parts, precision_of
from e3va_cli.models.backbones.window_attention import NUMBERS_AT_ONCE, as_compiled
from e3va_cli.utils.amp import autocast_dtype

STAGES = 4  # of strides 4 to 32
FIXED = frozenset({"timm_name", "pretrained", "num_classes", "conv_mlp", "output_stride"})  # not in model_args
WEIGHTLESS = frozenset({"drop_path_rate", "drop_rate"})  # change no weight: published ones fit


@dataclass
class ConvNeXtOptions(BackboneOptions):
    """Options of a ConvNeXt of timm."""

    def errors(self, at: str) -> Iterator[str]:
        """Yield what makes the options more than those of an architecture, or of one without published weights."""
        if self.pretrained and (others := sorted(set(self.model_args) - WEIGHTLESS)):
            yield (
                f"{at}.pretrained=true: there are no published weights for {self.name} with "
                f"{', '.join(f'model_args.{name}' for name in others)}; leave them out, or give {at}.weights=FILE"
            )
        for key, value in self.model_args.items():  # they come with checkpoints, and may name files to timm
            if key in FIXED:
                yield f"{at}.model_args.{key}: not to be chosen"
            numbers = value if isinstance(value, list | tuple) else [value]
            if not key.isidentifier() or not all(isinstance(number, int | float) for number in numbers):
                yield f"{at}.model_args.{key} is no number or list of numbers"


def convolve(block: ConvNeXtBlock, x: Tensor) -> Tensor:
    """Return the depthwise convolution of a stream, (B, H, W, C) -> (B, H, W, C)."""
    return block.conv_dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def transform(block: ConvNeXtBlock, x: Tensor) -> Tensor:
    """Return norm, MLP and layer scale of `block`, (..., C) -> (..., C)."""
    x = block.mlp(block.norm(x))
    return x if block.gamma is None else x * block.gamma


def branch(block: ConvNeXtBlock, compiled: bool, x: Tensor) -> Tensor:
    """Return the residual branch of `block` without its drop path, (B, H, W, C) -> (B, H, W, C).

    Where nothing is kept for a backward pass, the MLP works on some tokens at a time, or, where it norms over the whole
    image (V2's global response norm), on one image at a time.
    """
    with precision_of(block.mlp.fc1, x):
        x = convolve(block, x)
        if not in_parts(block):
            return transform(block, x)
        compute = as_compiled(transform) if compiled else transform
        result = torch.empty_like(x, dtype=autocast_dtype(x) or x.dtype, memory_format=torch.contiguous_format)
        if isinstance(block.mlp, GlobalResponseNormMlp):
            chunks = zip(x.split(1), result.split(1), strict=True)
        else:
            size = max(1, NUMBERS_AT_ONCE // x.shape[-1])
            chunks = zip(x.reshape(-1, x.shape[-1]).split(size), result.view(-1, x.shape[-1]).split(size), strict=True)
        for chunk, result_chunk in chunks:
            result_chunk.copy_(compute(block, chunk))
        return result


def downsample(layer: nn.Module, x: Tensor) -> Tensor:
    """Return a stream at the next stage's resolution, (B, H, W, C) -> (B, H / 2, W / 2, C')."""
    x = layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return x.clone(memory_format=torch.contiguous_format)  # no view: the highway is added to in place


class ConvNeXtBackbone(ResidualBackbone):
    """A timm ConvNeXt without its classifier.

    Attributes:
        model: the weights, under timm's own names.
    """

    model: Any  # a ConvNeXt

    def __init__(self, model: ConvNeXt) -> None:
        super().__init__()
        self.model = model
        # The classifier's norm is no part of a dense feature extractor: each stage gets an output norm of its own.
        self.model.norm_pre = self.model.head = nn.Identity()
        self.mean = tuple(self.model.pretrained_cfg["mean"])
        self.std = tuple(self.model.pretrained_cfg["std"])

    def stem(self, images: Tensor) -> Tensor:
        """Embed images (B, 3, H, W), padded to the coarsest stride, as (B, ceil(H/32) * 8, ceil(W/32) * 8, C)."""
        coarsest = self.model.feature_info[-1]["reduction"]
        height, width = images.shape[-2:]
        images = nn.functional.pad(images, (0, -width % coarsest, 0, -height % coarsest))
        return self.model.stem(images).permute(0, 2, 3, 1).contiguous()

    def cast_weights(self, dtype: torch.dtype) -> None:
        """Keep the weight matrices of the MLPs, nearly all of the weights, in `dtype`."""
        for stage in self.model.stages:
            for block in stage.blocks:
                for linear in (block.mlp.fc1, block.mlp.fc2):
                    linear.weight.data = linear.weight.data.to(dtype)

    @property
    def stages(self) -> list[Stage]:
        """One stage per ConvNeXt stage; one branch per block."""
        stages = []
        for layer, info in zip(self.model.stages, self.model.feature_info, strict=True):
            branches = tuple(
                Branch("mlp", block, partial(branch, block, self.compiled), block.drop_path) for block in layer.blocks
            )
            is_kept = isinstance(layer.downsample, nn.Identity)
            step = layer.downsample if is_kept else partial(downsample, layer.downsample)
            stages.append(Stage(info["num_chs"], info["reduction"], step, branches))
        return stages


@BACKBONES.register("convnext", ConvNeXtOptions)
def build_convnext(options: ConvNeXtOptions, pretrained: bool) -> ConvNeXtBackbone:
    """Return the ConvNeXt that the options describe, random unless `pretrained`.

    Raises:
        TypeError: it is another network, has other than four stages, or MLPs of 1x1 convolutions (V2's smallest).
    """
    args = {"drop_path_rate": options.drop_path_rate, **options.model_args}
    model = timm.create_model(options.timm_name, pretrained=pretrained, num_classes=0, **args)
    blocks = [block for stage in getattr(model, "stages", ()) for block in getattr(stage, "blocks", ())]
    if not isinstance(model, ConvNeXt) or len(model.stages) != STAGES or any(b.use_conv_mlp for b in blocks):
        raise TypeError(f"{options.timm_name} is no ConvNeXt of {STAGES} stages with linear MLPs")
    return ConvNeXtBackbone(cast(Any, model))
