"""Hiera (arXiv 2306.00989) as SAM 2 (arXiv 2408.00714) has it, from timm, at any image size, as residual branches.

The first block of a stage pools its queries, and its skip path is a pooled projection of the normed stream: the
stage's downsampling. The attention of that block reads the stream before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from timm.models.hieradet_sam2 import HieraDet, MultiScaleBlock
from torch import Tensor, nn

from e3va_cli.models.backbones.base import BACKBONES, BackboneOptions, Branch, ResidualBackbone, Stage, pad_to_multiple
from e3va_cli.models.backbones.chunked import as_compiled, autocast_to_weights, is_chunked
from e3va_cli.models.backbones.swin import mlp_branch
from e3va_cli.models.backbones.timm_private import hiera_position_embedding
from e3va_cli.models.backbones.transformers_weights import prefix_of, rename_tensors
from e3va_cli.models.backbones.vit import fused_attention
from e3va_cli.models.backbones.window_attention import (
    chunk_slices,
    pad_to_windows,
    split_heads,
    window_partition,
    window_reverse,
)
from e3va_cli.utils.amp import autocast_dtype

STAGES = 4  # of strides 4 to 32
RENAMES = [  # from the layouts of SAM 2's authors and of transformers to timm's
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.mlp\.(layers\.0|proj_in)\.", ".mlp.fc1."),
    (r"\.mlp\.(layers\.1|proj_out)\.", ".mlp.fc2."),
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
]


@dataclass
class HieraOptions(BackboneOptions):
    """Options of a HieraDet of timm."""

    fixed_args = BackboneOptions.fixed_args | {"global_pool", "patch_size", "q_pool", "q_stride"}


def pooled(pool: nn.Module | None, x: Tensor) -> Tensor:
    """Pool a map: (B, H, W, C) -> (B, H / 2, W / 2, C); without `pool` return it unchanged."""
    return x if pool is None else pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def downsample(block: MultiScaleBlock, x: Tensor) -> Tensor:
    """Compute the skip path of a stage's first block: (B, H, W, C) -> (B, H / 2, W / 2, C')."""
    x = pooled(block.pool, block.proj(block.norm1(x)))
    return x.clone(memory_format=torch.contiguous_format)  # not a view: the highway is updated in place


def window_attention(block: MultiScaleBlock, windows: Tensor, height: int) -> Tensor:
    """Compute attention, with pooled queries, and layer scale in windows `height` tokens high: (N, tokens, C)."""
    attn: Any = block.attn
    query, key, value = split_heads(attn.qkv(windows), attn.num_heads)  # N, heads, tokens, C / heads
    if attn.q_pool is not None:
        query_map = query.transpose(1, 2).flatten(2).unflatten(1, (height, -1))
        query = pooled(attn.q_pool, query_map).flatten(1, 2).unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
    mixed = fused_attention(query, key, value, 0.0)
    return block.ls1(attn.proj(mixed.transpose(1, 2).flatten(2)))


def attention_branch(block: MultiScaleBlock, compiled: bool, x: Tensor) -> Tensor:
    """Compute the attention of `block` in its windows, or on the whole map: (B, H, W, C) -> (B, H', W', C')."""
    height, width = x.shape[1:3]
    window = block.window_size if block.is_windowed else (height, width)
    stride = block.q_stride[0] if block.q_stride else 1
    with autocast_to_weights(block.attn.qkv, x):
        windowed = pad_to_windows(block.norm1(x), *window)
        if is_chunked(block):
            attend = as_compiled(window_attention) if compiled else window_attention
            shape = (len(x), windowed.shape[1] // stride, windowed.shape[2] // stride, block.dim_out)
            result = x.new_empty(shape, dtype=autocast_dtype(x) or x.dtype)
            for images, rows in chunk_slices(windowed, window, block.attn.num_heads):
                pooled_rows = slice(rows.start // stride, rows.stop // stride)
                result[images, pooled_rows].copy_(map_attention(attend, block, window, windowed[images, rows]))
        else:
            result = map_attention(window_attention, block, window, windowed)
    return result[:, : height // stride, : width // stride].contiguous()


def map_attention(attend: Callable[..., Tensor], block: Any, window: tuple[int, int], x: Tensor) -> Tensor:
    """Compute `attend(block, windows, height)` of a map of whole windows: (B, H, W, C) -> (B, H', W', C')."""
    images, height, width, _ = x.shape
    stride = block.q_stride[0] if block.q_stride else 1
    windows = attend(block, window_partition(x, *window), window[0])
    shape = (images, height // stride, width // stride, block.dim_out)
    return window_reverse(windows, shape, window[0] // stride, window[1] // stride)


def mlp_forward(block: MultiScaleBlock, tokens: Tensor) -> Tensor:
    """Compute norm, MLP and layer scale of `block`: (..., C) -> (..., C)."""
    return block.ls2(block.mlp(block.norm2(tokens)))


class HieraBackbone(ResidualBackbone):
    """A timm HieraDet without its classifier.

    Attributes:
        model: the network, with timm's parameter names.
    """

    model: Any  # a HieraDet

    def __init__(self, model: HieraDet) -> None:
        super().__init__()
        self.model = model
        # The classifier's norm is replaced by an output norm per stage.
        self.model.head = nn.Identity()
        self.mean = tuple(self.model.pretrained_cfg["mean"])
        self.std = tuple(self.model.pretrained_cfg["std"])

    def stem(self, images: Tensor) -> Tensor:
        """Embed patches and positions of images (B, 3, H, W), padded to the coarsest stride, as (B, H/4, W/4, C)."""
        images = pad_to_multiple(images, self.model.feature_info[-1]["reduction"])
        return hiera_position_embedding(self.model, self.model.patch_embed(images)).contiguous()

    def linears(self, block: Any) -> dict[str, nn.Module]:
        """Return the layers of attention and MLP, without the projection of a stage's downsampling."""
        return {name: layer for name, layer in super().linears(block).items() if name != "proj"}

    def convert_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the tensors of SAM 2's authors or transformers to timm's names, without those of its other parts."""
        prefix = prefix_of("pos_embed_window", state)
        return state if prefix is None else rename_tensors(state, prefix, RENAMES)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the position embeddings."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}

    @property
    def stages(self) -> list[Stage]:
        """One stage per resolution, with two branches, attention and MLP, per block."""
        stages, blocks = [], list(self.model.blocks)
        starts = [0, *(end + 1 for end in self.model.stage_ends)]
        for start, end, info in zip(starts, starts[1:], self.model.feature_info, strict=False):
            branches = tuple(branch for block in blocks[start:end] for branch in self._block_branches(block))
            down = partial(downsample, blocks[start]) if start else nn.Identity()
            stages.append(Stage(info["num_chs"], info["reduction"], down, branches))
        return stages

    def _block_branches(self, block: Any) -> tuple[Branch, Branch]:
        """Return the two residual branches of a block, which end in timm's `drop_path1` and `drop_path2`."""
        return (
            Branch(
                "attention",
                block,
                partial(attention_branch, block, self.compiled),
                block.drop_path1,
                block.attn.qkv,
                before_downsampling=block.dim != block.dim_out,
            ),
            Branch("mlp", block, partial(mlp_branch, mlp_forward, block, self.compiled), block.drop_path2),
        )


@BACKBONES.register("hiera", HieraOptions)
def build_hiera(options: HieraOptions, pretrained: bool) -> HieraBackbone:
    """Build a Hiera from its options, with random weights unless `pretrained`.

    Raises:
        TypeError: `timm_name` is not a HieraDet with four stages.
    """
    args = {"drop_path_rate": options.drop_path_rate, **options.model_args}
    model = timm.create_model(options.timm_name, pretrained=pretrained, num_classes=0, **args)
    if not isinstance(model, HieraDet) or len(model.stage_ends) != STAGES:
        raise TypeError(f"{options.timm_name} is not a HieraDet with {STAGES} stages")
    return HieraBackbone(model)
