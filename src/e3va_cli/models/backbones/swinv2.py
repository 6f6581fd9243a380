"""Swin Transformer V2 (arXiv 2111.09883) from timm, at any image size, as residual branches.

Against Swin: a branch ends in its norm, attention is by cosine similarity with a learned scale, and the relative
position bias is an MLP of log-spaced coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import timm
import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block, WindowAttention
from torch import Tensor
from torch.nn.functional import normalize

from e3va_cli.models.backbones.base import BACKBONES
from e3va_cli.models.backbones.chunked import autocast_to_weights, is_chunked
from e3va_cli.models.backbones.swin import STAGES, SwinBackbone, SwinOptions
from e3va_cli.models.backbones.window_attention import (
    biased_attention,
    chunked_window_attention,
    split_heads,
    timm_window_attention,
)

MAX_LOG_SCALE = math.log(100)  # of cosine similarities
MAX_BIAS = 16.0


@dataclass
class SwinV2Options(SwinOptions):
    """Options of a Swin Transformer V2 of timm."""

    fixed_args = SwinOptions.fixed_args | {"dynamic_img_size"}
    weightless_args = SwinOptions.weightless_args | {"window_size", "pretrained_window_sizes"}


def attention_branch(
    block: SwinTransformerV2Block, attn_mask: Tensor, compiled: bool, pad_before_shift: bool, x: Tensor
) -> Tensor:
    """Compute the (shifted-)window attention and norm of `block`: (B, H, W, C) -> (B, H, W, C)."""
    with autocast_to_weights(block.attn.qkv, x):
        if not is_chunked(block):
            return block.norm1(timm_window_attention(block, x, pad_before_shift=pad_before_shift))
        return chunked_window_attention(
            block,
            window_attention,
            position_bias(block.attn),
            attn_mask,
            x,
            compiled=compiled,
            pad_before_shift=pad_before_shift,
        )


def window_attention(block: SwinTransformerV2Block, windows: Tensor, bias: Tensor) -> Tensor:
    """Compute cosine attention and norm in windows (N, tokens, C) with `bias` (1, heads, tokens, tokens) on scores."""
    attn: Any = block.attn
    qkv = attn.qkv(windows)
    if attn.q_bias is not None:
        qkv += torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    query, key, value = split_heads(qkv, attn.num_heads)
    query = normalize(query, dim=-1) * attn.logit_scale.clamp(max=MAX_LOG_SCALE).exp()
    key = normalize(key, dim=-1)
    return block.norm1(attn.proj(biased_attention(query.type_as(value), key.type_as(value), value, bias, scale=1.0)))


def position_bias(attn: WindowAttention) -> Tensor:
    """Return the continuous relative position bias of a window: (1, heads, tokens, tokens)."""
    table = attn.cpb_mlp(attn.relative_coords_table).flatten(0, 2)  # relative positions, heads
    return MAX_BIAS * table[attn.relative_position_index].permute(2, 0, 1)[None].sigmoid()


def mlp_forward(block: SwinTransformerV2Block, tokens: Tensor) -> Tensor:
    """Compute MLP and norm of `block`: (..., C) -> (..., C)."""
    return block.norm2(block.mlp(tokens))


class SwinV2Backbone(SwinBackbone):
    """A timm Swin V2 without its classifier.

    Its attention calls the qkv projection as a module, for hooks such as LoRA's, and adds the biases after it.
    """

    attention_branch: ClassVar[Callable[..., Tensor]] = staticmethod(attention_branch)
    mlp_forward: ClassVar[Callable[..., Tensor]] = staticmethod(mlp_forward)

    def __init__(self, model: Any, *, pad_before_shift: bool = True) -> None:
        super().__init__(model, pad_before_shift=pad_before_shift)
        for layer in self.model.layers:
            for block in layer.blocks:
                block.attn.qkv_bias_separate = True


def build_swinv2(
    timm_name: str, *, pretrained: bool = False, pad_before_shift: bool = True, **model_args: Any
) -> SwinV2Backbone:
    """Build timm's Swin V2 `timm_name` for images of any size.

    Windows are those of the pre-training at every image size: as timm, no larger than a stage's map at the weights'
    image size (256 pixels, `window_size=16`: 16, 16, 16 and 8). Unlike timm, blocks whose window covered that map
    shift their windows too, as in Swin's detection code.

    Raises:
        TypeError: `timm_name` is not a Swin Transformer V2 with four stages.
    """
    model = timm.create_model(timm_name, pretrained=pretrained, num_classes=0, strict_img_size=False, **model_args)
    if not isinstance(model, SwinTransformerV2) or len(model.layers) != STAGES:
        raise TypeError(f"{timm_name} is not a Swin Transformer V2 with {STAGES} stages")
    layers: Any = model.layers
    for layer in layers:
        for block in layer.blocks:
            block.set_input_size(block.input_resolution, block.window_size, always_partition=True)
    return SwinV2Backbone(model, pad_before_shift=pad_before_shift)


@BACKBONES.register("swinv2", SwinV2Options)
def build_swinv2_from_options(options: SwinV2Options, pretrained: bool) -> SwinV2Backbone:
    """Build a Swin V2 from its options, with random weights unless `pretrained`."""
    args = {"drop_path_rate": options.drop_path_rate, **options.model_args}
    return build_swinv2(options.timm_name, pretrained=pretrained, pad_before_shift=options.pad_before_shift, **args)
