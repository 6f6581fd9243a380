"""Chunked attention and MLP against timm's blocks, in float64."""

import copy

import pytest
import torch

from e3va_cli.models.backbones import chunked, window_attention
from e3va_cli.models.backbones.swin import attention_branch, build_swin, mlp_forward

SIZES = [(14, 21), (7, 7), (20, 30), (5, 9), (32, 40)]  # of the map; windows are 7x7


def blocks_of(backbone):
    """One block of the first stage with unshifted windows, and one with shifted ones."""
    return copy.deepcopy(backbone.model.layers[0].blocks).double().eval()


@pytest.fixture(params=[2**21, 7 * 21 * 32, 1], ids=["whole", "bands", "smallest"])
def chunk_elements(request, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", request.param)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_chunked_results_equal_timm(nano, chunk_elements, monkeypatch, size, fused):
    monkeypatch.setattr(window_attention, "FUSED_DEVICES", ("cpu",) if fused else ())
    x = torch.randn(3, *size, 32, dtype=torch.float64)
    shifts = []
    with torch.no_grad():
        for block in blocks_of(nano):
            shifts.append(any(block.shift_size))
            found = attention_branch(block, nano.attn_mask(7, 7), False, False, x)
            torch.testing.assert_close(found, block._attn(block.norm1(x)), rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(
                chunked.chunked_tokens(mlp_forward, block, x), block.mlp(block.norm2(x)), rtol=1e-9, atol=1e-9
            )
    assert shifts == [False, True]


def test_rectangular_windows():
    sizes = {"embed_dim": 32, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "window_size": (8, 4)}
    backbone = build_swin("swin_tiny_patch4_window7_224", **sizes).eval().double()
    x = torch.randn(2, 20, 18, 32, dtype=torch.float64)
    with torch.no_grad():
        for block in backbone.model.layers[0].blocks:
            found = attention_branch(block, backbone.attn_mask(8, 4), False, False, x)
            torch.testing.assert_close(found, block._attn(block.norm1(x)), rtol=1e-9, atol=1e-9)


def test_chunk_sizes(nano, monkeypatch):
    """The qkv projection and the hidden layer get one chunk at a time."""
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 7 * 28 * 32)
    block, seen = nano.model.layers[0].blocks[1], []
    for linear in (block.attn.qkv, block.mlp.fc1):
        linear.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].numel()))
    nano.eval()
    x = torch.randn(2, 28, 28, 32)
    with torch.no_grad():
        for branch in nano.stages[0].branches[2:]:
            branch(x)
    assert sum(seen) == 2 * x.numel() and max(seen) <= 7 * 28 * 32


def test_gradients_use_timm_modules(nano):
    block = nano.model.layers[0].blocks[1].eval()
    x = torch.randn(1, 14, 14, 32, requires_grad=True)
    ran = []
    block.attn.register_forward_hook(lambda *_: ran.append(1))
    nano.stages[0].branches[2](x).sum().backward()
    assert ran == [1] and x.grad.abs().max() > 0


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_features(nano, monkeypatch, backend):
    functions = []

    def as_compiled(function):
        functions.append(function)
        return compiled.setdefault(function, torch.compile(function, backend=backend, dynamic=True, fullgraph=True))

    compiled = {}
    monkeypatch.setattr(chunked, "as_compiled", as_compiled)
    nano.eval()
    for size in ((64, 96), (50, 70)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            nano.compiled = False
            expected = nano(images)
            assert not functions
            nano.compiled = True
            found = nano(images)
        assert len(functions) == 16, "two branches of each block"
        functions.clear()
        for ours, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
    nano(images)
    assert not functions, "timm's modules with gradients"
