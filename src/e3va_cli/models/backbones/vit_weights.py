"""Conversion of plain vision transformers' weights from the layouts of the authors and of transformers to timm's."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

from timm.models import eva, vision_transformer
from torch import Tensor

from e3va_cli.models.backbones.transformers_weights import prefix_of, rename_tensors

NOT_NEEDED = re.compile(r"^(fc_norm|attn_pool|head|head_dist|norm)\.|^mask_token$")  # for dense features
CLASS_TOKEN = "embeddings.cls_token"  # of transformers' DINOv2 and DINOv3
POSITION_EMBEDDINGS = "embeddings.position_embeddings"  # of its DINOv2
RENAMES = [
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?(weight|bias)$", r"patch_embed.proj.\2"),
    (r"^(encoder\.|model\.)?layer\.(\d+)\.", r"blocks.\2."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"\.mlp\.gate_proj\.", ".mlp.w1."),
    (r"^layernorm\.", "norm."),
]
V3_RENAMES = [(r"^register_tokens$", "storage_tokens")]
GATED_RENAMES = [(r"\.mlp\.up_proj\.", ".mlp.w2."), (r"\.mlp\.down_proj\.", ".mlp.w3.")]
PLAIN_RENAMES = [(r"\.mlp\.up_proj\.", ".mlp.fc1."), (r"\.mlp\.down_proj\.", ".mlp.fc2.")]


def to_timm_layout(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Rename tensors to timm's names and resize position embeddings; tensors of other layouts are returned unchanged.

    Args:
        state: in the layout of timm, of the authors of DINOv2, DINOv3 or EVA, or of transformers' DINOv2 or DINOv3.
        model: timm's, that the tensors are for.
    """
    state = dict(state)
    if (prefix := prefix_of(CLASS_TOKEN, state)) is not None:
        state = from_transformers(state, prefix)
    if isinstance(model, eva.Eva) and not any(name.endswith(".q_bias") for name, _ in model.named_parameters()):
        # All zero in the published DINOv3, and so left out by timm.
        state = {k: v for k, v in state.items() if not k.endswith(".attn.qkv.bias") or v.is_meta or bool(v.any())}
        if any(name.endswith(".attn.qkv.bias") for name in state):
            return state  # an architecture with biases
    convert = (eva if isinstance(model, eva.Eva) else vision_transformer).checkpoint_filter_fn
    with suppress(
        AssertionError, LookupError, RuntimeError, TypeError, ValueError
    ):  # mismatches are reported by the caller
        state = convert(state, model)
    return {name: tensor for name, tensor in state.items() if not NOT_NEEDED.search(name)}


def from_transformers(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Rename tensors of transformers' DINOv2 or DINOv3 below `prefix` to the authors' names."""
    renames = [*RENAMES, *(GATED_RENAMES if any(".mlp.gate_proj." in name for name in state) else PLAIN_RENAMES)]
    if prefix + POSITION_EMBEDDINGS not in state:
        renames += V3_RENAMES
    return rename_tensors(state, prefix, renames)
