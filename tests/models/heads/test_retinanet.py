import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.image_list import ImageList

from e3va_cli.config.run_config import to_dict, with_older_options
from tests.components import build_head
from tests.models.heads import plain

CHANNELS = [8, 16, 32, 64]
SIZE = (96, 128)
CLASSES = 3


@pytest.fixture
def options(config):
    return to_dict(config("head=retinanet", "head.fpn_channels=16", "head.score_threshold=0.0099").head)


@pytest.fixture
def head(options):
    return build_head(**options, channels=CHANNELS, num_classes=CLASSES)


@pytest.fixture
def features(head):
    return [torch.randn(2, CHANNELS[s], SIZE[0] // 4 // 2**s, SIZE[1] // 4 // 2**s) for s in head.out_indices]


IMAGES = ImageList(torch.zeros(2, 3, *SIZE), [SIZE, (80, 100)])


def targets(empty=False):
    boxes = torch.tensor([[20.0, 10.0, 60.0, 50.0], [60.0, 30.0, 90.0, 70.0]])
    full = {"boxes": boxes, "labels": torch.tensor([1, 3])}
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    return [full, none if empty else copy.deepcopy(full)]


def test_losses_are_normalized_over_the_batch(head):
    """mmdetection's formula, anchor by anchor; the second image is smaller than the first, and has fewer objects."""
    size, small = (64, 128), (60, 60)
    images = ImageList(torch.zeros(2, 3, *size), [size, small])
    boxes = [torch.tensor([[20.0, 10.0, 60.0, 50.0], [61.0, 31.0, 90.0, 58.0]]), torch.tensor([[3.0, 7.0, 44.0, 52.0]])]
    truth = [{"boxes": boxes[0], "labels": torch.tensor([1, 3])}, {"boxes": boxes[1], "labels": torch.tensor([2])}]
    features = [torch.randn(2, CHANNELS[s], size[0] // 4 // 2**s, size[1] // 4 // 2**s) for s in head.out_indices]
    losses = head.losses(features, images, truth)

    maps = list(head.neck(dict(zip("012", features, strict=True))).values())
    outputs = head.detector.head(maps)
    strides = (8, 16, 32, 64, 128)
    sides = [[4 * stride * 2 ** (step / 3) for step in range(3)] for stride in strides]
    anchors = plain.anchors([m.shape[-2:] for m in maps], strides, sides, (0.5, 1.0, 2.0))
    class_loss, box_loss, counts = torch.zeros(()), torch.zeros(()), []
    for image, (target, padded_width) in enumerate(zip(truth, (128, 64), strict=True)):
        usable = [(a[0] + a[2]) / 2 < padded_width - 1e-3 for a in anchors]
        overlaps = [[plain.iou(box, a) for a in anchors] for box in target["boxes"].tolist()]
        assigned = plain.assign(overlaps, usable, 0.5, 0.4, 0.0)
        counts.append(sum(found is not None and found >= 0 for found in assigned))
        for index, found in enumerate(assigned):
            if found is None:
                continue
            label = int(target["labels"][found]) - 1 if found >= 0 else None
            class_loss = class_loss + plain.focal_loss(outputs["cls_logits"][image, index], label)
            if found >= 0:
                wanted = torch.tensor(plain.encode(target["boxes"][found].tolist(), anchors[index]))
                box_loss = box_loss + (outputs["bbox_regression"][image, index] - wanted).abs().sum()
    assert counts == [49, 34]  # torchvision would weight the second image's anchors half as much again
    expected = {"classification": class_loss / sum(counts), "bbox_regression": box_loss / sum(counts)}
    parameters = list(head.parameters())
    assert set(losses) == set(expected)
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-4)
    for gradient, reference in zip(
        torch.autograd.grad(sum(losses.values()), parameters),
        torch.autograd.grad(sum(expected.values()), parameters),
        strict=True,
    ):
        torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-6)


def test_batch_without_objects(head, features):
    none = [targets(empty=True)[1]] * 2
    losses = head.losses(features, IMAGES, none)
    logits = head.detector.head(list(head.neck(dict(zip("012", features, strict=True))).values()))["cls_logits"]
    p = logits.sigmoid()
    background = (-0.75 * p**2 * (1 - p).log()).sum()  # both images cover the padded size; at least 1 anchor each
    assert losses["classification"].item() == pytest.approx(background.item() / 2, rel=1e-4)
    assert losses["bbox_regression"].item() == 0


def test_p6_from_c5(head, features):
    levels = head.neck(dict(zip("012", features, strict=True)))
    weights = head.neck.extra_blocks
    p6 = conv2d(features[-1], weights.p6.weight, weights.p6.bias, stride=2, padding=1)
    assert torch.equal(levels["p6"], p6) and (p6 < 0).any()
    assert torch.equal(levels["p7"], conv2d(p6, weights.p7.weight, weights.p7.bias, stride=2, padding=1))


def test_p6_from_c5_with_equal_channels(options):
    head = build_head(**{**options, "fpn_channels": 64}, channels=CHANNELS, num_classes=CLASSES)
    features = [torch.randn(1, c, 4 * s, 4 * s) for c, s in zip(CHANNELS[1:], (4, 2, 1), strict=True)]
    levels = head.neck(dict(zip("012", features, strict=True)))
    torch.testing.assert_close(levels["p6"], head.neck.extra_blocks.p6(features[-1]))


class PyramidBackbone(nn.Module):
    out_channels = 16

    def __init__(self, head, features):
        super().__init__()
        self.neck, self.features = head.neck, features

    def forward(self, images):
        return self.neck(dict(zip("012", self.features, strict=True)))


class IdentityTransform(nn.Module):
    def forward(self, images, targets):
        return IMAGES, targets

    def postprocess(self, result, image_sizes, original_image_sizes):
        return result


@pytest.fixture
def legacy(options):
    """The head of a run by a version without `p6_from` and `exact_anchors`."""
    old = {name: value for name, value in options.items() if name not in ("p6_from", "exact_anchors")}
    return build_head(**with_older_options({"head": old})["head"], channels=CHANNELS, num_classes=CLASSES)


@pytest.fixture
def torchvisions(legacy, features):
    """Torchvision's RetinaNet with its default anchors and the head's weights; classes start at 0."""
    from torchvision.models.detection.retinanet import RetinaNetHead, _default_anchorgen

    anchors = _default_anchorgen()
    model = TorchvisionRetinaNet(
        PyramidBackbone(legacy, features),
        CLASSES,
        anchor_generator=anchors,
        head=RetinaNetHead(16, anchors.num_anchors_per_location()[0], CLASSES),
        score_thresh=0.0099,
        detections_per_img=100,
    )
    model.head.load_state_dict(legacy.detector.head.state_dict())
    model.transform = IdentityTransform()
    return model


def test_detections_with_older_options_equal_torchvision(legacy, features, torchvisions):
    legacy.eval(), torchvisions.eval()
    with torch.no_grad():
        expected = torchvisions([torch.zeros(3, *SIZE)] * 2)
        for found, theirs in zip(legacy.predict(lambda _: features, IMAGES), expected, strict=True):
            assert len(found) > 0 and found.masks is None
            assert torch.equal(found.boxes, theirs["boxes"]) and torch.equal(found.scores, theirs["scores"])
            assert torch.equal(found.labels, theirs["labels"] + 1)


def test_losses_with_equal_numbers_of_positives_equal_torchvision(legacy, features, torchvisions):
    from_zero = [{**t, "labels": t["labels"] - 1} for t in targets()]
    ours, theirs = legacy.losses(features, IMAGES, targets()), torchvisions([torch.zeros(3, *SIZE)] * 2, from_zero)
    for name, value in ours.items():
        assert value.item() == pytest.approx(theirs[name].item(), rel=1e-5) and value > 0


def test_pyramid_strides(head, features):
    levels = list(head.neck(dict(zip("012", features, strict=True))).values())
    assert [tuple(level.shape) for level in levels] == [
        (2, 16, 12, 16),
        (2, 16, 6, 8),
        (2, 16, 3, 4),
        (2, 16, 2, 2),
        (2, 16, 1, 1),
    ]


def test_autocast_decodes_in_float32(head, features):
    head.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = head.predict(lambda _: features, IMAGES)
    assert all(one.boxes.dtype == one.scores.dtype == torch.float32 for one in found)
