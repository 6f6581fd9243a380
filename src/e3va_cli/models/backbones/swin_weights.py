"""Conversion of Swin's and Swin V2's weights from the layouts of the authors and of transformers to timm's."""

from __future__ import annotations

import re

from torch import Tensor

from e3va_cli.models.backbones.transformers_weights import prefix_of, rename_tensors

PATCH_EMBEDDING = "embeddings.patch_embeddings.projection.weight"  # of transformers
RENAMES = [
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^encoder\.", ""),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.continuous_position_bias_mlp\.", ".cpb_mlp."),
    (r"\.attention\.(self|relative_position_bias)\.(cpb_mlp|logit_scale|relative)", r".attn.\2"),
    (r"^layernorm\.", "norm."),
]
V2_RENAMES = [(r"\.attention\.self\.(q|v)(uery|alue)\.bias$", r".attn.\1_bias")]


def to_timm_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors in the layout of the authors or of transformers to timm's names; others are returned unchanged."""
    if (prefix := prefix_of(PATCH_EMBEDDING, state)) is not None:
        is_v2 = any(name.endswith(".logit_scale") for name in state)
        state = rename_tensors(state, prefix, V2_RENAMES + RENAMES if is_v2 else RENAMES)
    if not any(name.startswith("layers.0.downsample.") for name in state):
        return state

    def renamed(name: str) -> str:  # `downsample` ends a stage, timm's begins the next
        return re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name)

    return {renamed(name): tensor for name, tensor in state.items()}
