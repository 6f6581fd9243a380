"""What memory/ takes from torch's private parts."""

import torch

from e3va_cli.memory.torch_private import (
    FakeTensorMode,
    TorchDispatchMode,
    clear_cublas_workspaces,
    is_mutable,
    overload_packet,
    storage_id,
    tree_leaves,
    tree_map_only,
)

aten = torch.ops.aten


def test_fake_cpu_tensors_have_autograd_and_autocast():
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", dtype=torch.bfloat16):
        weight = torch.empty(10**6, 10**6, requires_grad=True)  # 4 TB
        product = torch.empty(1, 10**6) @ weight
        product.sum().backward()
    assert product.dtype == torch.bfloat16 and weight.grad.shape == weight.shape


def test_a_dispatch_mode_sees_forward_and_backward():
    calls = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(overload_packet(func))
            return func(*args, **(kwargs or {}))

    x = torch.ones(2, requires_grad=True)
    with Log():
        x.exp().sum().backward()
    assert aten.exp in calls and aten.mul in calls


def test_views_share_the_storage_id():
    x = torch.zeros(4)
    assert storage_id(x[1:].untyped_storage()) == storage_id(x.untyped_storage())
    assert storage_id(x.clone().untyped_storage()) != storage_id(x.untyped_storage())


def test_operators_know_whether_they_write():
    assert is_mutable(aten.add_.Tensor) and not is_mutable(aten.add.Tensor)


def test_trees():
    assert tree_leaves({"a": [1, (2,)]}) == [1, 2]
    assert tree_map_only(int, lambda n: n + 1, [1, "a"]) == [2, "a"]


def test_cublas_workspaces_can_be_cleared():
    assert callable(torch._C._cuda_clearCublasWorkspaces) or not torch.cuda.is_available()
    if torch.cuda.is_available():
        clear_cublas_workspaces()
