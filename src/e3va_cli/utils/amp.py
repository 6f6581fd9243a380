"""Autocast: its state, contexts, and a workaround for convolutions on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype of autocast on the device of `x`; None if disabled or unavailable."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def mixed_precision(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return the autocast context of `trainer.precision` on `device`; CPUs use bfloat16 only."""
    if precision == "32":
        return nullcontext()
    half = torch.float16 if precision == "16-mixed" and device.type != "cpu" else torch.bfloat16
    return torch.autocast(device.type, dtype=half, cache_enabled=False)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context with autocast disabled on the device of `x`."""
    return nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


def guard_convolutions(model: nn.Module) -> None:
    """Compute each trained convolution of `model` in float32 on tiny maps under CPU autocast.

    Weight gradients of oneDNN's 16-bit convolutions (up to 3.13) read uninitialized memory there, and may be NaN: with
    AVX-512 on maps narrower than the stride, where a phase of the stride without a pixel gets no row in the transposed
    input (`jit_trans_iw_ic_t`); with AMX also on 2x2 maps at stride 2, where kernel rows cover only padding. With sides
    of kernel + stride - 1 or more, some position of the kernel is inside the map at any padding, and neither occurs.

    No effect on other devices, in float32, and without gradients.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.forward = partial(_guarded, module, module.forward)  # type: ignore[method-assign]


def _guarded(
    convolution: nn.Conv2d | nn.ConvTranspose2d, forward: Callable[..., Tensor], x: Tensor, *args: Any
) -> Tensor:
    """Call `forward`, in float32 on tiny maps; the output has autocast's dtype in any case."""
    trained = torch.is_grad_enabled() and convolution.weight.requires_grad
    dtype = autocast_dtype(x) if trained and x.device.type == "cpu" else None
    if dtype is None or not is_tiny(x, convolution):
        return forward(x, *args)
    with torch.autocast("cpu", enabled=False):
        return forward(x.float(), *args).to(dtype)


def is_tiny(x: Tensor, convolution: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    """Return whether a side of the maps (B, C, H, W) is less than kernel + stride, one pixel above the bound of
    `guard_convolutions`."""
    sides = zip(x.shape[-2:], convolution.kernel_size, convolution.dilation, convolution.stride, strict=True)
    return any(side < dilation * (kernel - 1) + 1 + stride for side, kernel, dilation, stride in sides)
