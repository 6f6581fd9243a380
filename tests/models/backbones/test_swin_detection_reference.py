"""Features against a plain implementation of the Swin authors' detection backbone."""

import pytest
import torch

from e3va_cli.models.backbones.swin import build_swin
from tests.components import tune
from tests.swin_reference import large_biases, stage_outputs

TINY = {"embed_dim": 32, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}


@pytest.mark.parametrize("size", [(200, 328), (224, 224), (64, 100)])
@pytest.mark.parametrize("gradients", [False, True])
def test_features_equal_swin_detection_code(size, gradients):
    backbone = build_swin("swin_tiny_patch4_window7_224", **TINY).eval()
    large_biases(backbone.model)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = stage_outputs(backbone.model, images)
    with torch.set_grad_enabled(gradients):
        found = backbone(images)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.slow
@pytest.mark.parametrize("size", [(800, 1344), (608, 1024)])
@pytest.mark.parametrize("method", ["full", "e3va"])
def test_features_equal_swin_detection_code_at_detection_sizes(size, method):
    backbone = build_swin("swin_tiny_patch4_window7_224").eval()
    large_biases(backbone.model)
    extractor = tune(backbone, method, **({"rank": 16, "hidden_ratio": 0.5} if method == "e3va" else {})).eval()
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        expected = stage_outputs(backbone.model, images)
        for index, (ours, theirs) in enumerate(zip(extractor(images), expected, strict=True)):
            theirs = extractor.output(index, theirs)
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_padding_after_shifting_mixes_opposite_borders():
    """In timm's order, at a height of 50 tokens, the first row changes the last ones."""
    reached = {}
    for pad_before_shift in (True, False):
        backbone = build_swin("swin_tiny_patch4_window7_224", pad_before_shift=pad_before_shift, **TINY).eval()
        stream = torch.randn(1, 50, 21, 32)
        changed = stream.clone()
        changed[:, 0] = torch.randn(21, 32)
        branch = backbone.stages[0].branches[2]  # attention in shifted windows
        with torch.no_grad():
            moved = (branch(stream) - branch(changed)).abs().amax((0, 2, 3)) > 1e-6
        reached[pad_before_shift] = [row for row in range(7, 50) if moved[row]]
    assert reached == {True: [], False: [45, 46, 47, 48, 49]}
