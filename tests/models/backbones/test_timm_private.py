"""What the package relies on in private methods of timm's networks. If a test fails after an update of timm, adapt
`backbones/timm_private.py`."""

import timm
import torch
from torch import nn

from e3va_cli.models.backbones.swinv2 import build_swinv2
from e3va_cli.models.backbones.timm_private import (
    hiera_position_embedding,
    position_embedding,
    relative_position_bias,
    shifted_window_attention,
)
from e3va_cli.models.backbones.vit import build_vit
from tests.swin_reference import WINDOW, attention, bias_of, large_biases


def test_attention_of_normalized_maps_with_shifted_windows(nano):
    """Used by `backbones/swin.py` where gradients are taken."""
    large_biases(nano.model)
    x = torch.randn(2, 2 * WINDOW, 3 * WINDOW, 32)
    with torch.no_grad():
        for index, block in enumerate(nano.eval().model.layers[0].blocks):
            result = shifted_window_attention(block, block.norm1(x))
            torch.testing.assert_close(result, attention(block, x, shifted=index == 1), rtol=1e-4, atol=1e-5)


def test_attention_of_swin_v2_without_its_norm():
    """Used by `backbones/swinv2.py` where gradients are taken."""
    sizes = {"embed_dim": 32, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}
    x = torch.randn(2, 16, 24, 32)
    for block in build_swinv2("swinv2_tiny_window8_256", **sizes).eval().model.layers[0].blocks:
        nn.init.ones_(block.norm1.weight)  # timm begins at 0
        with torch.no_grad():
            between = x + block.norm1(shifted_window_attention(block, x))
            torch.testing.assert_close(between + block.norm2(block.mlp(between)), block(x), rtol=1e-5, atol=1e-5)


def test_relative_position_bias(nano):
    """Used by `backbones/swin.py`."""
    large_biases(nano.model)
    attn = nano.model.layers[1].blocks[0].attn
    assert torch.equal(relative_position_bias(attn), bias_of(attn)[None])


def test_tokens_begin_with_the_prefix_tokens():
    """Used by `backbones/vit.py`."""
    for name in ("vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"):
        model = build_vit(name, depth=4, embed_dim=48, num_heads=3).model
        nn.init.normal_(model.reg_token)
        with torch.no_grad():
            tokens = position_embedding(model, torch.randn(2, 3, 4, 48))
        assert tokens.shape == (2, 5 + 12, 48)
        assert torch.equal(tokens[:, 1:5], model.reg_token.expand(2, 4, 48))


def test_position_embedding_of_hiera():
    """Used by `backbones/hiera.py`: interpolated, and one of windows repeated."""
    model = timm.create_model("sam2_hiera_tiny", embed_dim=16)
    patches = torch.randn(2, 16, 24, 16)
    with torch.no_grad():
        added = (hiera_position_embedding(model, patches) - patches).permute(0, 3, 1, 2)
    background = nn.functional.interpolate(model.pos_embed, (16, 24), mode="bicubic")
    windows = model.pos_embed_window.repeat(1, 1, 2, 3)
    torch.testing.assert_close(added, (background + windows).expand_as(added), atol=1e-6, rtol=1e-5)
