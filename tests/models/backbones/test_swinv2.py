"""Swin V2 against timm's own network and blocks: windows, cosine attention, position bias, weights."""

import pytest
import timm
import torch
from torch import nn

from e3va_cli.models.backbones import chunked, window_attention
from e3va_cli.models.backbones.swinv2 import build_swinv2
from tests.components import build_backbone, tune

WINDOW_16, WINDOW_8 = "swinv2_tiny_window16_256", "swinv2_tiny_window8_256"
TINY = {"embed_dim": 32, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}


def tiny(name=WINDOW_8, **options):
    """A network whose norms are not the zeros that timm starts with."""
    backbone = build_swinv2(name, **(TINY | options)).eval()
    for parameter in backbone.parameters():
        if parameter[0].numel() > 1:
            nn.init.normal_(parameter.data, std=0.1)
        else:
            nn.init.uniform_(parameter.data, 0.2, 1.0)
    return backbone


def windows(backbone):
    return [layer.blocks[0].window_size[0] for layer in backbone.model.layers]


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        (WINDOW_16, {}, [16, 16, 16, 8]),
        ("swinv2_base_window12_192", {}, [12, 12, 12, 6]),
        (WINDOW_16, {"window_size": 8}, [8, 8, 8, 8]),
        (WINDOW_16, {"img_size": 512}, [16, 16, 16, 16]),
    ],
)
def test_windows_are_those_of_the_weights_and_shift_in_every_stage(name, options, expected):
    backbone = build_swinv2(name, **TINY, **options)
    assert windows(backbone) == expected
    for layer, window in zip(backbone.model.layers, expected, strict=True):
        assert [block.shift_size for block in layer.blocks] == [(0, 0), (window // 2, window // 2)]


@pytest.mark.parametrize(("pad_before_shift", "sizes"), [(True, [(256, 512)]), (False, [(256, 256), (96, 200)])])
def test_features_equal_timm(pad_before_shift, sizes):
    backbone = tiny(WINDOW_16, pad_before_shift=pad_before_shift)
    options = {"strict_img_size": False, "always_partition": True, "window_size": (16, 16, 16, 8)}
    network = timm.create_model(WINDOW_16, features_only=True, **options, **TINY).eval()
    network.load_state_dict({k.replace("layers.", "layers_"): v for k, v in backbone.model.state_dict().items()})
    for size in sizes:  # 96 / 4 and 200 / 4 are no multiples of a window
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = network(images)
            without_gradients = backbone(images)
        for features in (without_gradients, backbone(images)):
            for ours, theirs in zip(features, expected, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("elements", [2**21, 8 * 24 * 64, 1], ids=["whole", "bands", "smallest"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("size", [(16, 24), (8, 8), (20, 30), (5, 9)])
def test_chunked_branches_add_up_to_timms_block(monkeypatch, size, fused, elements):
    monkeypatch.setattr(window_attention, "FUSED_DEVICES", ("cpu",) if fused else ())
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", elements)
    backbone = tiny(pad_before_shift=False).double()
    x = torch.randn(3, *size, 32, dtype=torch.float64)
    branches = backbone.stages[0].branches
    with torch.no_grad():
        for attention, mlp in zip(branches[::2], branches[1::2], strict=True):
            between = x + attention(x)
            torch.testing.assert_close(between + mlp(between), attention.block(x), rtol=1e-9, atol=1e-9)


def test_scores_of_a_chunk_are_limited(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 16 * 32 * 64)
    backbone, tokens = tiny(WINDOW_16), []
    block = backbone.model.layers[0].blocks[1]
    block.attn.qkv.register_forward_hook(lambda _, inputs, __: tokens.append(inputs[0].shape[0] * inputs[0].shape[1]))
    with torch.no_grad():
        backbone.stages[0].branches[2](torch.randn(2, 64, 32, 32))
    assert sum(tokens) == 2 * 64 * 32 and max(tokens) * 16 * 16 <= 4 * chunked.CHUNK_ELEMENTS


def test_maps_are_padded_before_windows_shift():
    """As in Swin's detection code; timm shifts first, which moves padding into the image."""
    backbone = tiny()
    x = torch.randn(1, 13, 20, 32)
    padded = nn.functional.pad(x, (0, 0, 0, 4, 0, 3))
    for branch in (backbone.stages[0].branches[0], backbone.stages[0].branches[2]):
        for with_gradients in (False, True):
            with torch.set_grad_enabled(with_gradients):
                torch.testing.assert_close(branch(x), branch(padded)[:, :13, :20], atol=1e-6, rtol=1e-5)


def test_compiled_attention(monkeypatch):
    backbone, functions = tiny(), []

    def as_compiled(function):
        functions.append(function)
        return torch.compile(function, backend="aot_eager", dynamic=True, fullgraph=True)

    monkeypatch.setattr(chunked, "as_compiled", as_compiled)
    x = torch.randn(2, 16, 24, 32)
    with torch.no_grad():
        expected = [branch(x) for branch in backbone.stages[0].branches[2:]]
        assert not functions
        backbone.compiled = True
        for branch, reference in zip(backbone.stages[0].branches[2:], expected, strict=True):
            torch.testing.assert_close(branch(x), reference, rtol=1e-4, atol=1e-5)
    assert len(functions) == 2


def test_lora_changes_queries_and_values():
    backbone, images = tiny(), torch.randn(1, 3, 64, 96)
    extractor = tune(backbone, "lora", rank=2, alpha=2).eval()
    start = extractor(images)
    assert len(extractor.updates) == 8
    for update in extractor.updates:
        nn.init.normal_(update.B)
    with torch.no_grad():
        without_gradients = extractor(images)
    changed = extractor(images)
    for ours, chunks, before in zip(changed, without_gradients, start, strict=True):
        assert (ours - before).abs().max() > 1e-3
        torch.testing.assert_close(ours, chunks, atol=1e-5, rtol=1e-4)
    sum(feature.square().sum() for feature in changed).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in extractor.updates.parameters())


@pytest.mark.parametrize("layout", ["timm", "authors"])
def test_every_layout_gives_the_same_weights(tmp_path, layout):
    donor = tiny()
    state = donor.model.state_dict() | {"head.fc.weight": torch.zeros(5, 256), "norm.weight": torch.ones(256)}
    if layout == "authors":  # downsampling ends a stage, and buffers are in the file
        for stage in (0, 1, 2):
            for key in [key for key in state if key.startswith(f"layers.{stage + 1}.downsample.")]:
                state[key.replace(f"layers.{stage + 1}.", f"layers.{stage}.")] = state.pop(key)
        attn = donor.model.layers[0].blocks[0].attn
        for name in ("relative_coords_table", "relative_position_index"):
            state[f"layers.0.blocks.0.attn.{name}"] = getattr(attn, name)
        state = {"model": state}
    torch.save(state, tmp_path / "weights.pth")
    loaded, _ = build_backbone(
        name="tiny",
        family="swinv2",
        timm_name=WINDOW_8,
        model_args={key: list(value) if isinstance(value, tuple) else value for key, value in TINY.items()},
        weights=str(tmp_path / "weights.pth"),
    )
    torch.testing.assert_close(loaded.model.state_dict(), donor.model.state_dict(), rtol=0, atol=0)


def test_no_weight_decay_of_position_bias_and_scale():
    names = tiny().no_weight_decay()
    assert "model.layers.3.blocks.1.attn.logit_scale" in names
    assert "model.layers.0.blocks.0.attn.cpb_mlp.0.weight" in names
    assert all("cpb_mlp" in name or "logit_scale" in name for name in names)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "resnet18"])
def test_other_networks_are_refused(name):
    with pytest.raises(TypeError):
        build_swinv2(name)
