import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign

from e3va_cli.models.heads.roi_align import PyramidRoIAlign
from e3va_cli.models.necks.fpn import LEVEL_NAMES, STRIDES
from tests.models.heads import plain

SIZE = (256, 320)
BOXES = [
    torch.tensor([[3.0, 5.0, 40.0, 31.0], [10.5, 0.0, 150.25, 130.0], [0.0, 0.0, 320.0, 256.0]]),
    torch.tensor([[300.0, 200.0, 320.0, 256.0], [17.0, 20.0, 18.5, 22.0]]),
]


@pytest.fixture
def pyramid():
    return {name: torch.randn(2, 3, SIZE[0] // s, SIZE[1] // s) for name, s in zip(LEVEL_NAMES, STRIDES, strict=True)}


def test_aligned_with_adaptive_sampling(pyramid):
    pooled = PyramidRoIAlign(7, 0, aligned=True)(pyramid, BOXES, [SIZE, SIZE])
    levels = set()
    for index, (image, box) in enumerate((image, box) for image, boxes in enumerate(BOXES) for box in boxes):
        level = plain.level_of(box)
        levels.add(level)
        expected = plain.roi_align(pyramid[LEVEL_NAMES[level]][image], box, 7, STRIDES[level])
        torch.testing.assert_close(pooled[index], expected, rtol=1e-4, atol=1e-5)
    assert levels == {0, 1, 2}


def test_not_aligned_equals_torchvision(pyramid):
    ours = PyramidRoIAlign(7, 2, aligned=False)(pyramid, BOXES, [SIZE, SIZE])
    assert torch.equal(ours, MultiScaleRoIAlign(LEVEL_NAMES, 7, 2)(pyramid, BOXES, [SIZE, SIZE]))


def test_aligned_pooling_of_a_linear_ramp():
    """The first cell's center is half a stride from the corner, so pooling a ramp returns the centers of the cells."""
    ramps = {name: (torch.arange(80 * 4 // s) + 0.5) * s for name, s in zip(LEVEL_NAMES, STRIDES, strict=True)}
    pyramid = {name: ramp.expand(1, 1, len(ramp), len(ramp)) for name, ramp in ramps.items()}
    box = torch.tensor([[40.0, 40.0, 110.0, 110.0]])
    middles = 40 + 10 * (torch.arange(7) + 0.5)
    aligned, shifted = (PyramidRoIAlign(7, 0, aligned=a)(pyramid, [box], [(320, 320)])[0, 0] for a in (True, False))
    torch.testing.assert_close(aligned, middles.expand(7, 7))
    torch.testing.assert_close(shifted, middles.expand(7, 7) + 2)  # half of stride 4


def test_images_without_rois(pyramid):
    empty = [torch.zeros(0, 4), torch.zeros(0, 4)]
    assert PyramidRoIAlign(7, 0, aligned=True)(pyramid, empty, [SIZE, SIZE]).shape == (0, 3, 7, 7)
