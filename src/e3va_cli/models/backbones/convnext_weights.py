"""Conversion of ConvNeXt's weights from the layouts of the authors and of transformers to timm's."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from timm.models import convnext
from torch import Tensor

from e3va_cli.models.backbones.transformers_weights import prefix_of, rename_tensors

STEMS = ("embeddings.patch_embeddings.weight", "stages.0.downsample_layers.0.weight")  # of transformers
RENAMES = [
    (r"^embeddings\.patch_embeddings\.", "stem.0."),
    (r"^embeddings\.layernorm\.", "stem.1."),
    (r"^encoder\.", ""),
    (r"^stages\.0\.downsample_layers\.", "stem."),
    (r"\.downsampl(ing_layer|e_layers)\.", ".downsample."),
    (r"\.layers\.", ".blocks."),
    (r"\.(dwconv|depthwise_conv)\.", ".conv_dw."),
    (r"\.(pwconv|pointwise_conv)([12])\.", r".mlp.fc\2."),
    (r"\.grn\.", ".mlp.grn."),
    (r"\.layer_scale_parameter$", ".gamma"),
    (r"\blayer_?norm\.", "norm."),
]


def to_timm_layout(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Rename tensors to timm's names; those of other layouts are returned unchanged.

    Args:
        state: in the layout of timm, of the authors of ConvNeXt, ConvNeXt V2 or DINOv3, or of transformers.
        model: timm's, that the tensors are for.
    """
    for stem in STEMS:
        if (prefix := prefix_of(stem, state)) is not None:
            state = rename_tensors(state, prefix, RENAMES)
    with suppress(LookupError, RuntimeError):  # mismatches are reported by the caller
        return convnext.checkpoint_filter_fn(state, model)
    return state
