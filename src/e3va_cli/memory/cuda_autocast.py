"""Emulate CUDA's autocast on fake CPU tensors.

A fake CUDA tensor cannot run a backward pass without a GPU, a fake CPU tensor can. Both autocasts run matrix products
and convolutions in 16 bits, but CUDA's keeps norms, softmax, losses and interpolation in float32, which costs memory.
https://docs.pytorch.org/docs/stable/amp.html#cuda-ops-that-can-autocast-to-float32
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from e3va_cli.memory.torch_private import tree_map_only

FLOAT32 = frozenset(
    [
        "layer_norm",
        "group_norm",
        "softmax",
        "log_softmax",
        "interpolate",
        "exp",
        "log",
        "pow",
        "rsqrt",
        "reciprocal",
        "softplus",
        "cross_entropy",
        "nll_loss",
        "binary_cross_entropy_with_logits",
        "smooth_l1_loss",
        "l1_loss",
        "mse_loss",
        "huber_loss",
    ]
)


class CudaAutocast(TorchFunctionMode):
    """Cast the arguments of operators that CUDA's autocast runs in float32; enter it inside `torch.autocast("cpu")`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func`, in float32 if it is one of these operators."""
        if getattr(func, "__name__", "") in FLOAT32:
            args, kwargs = tree_map_only(Tensor, to_float32, (args, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def to_float32(tensor: Tensor) -> Tensor:
    """Return a 16-bit tensor in float32, any other unchanged."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
