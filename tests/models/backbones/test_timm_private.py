"""What the package relies on in private methods of timm's Swin blocks. If a test fails after an update of timm, adapt
`backbones/timm_private.py`."""

import torch

from e3va_cli.models.backbones.timm_private import relative_position_bias, shifted_window_attention
from tests.swin_reference import WINDOW, attention, bias_of, large_biases


def test_attention_of_normalized_maps_with_shifted_windows(nano):
    """Used by `backbones/swin.py` where gradients are taken."""
    large_biases(nano.model)
    x = torch.randn(2, 2 * WINDOW, 3 * WINDOW, 32)
    with torch.no_grad():
        for index, block in enumerate(nano.eval().model.layers[0].blocks):
            result = shifted_window_attention(block, block.norm1(x))
            torch.testing.assert_close(result, attention(block, x, shifted=index == 1), rtol=1e-4, atol=1e-5)


def test_relative_position_bias(nano):
    """Used by `backbones/window_attention.py`."""
    large_biases(nano.model)
    attn = nano.model.layers[1].blocks[0].attn
    assert torch.equal(relative_position_bias(attn), bias_of(attn)[None])
