"""Swin Transformer (arXiv 2103.14030) from timm, at any image size, as residual branches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import timm
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn

from e3va_cli.components.options import option
from e3va_cli.models.backbones.base import BACKBONES, BackboneOptions, Branch, ResidualBackbone, Stage
from e3va_cli.models.backbones.chunked import autocast_to_weights, chunked_tokens, is_chunked
from e3va_cli.models.backbones.swin_weights import to_timm_layout
from e3va_cli.models.backbones.timm_private import relative_position_bias
from e3va_cli.models.backbones.window_attention import (
    biased_attention,
    chunked_window_attention,
    shift_attn_mask,
    split_heads,
    timm_window_attention,
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
            return chunked_window_attention(
                block,
                window_attention,
                relative_position_bias(block.attn),
                attn_mask,
                block.norm1(x),
                compiled=compiled,
                pad_before_shift=pad_before_shift,
            )
        return timm_window_attention(block, block.norm1(x), pad_before_shift=pad_before_shift)


def window_attention(block: SwinTransformerBlock, windows: Tensor, bias: Tensor) -> Tensor:
    """Compute the attention of `block` in windows (N, tokens, C) with `bias` (1, heads, tokens, tokens) on scores."""
    attn = block.attn
    query, key, value = split_heads(attn.qkv(windows), attn.num_heads)
    return attn.proj(biased_attention(query, key, value, bias, attn.scale))


def mlp_branch(mlp: Callable[..., Tensor], block: Any, compiled: bool, x: Tensor) -> Tensor:
    """Compute `mlp(block, x)`, in chunks without gradients: (B, H, W, C) -> (B, H, W, C)."""
    with autocast_to_weights(block.mlp.fc1, x):
        return chunked_tokens(mlp, block, x, compiled) if is_chunked(block) else mlp(block, x)


def mlp_forward(block: SwinTransformerBlock, tokens: Tensor) -> Tensor:
    """Compute norm and MLP of `block`: (..., C) -> (..., C)."""
    return block.mlp(block.norm2(tokens))


class SwinBackbone(ResidualBackbone):
    """A timm Swin without its classifier.

    Attributes:
        model: the network, with timm's parameter names.
        pad_before_shift: pad maps to whole windows before shifting, as Swin's detection code. timm pads after
            shifting, which moves padding into the image and changes features at other sizes than the classifier's.
    """

    attention_branch: ClassVar[Callable[..., Tensor]] = staticmethod(attention_branch)
    mlp_forward: ClassVar[Callable[..., Tensor]] = staticmethod(mlp_forward)
    model: Any  # a SwinTransformer, whose attributes timm leaves untyped

    def __init__(self, model: Any, *, pad_before_shift: bool = True) -> None:
        super().__init__()
        self.model = model
        self.pad_before_shift = pad_before_shift
        # The classifier's norm is replaced by an output norm per stage.
        self.model.norm = nn.Identity()
        self.mean = tuple(self.model.pretrained_cfg["mean"])
        self.std = tuple(self.model.pretrained_cfg["std"])
        for window_h, window_w in {layer.blocks[0].window_size for layer in self.model.layers}:
            mask = shift_attn_mask(window_h, window_w)
            self.register_buffer(f"attn_mask_{window_h}x{window_w}", mask, persistent=False)

    def attn_mask(self, window_h: int, window_w: int) -> Tensor:
        """Return the `shift_attn_mask` of windows of this size."""
        return self.get_buffer(f"attn_mask_{window_h}x{window_w}")

    def stem(self, images: Tensor) -> Tensor:
        """Embed patches: (B, 3, H, W) -> (B, ceil(H/4), ceil(W/4), C)."""
        patch_h, patch_w = self.model.patch_embed.patch_size
        height, width = images.shape[-2:]
        images = nn.functional.pad(images, (0, -width % patch_w, 0, -height % patch_h))
        return self.model.patch_embed(images)

    def linears(self, block: Any) -> dict[str, nn.Module]:
        """Return the layers of attention and MLP, without the MLP of position biases in Swin V2."""
        return {name: layer for name, layer in super().linears(block).items() if "cpb_mlp" not in name}

    def convert_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the tensors of a file in one of the layouts of `swin_weights` to timm's names."""
        return to_timm_layout(state)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the relative position bias tables."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}

    @property
    def stages(self) -> list[Stage]:
        """One stage per Swin layer, with two branches, attention and MLP, per block."""
        stages = []
        for layer, info in zip(self.model.layers, self.model.feature_info, strict=True):
            branches = tuple(branch for block in layer.blocks for branch in self._block_branches(block))
            stages.append(Stage(info["num_chs"], info["reduction"], layer.downsample, branches))
        return stages

    def _block_branches(self, block: Any) -> tuple[Branch, Branch]:
        """Return the two residual branches of a block, which end in timm's `drop_path1` and `drop_path2`."""
        attn_mask = self.attn_mask(*block.window_size)
        attend = partial(self.attention_branch, block, attn_mask, self.compiled, self.pad_before_shift)
        return (
            Branch("attention", block, attend, block.drop_path1, block.attn.qkv),
            Branch("mlp", block, partial(mlp_branch, self.mlp_forward, block, self.compiled), block.drop_path2),
        )


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
