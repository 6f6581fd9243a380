import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from e3va_cli.models.heads.anchors import MaxIoUMatcher, build_anchors, match_anchors
from tests.models.heads import plain

STRIDES = (4, 8, 16, 32, 64)
SIDES = [[8 * stride * 2 ** (step / 3) for step in range(3)] for stride in STRIDES]
RATIOS = (0.5, 1.0, 2.0)
IMAGES = ImageList(torch.zeros(2, 3, 160, 224), [(160, 200), (150, 224)])
MAPS = [(40, 56), (20, 28), (10, 14), (5, 7), (3, 4)]


def maps(dtype=torch.float32):
    return [torch.zeros(2, 1, *size, dtype=dtype) for size in MAPS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_anchors_are_centered_on_multiples_of_the_stride(dtype):
    found = build_anchors(SIDES, RATIOS, STRIDES, exact=True)(IMAGES, maps(dtype))
    expected = torch.tensor(plain.anchors(MAPS, STRIDES, SIDES, RATIOS))
    assert len(found) == 2
    for of_image in found:
        assert of_image.dtype == torch.float32
        torch.testing.assert_close(of_image, expected, rtol=1e-6, atol=1e-4)


def test_rounded_anchors_equal_torchvision():
    theirs = AnchorGenerator(tuple(tuple(map(int, of_level)) for of_level in SIDES), (RATIOS,) * 5)
    ours = build_anchors(SIDES, RATIOS, STRIDES, exact=False)
    assert ours.num_anchors_per_location() == [9] * 5
    for found, expected in zip(ours(IMAGES, maps()), theirs(IMAGES, maps()), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("min_pos_iou", [0.0, 0.35])
def test_matching_equals_mmdetection(min_pos_iou):
    overlaps = (10 * torch.rand(4, 60)).round() / 10  # with ties, between objects and between anchors
    overlaps[2] = overlaps[2] * 0.25  # an object that no anchor comes near to
    overlaps[3] = 0
    matches = MaxIoUMatcher(0.65, 0.35, min_pos_iou)(overlaps.clone()).tolist()
    expected = plain.assign(overlaps.tolist(), [True] * 60, 0.65, 0.35, min_pos_iou)
    assert [None if one == -2 else one for one in matches] == expected
    assert (2 in expected) == (min_pos_iou == 0) and 3 not in expected


def test_object_gets_its_best_anchor():
    """It overlaps the first object more, but that has another one."""
    overlaps = torch.tensor([[0.9, 0.8, 0.0], [0.0, 0.6, 0.1]])
    assert MaxIoUMatcher(0.5, 0.4, 0.0)(overlaps).tolist() == [0, 1, -1]


def test_ignored_anchors_match_nothing():
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 6.0], [50.0, 50.0, 60.0, 60.0]])
    usable = torch.tensor([False, True, True])
    matcher = MaxIoUMatcher(0.7, 0.3, 0.3)
    assert match_anchors(anchors, box, usable, matcher).tolist() == [-2, 0, -1]
    assert match_anchors(anchors, box[:0], usable, matcher).tolist() == [-2, -1, -1]
