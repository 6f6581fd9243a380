"""Conversion of plain vision transformers' weights from the layouts of the authors and of transformers to timm's."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

import torch
from timm.models import eva, vision_transformer
from torch import Tensor

NOT_NEEDED = re.compile(r"^(fc_norm|attn_pool|head|head_dist|norm)\.|^mask_token$")  # for dense features
CLASS_TOKEN = "embeddings.cls_token"  # of transformers' DINOv2 and DINOv3
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
    (r"\.mlp\.down_proj\.", ".mlp.w3."),
    (r"^layernorm\.", "norm."),
]
PROJECTION = re.compile(r"\.attention\.(?:attention\.)?(q|k|v)(?:uery|ey|alue|_proj)\.(weight|bias)$")


def to_timm_layout(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Rename tensors to timm's names and resize position embeddings; tensors of other layouts are returned unchanged.

    Args:
        state: in the layout of timm, of the authors of DINOv2, DINOv3 or EVA, or of transformers' DINOv2 or DINOv3.
        model: timm's, that the tensors are for.
    """
    state = dict(state)
    if token := next((name for name in state if name.endswith(CLASS_TOKEN)), None):
        state = from_transformers(state, prefix=token.removesuffix(CLASS_TOKEN))
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


def from_transformers(state: dict[str, Tensor], *, prefix: str) -> dict[str, Tensor]:
    """Rename tensors of transformers' DINOv2 or DINOv3 that start with `prefix` to the authors' names."""
    named: dict[str, Tensor] = {}
    projections: dict[str, dict[str, Tensor]] = {}
    is_v3 = not any(name.endswith("embeddings.position_embeddings") for name in state)
    gated = any(".mlp.gate_proj." in name for name in state)
    for name, tensor in state.items():
        if not name.startswith(prefix):
            continue
        short = name.removeprefix(prefix)
        for pattern, replacement in RENAMES:
            short = re.sub(pattern, replacement, short)
        short = short.replace(".mlp.up_proj.", ".mlp.w2." if gated else ".mlp.fc1.")
        short = short if gated or not is_v3 else short.replace(".mlp.w3.", ".mlp.fc2.")
        if is_v3 and short == "register_tokens":
            short = "storage_tokens"
        if found := PROJECTION.search(short):
            projections.setdefault(PROJECTION.sub(rf".attn.qkv.{found[2]}", short), {})[found[1]] = tensor
        else:
            named[short] = tensor
    for name, parts in projections.items():
        query = parts.get("q", parts.get("v", next(iter(parts.values()))))
        named[name] = torch.cat([parts.get(letter, torch.zeros_like(query)) for letter in "qkv"])
    return named
