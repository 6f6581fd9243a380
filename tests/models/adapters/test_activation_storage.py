import pytest
import torch
from torch import nn

from e3va_cli.models.adapters.activation_storage import CHUNK_TOKENS, Int8Storage, build_storage
from e3va_cli.models.adapters.dual_low_rank import DualLowRankAdapter

BOUND = 0.01


def tokens(width, outlier=1.0, count=2000):
    """Normal random tokens, every tenth scaled by 10 and one channel by `outlier`."""
    z = torch.randn(count, width)
    z[::10] *= 10
    z[:, 7] *= outlier
    return z


def errors(found, reference):
    """Relative norm of the difference: overall, and the median over rows."""
    difference = found.double() - reference
    rows = difference.norm(dim=1) / reference.norm(dim=1)
    return float(difference.norm() / reference.norm()), float(rows.median())


@pytest.mark.parametrize("outlier", [1, 100, 300, 1e4])
@pytest.mark.parametrize("width", [96, 128, 1024])
@pytest.mark.parametrize(
    ("dtype", "rows_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
def test_int8_product_is_within_one_percent_of_float64(width, outlier, dtype, rows_dtype):
    z, rows = tokens(width, outlier).to(dtype), torch.randn(2000, 64).to(rows_dtype)
    storage = Int8Storage()
    found = storage.weight_grad(storage.pack(z), rows)
    assert max(errors(found, z.double().T @ rows.double())) < BOUND


def test_int8_storage_of_small_values_with_float16_rows():
    z, rows = 1e-4 * tokens(128, 300).clamp(-200, 200), torch.randn(2000, 64).half()
    storage = Int8Storage()
    found = storage.weight_grad(storage.pack(z.half()), rows)
    assert max(errors(found, z.half().double().T @ rows.double())) < BOUND


def test_int8_storage_keeps_zeros():
    z = tokens(128)
    z[:, 3], z[5] = 0, 0
    storage = Int8Storage()
    found = storage.weight_grad(storage.pack(z), torch.eye(2000)[:, :8])
    assert found.isfinite().all() and not found[3].any() and not found[:, 5].any()


@pytest.mark.parametrize("outlier", [1, 300])
def test_int8_gradient_of_first_factor_is_within_one_percent_of_float64(outlier):
    adapter = DualLowRankAdapter(256, hidden=128, rank=16, storage=build_storage("compress", 8))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.1)
    z = tokens(256, outlier, CHUNK_TOKENS + 300)
    z[:, 7] -= z[:, 7].mean()
    weight = torch.randn_like(z)
    found = torch.autograd.grad((adapter(torch.zeros_like(z), z) * weight).sum(), list(adapter.parameters()))
    a, b, bias, p, q, last = (w.detach().double().requires_grad_() for w in adapter.weights)
    exact = z.double() + nn.functional.gelu(z.double() @ a @ b + bias) @ p @ q + last
    reference = torch.autograd.grad((exact * weight.double()).sum(), [a, b, bias, p, q, last])
    by_shape = dict(zip((id(w) for w in adapter.parameters()), found, strict=True))
    of_a, *others = (by_shape[id(w)] for w in adapter.weights)
    assert max(errors(of_a, reference[0])) < BOUND
    for ours, theirs in zip(others, reference[1:], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("width", [96, 1024])
def test_int8_storage_size(width):
    z = tokens(width)
    nbytes = sum(tensor.untyped_storage().nbytes() for tensor in Int8Storage().pack(z))
    assert nbytes == 2000 * width + 2 * 2000 * max(1, width // 64 if width % 64 == 0 else 1) + 4 * width
