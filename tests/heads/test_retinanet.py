import copy

import pytest
import torch
from torch import nn
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.image_list import ImageList

from e3va_cli.heads import build_head

CHANNELS = [8, 16, 32, 64]
SIZE = (96, 128)
CLASSES = 3


@pytest.fixture
def options(config):
    return config("head=retinanet", "head.fpn_channels=16", "head.score_threshold=0.0099")["head"]


@pytest.fixture
def head(options):
    return build_head(**options, channels=CHANNELS, num_classes=CLASSES)


@pytest.fixture
def features(head):
    return [torch.randn(2, CHANNELS[s], SIZE[0] // 4 // 2**s, SIZE[1] // 4 // 2**s) for s in head.stages]


IMAGES = ImageList(torch.zeros(2, 3, *SIZE), [SIZE, (80, 100)])


def targets(empty=False):
    boxes = torch.tensor([[20.0, 10.0, 60.0, 50.0], [60.0, 30.0, 90.0, 70.0]])
    full = {"boxes": boxes, "labels": torch.tensor([1, 3])}
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    return [full, none if empty else copy.deepcopy(full)]


class Pyramid(nn.Module):
    out_channels = 16

    def __init__(self, head, features):
        super().__init__()
        self.neck, self.features = head.neck, features

    def forward(self, images):
        return self.neck(dict(zip("012", self.features, strict=True)))


class AsTheyAre(nn.Module):
    def forward(self, images, targets):
        return IMAGES, targets

    def postprocess(self, result, image_sizes, original_image_sizes):
        return result


@pytest.fixture
def torchvisions(head, features):
    """Torchvision's own RetinaNet with its default anchors and our weights; it counts classes from 0."""
    from torchvision.models.detection.retinanet import RetinaNetHead, _default_anchorgen

    anchors = _default_anchorgen()
    model = TorchvisionRetinaNet(
        Pyramid(head, features),
        CLASSES,
        anchor_generator=anchors,
        head=RetinaNetHead(16, anchors.num_anchors_per_location()[0], CLASSES),
        score_thresh=0.0099,
        detections_per_img=100,
    )
    model.head.load_state_dict(head.detector.head.state_dict())
    model.transform = AsTheyAre()
    return model


@pytest.mark.parametrize("empty", [False, True])
def test_losses_and_gradients_equal_torchvisions(head, features, torchvisions, empty):
    from_zero = [{**t, "labels": t["labels"] - 1} for t in targets(empty)]
    ours, theirs = head.losses(features, IMAGES, targets(empty)), torchvisions([torch.zeros(3, *SIZE)] * 2, from_zero)
    assert set(ours) == {"classification", "bbox_regression"}
    for name, value in ours.items():
        assert value.item() == theirs[name].item() and value > 0
    parameters = [[*head.neck.parameters(), *owner.head.parameters()] for owner in (head.detector, torchvisions)]
    for gradient, reference in zip(
        torch.autograd.grad(sum(ours.values()), parameters[0]),
        torch.autograd.grad(sum(theirs.values()), parameters[1]),
        strict=True,
    ):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)


def test_findings_equal_torchvisions(head, features, torchvisions):
    head.eval(), torchvisions.eval()
    with torch.no_grad():
        expected = torchvisions([torch.zeros(3, *SIZE)] * 2)
        for found, theirs in zip(head.predict(lambda _: features, IMAGES), expected, strict=True):
            assert len(found) > 0 and found.masks is None
            assert torch.equal(found.boxes, theirs["boxes"]) and torch.equal(found.scores, theirs["scores"])
            assert torch.equal(found.labels, theirs["labels"] + 1)


def test_the_pyramid_has_strides_8_to_128(head, features):
    levels = list(head.neck(dict(zip("012", features, strict=True))).values())
    assert [tuple(level.shape) for level in levels] == [
        (2, 16, 12, 16),
        (2, 16, 6, 8),
        (2, 16, 3, 4),
        (2, 16, 2, 2),
        (2, 16, 1, 1),
    ]


def test_16_bit_networks_decode_in_float32(head, features):
    head.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = head.predict(lambda _: features, IMAGES)
    assert all(one.boxes.dtype == one.scores.dtype == torch.float32 for one in found)
