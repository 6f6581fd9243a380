"""Private parts of torch; `tests/memory/test_torch_private.py` fails if a version changes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import UntypedStorage
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = [
    "FakeTensorMode",
    "TorchDispatchMode",
    "clear_cublas_workspaces",
    "is_mutable",
    "overload_packet",
    "storage_id",
    "tree_leaves",
    "tree_map_only",
]


def storage_id(storage: UntypedStorage) -> int:
    """Return what identifies a storage while it is alive, however many tensors share it."""
    return storage._cdata


def overload_packet(func: OpOverload) -> Any:
    """Return the operator of an overload, such as `aten.add` of `aten.add.Tensor`."""
    return func._overloadpacket


def is_mutable(func: OpOverload) -> bool:
    """Return whether an operator writes into an argument."""
    return func._schema.is_mutable


def clear_cublas_workspaces() -> None:
    """Free the workspaces that cuBLAS allocated for matrix products."""
    torch._C._cuda_clearCublasWorkspaces()
