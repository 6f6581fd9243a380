"""Memory that CUDA libraries allocate for themselves during a step, in bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from e3va_cli.utils.environment import MIB

# PyTorch allocates a cuBLAS workspace for each thread that multiplies, one in the forward and one in the backward pass:
# 32 MiB since Hopper and with deterministic algorithms, else 8 MiB (`parseChosenWorkspaceSize`, CublasHandlePool.cpp).
CUBLAS_WORKSPACES = 2 * 32 * MIB

CONVOLUTION = torch.ops.aten.convolution.default
CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default


def cudnn_workspace(operator: Any, args: tuple[Any, ...], result: Any) -> int:
    """Return the workspace of a convolution in cuDNN: copies of input, weight and output in the channels-last format.

    The kernels for tensor cores read and write channels last; cuDNN copies tensors in other formats. Convolutions with
    1x1 kernels are matrix products, and depthwise ones are PyTorch's own, both without a workspace. On an H100, UPerNet
    with Swin-T (512x672, batch 2, float32) needs 494 MiB more in full fine-tuning and 471 MiB more with E3VA than all
    tensors and the workspaces of cuBLAS; the copies of the convolution of its peak are 456 MiB (2026-11-27).
    """
    if operator is CONVOLUTION:
        x, weight, output, groups = args[0], args[1], result, args[8]
    elif operator is CONVOLUTION_BACKWARD:
        output, x, weight, groups = *args[:3], args[9]
    else:
        return 0
    if groups > 1 or weight.shape[2:].numel() == 1:
        return 0
    copied = [tensor for tensor in (x, weight) if not _is_channels_last(tensor)]
    if len(copied) == 2:  # else the output has the format of either, on a GPU if not on the meta device
        copied.append(output)
    return sum(tensor.nbytes for tensor in copied)


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
