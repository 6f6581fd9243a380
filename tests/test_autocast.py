"""16-bit convolutions of tiny maps on a CPU: their weight gradient does not depend on what memory held before."""

import pytest
import torch
from torch import nn

from e3va_cli.autocast import SmallMapGuard


def poison():
    """Fill memory that is then free with NaN."""
    tensors = [torch.full((count,), torch.nan) for count in range(100, 100_000, 1500)]
    del tensors


def step(conv, x, dtype):
    """Train once; returns the output."""
    conv.zero_grad()
    poison()
    with torch.autocast("cpu", dtype=dtype):
        output = conv(x)
    poison()
    output.float().sum().backward()
    return output


def guarded(*args, **options):
    conv = nn.Conv2d(*args, **options)
    SmallMapGuard().watch(conv)
    return conv


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (1, 20), (12, 2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_tiny_maps_are_right(dtype, size, stride):
    conv = guarded(32, 32, 3, stride=stride, padding=1)
    reference = nn.Conv2d(32, 32, 3, stride=stride, padding=1).double()
    reference.load_state_dict(conv.state_dict())
    x = torch.randn(2, 32, *size)
    reference(x.double()).sum().backward()
    for _ in range(10):
        output = step(conv, x, dtype)
        assert output.dtype == dtype
        error = (conv.weight.grad - reference.weight.grad).norm() / reference.weight.grad.norm()
        assert error < 1e-5  # computed in float32; NaN fails


def computed_in(conv, x):
    """The dtype that a convolution runs in under autocast, as it is saved for the backward pass."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        node = conv(x).grad_fn
    while not hasattr(node, "_saved_weight"):
        node = node.next_functions[0][0]
    return node._saved_weight.dtype


def test_only_tiny_maps_are_guarded():
    conv = guarded(8, 8, 3, padding=1)
    for size, expected in (((3, 9), torch.float32), ((4, 4), torch.bfloat16)):
        assert computed_in(conv, torch.randn(1, 8, *size)) == expected
    pointwise = guarded(8, 8, 1)
    assert computed_in(pointwise, torch.randn(1, 8, 2, 2)) == torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv(torch.randn(1, 8, 2, 2)).dtype == torch.bfloat16


def test_autocast_is_as_before_after_an_error():
    conv = guarded(8, 8, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(RuntimeError):
            conv(torch.randn(1, 8, 2, 2))  # smaller than the kernel
        assert torch.is_autocast_enabled("cpu")
        assert conv(torch.randn(1, 8, 9, 9)).dtype == torch.bfloat16


def test_every_convolution_of_a_model_is_guarded(config):
    from e3va_cli.model import build_model

    model = build_model(config("head=retinanet", "head.fpn_channels=32", "adapter=mona"), num_classes=3)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert any(
                getattr(hook, "__self__", None).__class__ is SmallMapGuard for hook in module._forward_hooks.values()
            )
