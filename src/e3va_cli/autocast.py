"""What autocast does at a place of the program."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast computes products with `x` in here; None where it is off or the device has none."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which products with `x` keep its own dtype."""
    return nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


class SmallMapGuard:
    """Run 16-bit convolutions of tiny maps in float32 where a CPU trains them.

    The weight gradient that oneDNN computes of a 16-bit convolution reads memory that nothing has written, where the
    map is about as small as the kernel: seen with 3x3 kernels of stride 2 on maps of 1x1 with AVX-512 (torch 2.15), and
    of 2x2 with AMX. It is random, and NaN where that memory holds one. Maps no larger than the kernel are guarded; in
    float32 they cost next to nothing. Other devices, inference and larger maps are left alone.
    """

    def __init__(self) -> None:
        self._entered: list[tuple[torch.dtype, torch.autocast] | None] = []  # of the convolutions that are running

    def watch(self, model: nn.Module) -> None:
        """Guard all convolutions of `model`, also where a part of it is called or recomputed by itself."""
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(self._before)
                module.register_forward_hook(self._after, always_call=True)

    def _before(self, conv: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor] | None:
        if torch.compiler.is_compiling():  # also by exporters, which do not train
            return None
        assert isinstance(conv, nn.Conv2d)
        (x,) = inputs
        dtype = autocast_dtype(x) or x.dtype
        height, width = x.shape[-2:]
        tiny = height <= conv.kernel_size[0] or width <= conv.kernel_size[1]
        trains = torch.is_grad_enabled() and conv.weight.dtype == torch.float32
        if not (tiny and trains and x.device.type == "cpu" and dtype in HALF):
            self._entered.append(None)
            return None
        float32 = torch.autocast("cpu", enabled=False)
        float32.__enter__()
        self._entered.append((dtype, float32))
        return (x.float(),)

    def _after(self, conv: nn.Module, inputs: tuple[Any, ...], output: Tensor | None) -> Tensor | None:
        entered = None if torch.compiler.is_compiling() else self._entered.pop()
        if entered is None:
            return None
        dtype, float32 = entered
        float32.__exit__(None, None, None)
        return None if output is None else output.to(dtype)
