"""How z is kept: its product with gradients against float64, where channels are as uneven as pre-trained ones."""

import pytest
import torch

from e3va_cli.adapters.activations import AsFloats, AsIntegers


def tokens(largest, channels=96, count=20_000):
    """Tokens (N, C), one channel of which is `largest` times as large as the others."""
    z = torch.randn(count, channels) * torch.linspace(0.5, 2, channels)
    z[:, 5] = largest * (1 + 0.3 * z[:, 5])
    return z


def errors(keeping, z, rows):
    """Relative error of `z^T rows`: of the whole, and of the median channel."""
    found = keeping.product(keeping.pack(z), rows).double()
    exact = z.double().T @ rows.double()
    return float((found - exact).norm() / exact.norm()), float(
        ((found - exact).norm(dim=1) / exact.norm(dim=1)).median()
    )


@pytest.mark.parametrize("largest", [1, 100, 300, 1000])
@pytest.mark.parametrize("keeping", [AsIntegers(), AsFloats(torch.bfloat16)], ids=["8 bits", "16 bits"])
def test_outlier_channels_cost_no_accuracy(keeping, largest):
    whole, median = errors(keeping, tokens(largest), torch.randn(20_000, 16))
    assert whole < 0.01 and median < 0.01


def test_outlier_tokens_cost_little():
    z = tokens(300)
    z[::500] *= 50
    whole, median = errors(AsIntegers(), z, torch.randn(len(z), 16))
    assert whole < 0.01 and median < 0.015


def test_an_empty_channel_and_token_stay_zero():
    z = tokens(1)
    z[:, 3] = 0
    z[7] = 0
    keeping = AsIntegers()
    found = keeping.product(keeping.pack(z), torch.randn(len(z), 4))
    assert found.isfinite().all() and not found[3].any()


def test_a_quarter_of_float32_is_kept():
    z = tokens(1, channels=256)
    kept = sum(part.untyped_storage().nbytes() for part in AsIntegers().pack(z))
    assert kept == z.numel() + 4 * (len(z) + 256)
