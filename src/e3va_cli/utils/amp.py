"""What autocast does at a place of the program."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast computes products with `x` in here; None where it is off or the device has none."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def mixed_precision(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """A context that computes as a run with this `trainer.precision` does on `device`; a CPU has bfloat16 alone."""
    if precision == "32":
        return nullcontext()
    half = torch.float16 if precision == "16-mixed" and device.type != "cpu" else torch.bfloat16
    return torch.autocast(device.type, dtype=half, cache_enabled=False)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which products with `x` keep its own dtype."""
    return nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


def guard_convolutions(model: nn.Module) -> None:
    """Have each trained convolution of `model` computed in float32 where it meets a tiny map under a CPU's autocast.

    Weight gradients of 16-bit convolutions in oneDNN (seen up to 3.13) depend there on memory that nothing has written,
    and so are NaN by chance. With AVX-512 it is so on maps narrower than the stride: a phase of the stride without a
    pixel gets no row in the transposed input (`jit_trans_iw_ic_t`). With AMX it has been seen on 2x2 maps under a
    stride of 2 as well, where rows of the kernel meet padding alone. From a side of kernel + stride - 1 on, one place
    of the kernel lies inside the map whatever the padding, so that neither is the case.

    Nothing changes on other devices, in float32, and where no gradients are taken.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.forward = partial(_guarded, module, module.forward)  # type: ignore[method-assign]


def _guarded(
    convolution: nn.Conv2d | nn.ConvTranspose2d, forward: Callable[..., Tensor], x: Tensor, *args: Any
) -> Tensor:
    """The convolution's own `forward`, in float32 if it has to be; the result is in autocast's dtype all the same."""
    trained = torch.is_grad_enabled() and convolution.weight.requires_grad
    dtype = autocast_dtype(x) if trained and x.device.type == "cpu" else None
    if dtype is None or not is_tiny(x, convolution):
        return forward(x, *args)
    with torch.autocast("cpu", enabled=False):
        return forward(x.float(), *args).to(dtype)


def is_tiny(x: Tensor, convolution: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    """Whether a side of the maps (B, C, H, W) is less than kernel + stride: one pixel more than `guard_convolutions`
    asks for."""
    sides = zip(x.shape[-2:], convolution.kernel_size, convolution.dilation, convolution.stride, strict=True)
    return any(side < dilation * (kernel - 1) + 1 + stride for side, kernel, dilation, stride in sides)
