"""Swin Transformer (arXiv 2103.14030) from timm, at any image size, as residual branches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn

from e3va_cli.components.options import option
from e3va_cli.models.backbones.base import BACKBONES, BackboneOptions, Branch, ResidualBackbone, Stage
from e3va_cli.models.backbones.chunked import autocast_to_weights, chunked_tokens, is_chunked
from e3va_cli.models.backbones.timm_private import shifted_window_attention
from e3va_cli.models.backbones.weights import to_timm_layout
from e3va_cli.models.backbones.window_attention import (
    chunked_window_attention,
    pad_to_windows,
    shift_attn_mask,
)

STAGES = 4  # of strides 4 to 32


@dataclass
class SwinOptions(BackboneOptions):
    """Options of a Swin Transformer of timm."""

    fixed_args = BackboneOptions.fixed_args | {"strict_img_size", "always_partition", "pad_before_shift"}
    weightless_args = BackboneOptions.weightless_args | {"proj_drop_rate", "attn_drop_rate", "img_size"}

    pad_before_shift: bool = option(
        True,
        help="pad feature maps to whole windows before shifting, as Swin's detection code; false: after, as timm",
        legacy_value=False,
    )


def attention_branch(
    block: SwinTransformerBlock, attn_mask: Tensor, compiled: bool, pad_before_shift: bool, x: Tensor
) -> Tensor:
    """Compute the (shifted-)window attention of `block`: (B, H, W, C) -> (B, H, W, C)."""
    with autocast_to_weights(block.attn.qkv, x):
        if is_chunked(block):
            return chunked_window_attention(block, attn_mask, x, compiled=compiled, pad_before_shift=pad_before_shift)
        normed = block.norm1(x)
        if not pad_before_shift:
            return shifted_window_attention(block, normed)
        height, width = x.shape[1:3]
        return shifted_window_attention(block, pad_to_windows(normed, *block.window_size))[:, :height, :width]


def mlp_branch(block: SwinTransformerBlock, compiled: bool, x: Tensor) -> Tensor:
    """Compute the MLP of `block`: (B, H, W, C) -> (B, H, W, C)."""
    with autocast_to_weights(block.mlp.fc1, x):
        return chunked_tokens(mlp_forward, block, x, compiled) if is_chunked(block) else mlp_forward(block, x)


def mlp_forward(block: SwinTransformerBlock, tokens: Tensor) -> Tensor:
    """Compute norm and MLP of `block`: (..., C) -> (..., C)."""
    return block.mlp(block.norm2(tokens))


def block_branches(
    block: SwinTransformerBlock, attn_mask: Tensor, compiled: bool, pad_before_shift: bool
) -> tuple[Branch, Branch]:
    """Return the two residual branches of a block, which end in timm's `drop_path1` and `drop_path2`."""
    return (
        Branch(
            "attention",
            block,
            partial(attention_branch, block, attn_mask, compiled, pad_before_shift),
            block.drop_path1,
            block.attn.qkv,
        ),
        Branch("mlp", block, partial(mlp_branch, block, compiled), block.drop_path2),
    )


class SwinBackbone(ResidualBackbone):
    """A timm Swin without its classifier.

    Attributes:
        model: the network, with timm's parameter names.
        attn_mask: the `shift_attn_mask` of its windows, all of one size.
        pad_before_shift: pad maps to whole windows before shifting, as Swin's detection code. timm pads after
            shifting, which moves padding into the image and changes features at other sizes than the classifier's.
    """

    model: Any  # a SwinTransformer, whose attributes timm leaves untyped
    attn_mask: Tensor

    def __init__(self, model: SwinTransformer, *, pad_before_shift: bool = True) -> None:
        super().__init__()
        self.model = model
        self.pad_before_shift = pad_before_shift
        # The classifier's norm is replaced by an output norm per stage.
        self.model.norm = nn.Identity()
        self.mean = tuple(self.model.pretrained_cfg["mean"])
        self.std = tuple(self.model.pretrained_cfg["std"])
        self.register_buffer(
            "attn_mask", shift_attn_mask(*self.model.layers[0].blocks[0].window_size), persistent=False
        )

    def stem(self, images: Tensor) -> Tensor:
        """Embed patches: (B, 3, H, W) -> (B, ceil(H/4), ceil(W/4), C)."""
        patch_h, patch_w = self.model.patch_embed.patch_size
        height, width = images.shape[-2:]
        images = nn.functional.pad(images, (0, -width % patch_w, 0, -height % patch_h))
        return self.model.patch_embed(images)

    def cast_weights(self, dtype: torch.dtype) -> None:
        """Cast the weight matrices of attention and MLP, nearly all of the weights, to `dtype`.

        Attention and MLP are then computed under autocast to it; the residual stream keeps its dtype.
        """
        for layer in self.model.layers:
            for block in layer.blocks:
                for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                    linear.weight.data = linear.weight.data.to(dtype)

    def convert_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the Swin authors' tensors as timm does."""
        return to_timm_layout(state)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the relative position bias tables."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}

    @property
    def stages(self) -> list[Stage]:
        """One stage per Swin layer, with two branches, attention and MLP, per block."""
        stages = []
        for layer, info in zip(self.model.layers, self.model.feature_info, strict=True):
            branches = tuple(
                branch
                for block in layer.blocks
                for branch in block_branches(block, self.attn_mask, self.compiled, self.pad_before_shift)
            )
            stages.append(Stage(info["num_chs"], info["reduction"], layer.downsample, branches))
        return stages


def build_swin(
    timm_name: str, *, pretrained: bool = False, pad_before_shift: bool = True, **model_args: Any
) -> SwinBackbone:
    """Build timm's Swin `timm_name` for images of any size.

    Without `always_partition`, timm would disable shifts in stages smaller than a window at 224x224 pixels, such as
    the last one, at every image size.

    Raises:
        TypeError: `timm_name` is not a Swin Transformer with four stages.
    """
    model = timm.create_model(
        timm_name,
        pretrained=pretrained,
        num_classes=0,
        strict_img_size=False,
        always_partition=True,
        **model_args,
    )
    if not isinstance(model, SwinTransformer) or len(model.layers) != STAGES:
        raise TypeError(f"{timm_name} is not a Swin Transformer with {STAGES} stages")
    return SwinBackbone(model, pad_before_shift=pad_before_shift)


@BACKBONES.register("swin", SwinOptions)
def build_swin_from_options(options: SwinOptions, pretrained: bool) -> SwinBackbone:
    """Build a Swin from its options, with random weights unless `pretrained`."""
    args = {"drop_path_rate": options.drop_path_rate, **options.model_args}
    return build_swin(options.timm_name, pretrained=pretrained, pad_before_shift=options.pad_before_shift, **args)
