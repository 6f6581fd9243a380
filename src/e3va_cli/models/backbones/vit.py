"""Plain vision transformers of timm (ViT, DINOv2, DINOv3, EVA-02), at any image size, as residual branches.

Papers: arXiv 2010.11929 (ViT), 2304.07193 (DINOv2), 2508.10104 (DINOv3), 2303.11331 (EVA-02).

The residual stream is a map (B, R + H, W, C). Its last H rows are the patch grid. Its first R rows end with the class
and register tokens; the places before those are unused. Without them, the flattened map is timm's sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import timm
import torch
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention

from e3va_cli.models.backbones.base import BACKBONES, BackboneOptions, Branch, ResidualBackbone, Stage, pad_to_multiple
from e3va_cli.models.backbones.chunked import as_compiled, autocast_to_weights, chunked_tokens, is_chunked
from e3va_cli.models.backbones.timm_private import position_embedding
from e3va_cli.models.backbones.vit_weights import to_timm_layout
from e3va_cli.models.backbones.window_attention import split_heads
from e3va_cli.utils.amp import autocast_dtype

STAGES = 4
BLOCKS = (Block, ResPostBlock, EvaBlock, EvaBlockPostNorm)
POST_NORM = (ResPostBlock, EvaBlockPostNorm)
ATTENTIONS = (Attention, AttentionRope, EvaAttention)


@dataclass
class ViTOptions(BackboneOptions):
    """Options of a VisionTransformer or Eva of timm."""

    fixed_args = BackboneOptions.fixed_args | {"global_pool", "dynamic_img_size", "dynamic_img_pad", "patch_drop_rate"}
    weightless_args = BackboneOptions.weightless_args | {
        "proj_drop_rate",
        "attn_drop_rate",
        "pos_drop_rate",
        "img_size",
    }


def fused_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """Compute attention (B, heads, N, C) without storing the N x N scores, on CPU, GPU and the meta device."""
    if query.is_meta:  # PyTorch would store them there
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
    return scaled_dot_product_attention(query, key, value, dropout_p=dropout)


def rotate(attn: Any, x: Tensor, rope: Tensor) -> Tensor:
    """Apply the rotary position embedding to all but the prefix tokens: (B, heads, N, C) -> (B, heads, N, C)."""
    prefix, patches = x.tensor_split([attn.num_prefix_tokens], dim=2)
    return torch.cat((prefix, apply_rot_embed_cat(patches, rope, half=attn.rotate_half)), dim=2)


def attention(attn: Any, rope: Tensor | None, x: Tensor) -> Tensor:
    """Compute multi-head self-attention with the weights of one of `ATTENTIONS`: (B, N, C) -> (B, N, C)."""
    if attn.qkv is not None:
        qkv = attn.qkv(x)  # called as a module, for its hooks
        if getattr(attn, "q_bias", None) is not None:
            qkv = qkv + torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        query, key, value = split_heads(qkv, attn.num_heads)
    else:
        query, key, value = (
            project(x).unflatten(2, (-1, attn.head_dim)).transpose(1, 2)
            for project in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
    query, key = attn.q_norm(query), attn.k_norm(key)  # B, heads, N, C / heads
    if rope is not None:
        query, key = (rotate(attn, one, rope).type_as(value) for one in (query, key))
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = (one.repeat_interleave(groups, dim=1) for one in (key, value))
    mixed = fused_attention(query, key, value, attn.attn_drop.p if attn.training else 0.0)
    mixed = attn.norm(mixed.transpose(1, 2).flatten(2))
    if attn.gate is not None:
        mixed = mixed * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(mixed))


def residual_branch(block: Any, number: int, inner: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Compute the first or second branch of a block without drop path: `inner` between norm and layer scale."""
    norm = getattr(block, f"norm{number}")
    if isinstance(block, POST_NORM):
        return norm(inner(x))
    z = inner(norm(x))
    if isinstance(block, EvaBlock):
        gamma = getattr(block, f"gamma_{number}")
        return z if gamma is None else gamma * z
    return getattr(block, f"ls{number}")(z)


def attention_branch(block: Any, rope: Tensor | None, tokens: Tensor) -> Tensor:
    """Compute the attention of `block`: (B, N, C) -> (B, N, C)."""
    return residual_branch(block, 1, partial(attention, block.attn, rope), tokens)


def mlp_branch(block: Any, tokens: Tensor) -> Tensor:
    """Compute the MLP of `block`: (..., C) -> (..., C)."""
    return residual_branch(block, 2, block.mlp, tokens)


class ViTBackbone(ResidualBackbone):
    """A VisionTransformer or Eva of timm without its last norm and classifier, cut into four stages of equal depth.

    Patches of 14 pixels are put on a grid of stride 16 by resizing the images to 14/16 of their size.

    Attributes:
        model: the network, with timm's parameter names.
        stride: pixels from one patch to the next, a power of two.

    Raises:
        TypeError: a block is not a sequence of an attention and an MLP branch.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        if len(self.model.blocks) < STAGES:
            raise TypeError(f"{len(self.model.blocks)} blocks, fewer than {STAGES}")
        for block in self.model.blocks:
            if type(block) not in BLOCKS or type(block.attn) not in ATTENTIONS:
                raise TypeError(f"blocks of {type(block).__name__} are not supported")
        (self.patch, height) = self.model.patch_embed.patch_size
        if self.patch != height:
            raise TypeError("patches that are not square are not supported")
        self.model.prune_intermediate_layers(1, prune_norm=True)  # all blocks stay
        self.stride = 1 << (self.patch - 1).bit_length()
        self.mean = tuple(self.model.pretrained_cfg["mean"])
        self.std = tuple(self.model.pretrained_cfg["std"])
        self._rope: tuple[Any, Any] = (None, None)  # cache of one, with its grid and device

    def stem(self, images: Tensor) -> Tensor:
        """Embed patches and positions: (B, 3, H, W) -> (B, R + ceil(H/stride), ceil(W/stride), C)."""
        images = pad_to_multiple(images, self.stride)
        height, width = images.shape[2] // self.stride, images.shape[3] // self.stride
        if self.patch != self.stride:
            images = interpolate(images, size=(height * self.patch, width * self.patch), mode="bilinear")
        tokens = position_embedding(self.model, self.model.patch_embed(images))
        if self._rope_is_trained:
            self._rope = (None, None)
        tokens = self.model.norm_pre(tokens)  # B, prefix + H * W, C
        unused = self.prefix_rows(width) * width - self.model.num_prefix_tokens
        return pad(tokens, (0, 0, unused, 0)).unflatten(1, (-1, width))

    def prefix_rows(self, width: int) -> int:
        """Return R, the number of rows of class and register tokens in a stream of this width."""
        return -(-self.model.num_prefix_tokens // width)

    def patches(self, stream: Tensor) -> Tensor:
        """Return the patch grid of a stream: (B, R + H, W, C) -> (B, H, W, C)."""
        rows = self.prefix_rows(stream.shape[2])
        return stream[:, rows:] if rows else stream

    def no_weight_decay(self) -> set[str]:
        """Return the names of position embeddings and of class and register tokens."""
        named = dict(self.model.named_parameters())
        return {f"model.{name}" for name in self.model.no_weight_decay() if name in named}

    def convert_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the tensors of a file in one of the layouts of `vit_weights` to timm's names."""
        return to_timm_layout(state, self.model)

    @property
    def stages(self) -> list[Stage]:
        """Four stages of equal depth, with two branches, attention and MLP, per block."""
        cuts = [len(self.model.blocks) * stage // STAGES for stage in range(STAGES + 1)]
        branches = [self._block_branches(index, block) for index, block in enumerate(self.model.blocks)]
        return [
            Stage(
                self.model.embed_dim,
                self.stride,
                # The output of a stage must outlive the in-place sums of the next one.
                torch.clone if start else nn.Identity(),
                tuple(branch for pair in branches[start:end] for branch in pair),
            )
            for start, end in pairwise(cuts)
        ]

    def _block_branches(self, index: int, block: Any) -> tuple[Branch, Branch]:
        """Return the two residual branches of a block, which end in timm's `drop_path1` and `drop_path2`."""
        attn = block.attn
        separate = None if attn.qkv is not None else (attn.q_proj, attn.v_proj)
        return (
            Branch("attention", block, partial(self._attend, index, block), block.drop_path1, attn.qkv, separate),
            Branch("mlp", block, partial(self._transform, block), block.drop_path2),
        )

    def _attend(self, index: int, block: Any, x: Tensor) -> Tensor:
        """Compute the attention branch of `block`: (B, R + H, W, C) -> (B, R + H, W, C)."""
        rows, width = self.prefix_rows(x.shape[2]), x.shape[2]
        unused = rows * width - self.model.num_prefix_tokens
        rope = self._rope_embedding(index, (x.shape[1] - rows, width))
        tokens = x.flatten(1, 2)[:, unused:]
        with autocast_to_weights(block.attn.proj, x):
            if not is_chunked(block):
                return pad(attention_branch(block, rope, tokens), (0, 0, unused, 0)).view(x.shape)
            attend = as_compiled(attention_branch) if self.compiled else attention_branch
            result = torch.zeros_like(x, dtype=autocast_dtype(x) or x.dtype, memory_format=torch.contiguous_format)
            for image, image_result in zip(tokens.split(1), result.flatten(1, 2)[:, unused:].split(1), strict=True):
                image_result.copy_(attend(block, rope, image))
            return result

    def _transform(self, block: Any, x: Tensor) -> Tensor:
        """Compute the MLP branch of `block`: (B, R + H, W, C) -> (B, R + H, W, C)."""
        with autocast_to_weights(block.attn.proj, x):
            if is_chunked(block):
                return chunked_tokens(mlp_branch, block, x, self.compiled)
            return mlp_branch(block, x)

    @property
    def _rope_is_trained(self) -> bool:
        rope = getattr(self.model, "rope", None)
        return rope is not None and any(parameter.requires_grad for parameter in rope.parameters())

    def _rope_embedding(self, index: int, grid: tuple[int, int]) -> Tensor | None:
        """Return the rotary position embedding of a block for a patch grid, None if the network has none."""
        rope = getattr(self.model, "rope", None)
        if rope is None:
            return None
        cached_key, embedding = self._rope
        if torch.compiler.is_compiling():
            embedding = rope.get_embed(shape=grid)
        elif cached_key != (key := (grid, self.model.patch_embed.proj.weight.device)):
            with torch.inference_mode(False), torch.set_grad_enabled(self._rope_is_trained and torch.is_grad_enabled()):
                embedding = rope.get_embed(shape=grid)
            self._rope = (key, embedding)
        return embedding[index] if getattr(self.model, "rope_mixed", False) else embedding


def build_vit(timm_name: str, *, pretrained: bool = False, **model_args: Any) -> ViTBackbone:
    """Build timm's VisionTransformer or Eva `timm_name` for images of any size.

    Raises:
        TypeError: `timm_name` is another network, or its blocks are not sequences of residual branches.
    """
    model = timm.create_model(timm_name, pretrained=pretrained, num_classes=0, dynamic_img_size=True, **model_args)
    if not isinstance(model, VisionTransformer | Eva):
        raise TypeError(f"{timm_name} is not a VisionTransformer or Eva")
    return ViTBackbone(model)


@BACKBONES.register("vit", ViTOptions)
def build_vit_from_options(options: ViTOptions, pretrained: bool) -> ViTBackbone:
    """Build a VisionTransformer or Eva from its options, with random weights unless `pretrained`."""
    args = {"drop_path_rate": options.drop_path_rate, **options.model_args}
    return build_vit(options.timm_name, pretrained=pretrained, **args)
