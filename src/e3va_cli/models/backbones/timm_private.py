"""Private methods of timm's networks. `tests/models/backbones/test_timm_private.py` tests what is used."""

from __future__ import annotations

from typing import Any

from timm.models.eva import Eva
from timm.models.hieradet_sam2 import HieraDet
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


def shifted_window_attention(block: SwinTransformerBlock | SwinTransformerV2Block, x: Tensor) -> Tensor:
    """Compute timm's (shifted-)window attention without norm: (B, H, W, C) -> (B, H, W, C)."""
    return block._attn(x)


def relative_position_bias(attn: WindowAttention) -> Tensor:
    """Return what timm adds to the scores of every window: (1, heads, tokens, tokens)."""
    return attn._get_rel_pos_bias()


def position_embedding(model: VisionTransformer | Eva, patches: Tensor) -> Tensor:
    """Return the tokens, prefix tokens first, with their position embeddings: (B, H, W, C) -> (B, N, C)."""
    embedded: Any = model._pos_embed(patches)
    return embedded[0] if isinstance(model, Eva) else embedded


def hiera_position_embedding(model: HieraDet, patches: Tensor) -> Tensor:
    """Return the patches with their position embeddings: (B, H, W, C) -> (B, H, W, C)."""
    return model._pos_embed(patches)
