import copy

import pytest
import timm
import torch
from timm.layers import DropPath

from e3va_cli.models.backbones.swin import build_swin
from e3va_cli.models.backbones.weights import fingerprint

TINY = {"embed_dim": 32, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}


def reference(**options):
    return timm.create_model(
        "swin_tiny_patch4_window7_224", features_only=True, strict_img_size=False, always_partition=True, **options
    ).eval()


@pytest.mark.parametrize(("pad_before_shift", "sizes"), [(True, [(224, 224)]), (False, [(224, 224), (96, 200)])])
def test_features_equal_timm(pad_before_shift, sizes):
    backbone = build_swin("swin_tiny_patch4_window7_224", pad_before_shift=pad_before_shift, **TINY).eval()
    timms = reference(**TINY)
    timms.load_state_dict({k.replace("layers.", "layers_"): v for k, v in backbone.model.state_dict().items()})
    for size in sizes:  # 200 is not divisible by 32, and 96 / 4 is no multiple of a window
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            for ours, theirs in zip(backbone(images), timms(images), strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_last_stage_shifts_windows():
    backbone = build_swin("swin_tiny_patch4_window7_224", **TINY).eval()
    assert [block.shift_size for block in backbone.model.layers[3].blocks] == [(0, 0), (3, 3)]
    # A change at one border of the last stage's map reaches across a window's edge only if windows shift.
    stream = torch.randn(1, 14, 14, 256)
    changed = stream.clone()
    changed[:, 6, 6] += 1
    stage = backbone.stages[3]
    with torch.no_grad():
        moved = (stage.branches[2](stream) - stage.branches[2](changed)).abs().sum(-1)[0]
    assert moved[8, 8] > 0


def test_widths_strides_and_branches():
    stages = build_swin("swin_tiny_patch4_window7_224", **TINY).stages
    assert [stage.width for stage in stages] == [32, 64, 128, 256]
    assert [stage.stride for stage in stages] == [4, 8, 16, 32]
    assert [[branch.type for branch in stage.branches] for stage in stages] == [["attention", "mlp"] * 2] * 4


def test_image_sizes_not_divisible_by_the_patch_size():
    backbone = build_swin("swin_tiny_patch4_window7_224", **TINY).eval()
    with torch.no_grad():
        shapes = [tuple(x.shape[1:3]) for x in backbone(torch.randn(1, 3, 61, 130))]
    assert shapes == [(16, 33), (8, 17), (4, 9), (2, 5)]


def test_drop_path_of_branches():
    backbone = build_swin("swin_tiny_patch4_window7_224", **TINY)
    rates = [
        branch.drop_path.drop_prob if isinstance(branch.drop_path, DropPath) else 0.0
        for stage in backbone.stages
        for branch in stage.branches
    ]
    assert rates[0] == 0.0 and rates[-1] > 0.09 and rates == sorted(rates)


def test_features_with_bfloat16_weights():
    exact = build_swin("swin_tiny_patch4_window7_224", **TINY).eval().requires_grad_(False)
    rounded = copy.deepcopy(exact)
    rounded.cast_weights(torch.bfloat16)
    held = {p.dtype: p.numel() for p in rounded.parameters()}
    assert sum(p.numel() for p in rounded.parameters() if p.dtype == torch.bfloat16) > 0.6 * sum(
        p.numel() for p in rounded.parameters()
    ), held
    images = torch.randn(2, 3, 96, 128)
    for ours, reference in zip(rounded(images), exact(images), strict=True):
        assert ours.dtype == torch.float32, "the stream keeps its precision"
        assert 0 < (ours - reference).norm() < 0.01 * reference.norm()


def test_fingerprint_changes_with_any_weight():
    backbone = build_swin("swin_tiny_patch4_window7_224", **TINY)
    before = fingerprint(backbone.model)
    assert fingerprint(backbone.model) == before
    with torch.no_grad():
        next(reversed(list(backbone.model.parameters()))).view(-1)[-1] += 1e-3
    assert fingerprint(backbone.model) != before
