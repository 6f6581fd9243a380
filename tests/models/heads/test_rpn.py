import pytest
import torch
from torch.nn.functional import binary_cross_entropy, smooth_l1_loss
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork

from e3va_cli.models.heads.rpn import RPNOptions, anchors_inside, build_rpn
from tests.models.heads import plain

SIZES = [(64, 96), (60, 80)]
IMAGES = ImageList(torch.zeros(2, 3, 64, 96), SIZES)
MAPS = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
STRIDES = (4, 8, 16, 32, 64)
SIDES = (8, 16, 32, 64, 128)
RATIOS = (0.5, 1.0, 2.0)


def rpn(**options):
    given = RPNOptions(
        anchor_sizes=SIDES,
        aspect_ratios=RATIOS,
        fg_iou=0.7,
        bg_iou=0.3,
        positive_fraction=0.5,
        pre_nms_train=50,
        pre_nms_test=50,
        post_nms_train=20,
        post_nms_test=20,
        nms_iou=0.7,
        **{"batch_size_per_image": 10**6, "inside_only": True, "exact_anchors": True, **options},
    )
    return build_rpn(given, channels=8)


def targets():
    first = torch.tensor([[10.0, 12.0, 27.0, 30.0], [95.0, 63.0, 96.0, 64.0], [33.0, 6.0, 70.0, 41.0]])
    return [{"boxes": first}, {"boxes": torch.zeros(0, 4)}]


def flat(values, width):
    """[(B, A * width, H, W)] of levels to (B, anchors, width)."""
    return torch.cat([v.unflatten(1, (-1, width)).permute(0, 3, 4, 1, 2).flatten(1, 3) for v in values], 1)


def test_losses_are_over_anchors_inside_the_images():
    """One object is in a corner without anchors inside; the sampler takes all anchors."""
    network, features = rpn(), {str(i): torch.randn(2, 8, *size) for i, size in enumerate(MAPS)}
    _, losses = network(IMAGES, features, targets())
    objectness, deltas = network.head(list(features.values()))
    scores, deltas = flat(objectness, 1)[..., 0].sigmoid(), flat(deltas, 4)
    anchors = plain.anchors(MAPS, STRIDES, [[side] for side in SIDES], RATIOS)
    class_losses, box_loss, matched = [], torch.zeros(()), set()
    for image, (target, (height, width)) in enumerate(zip(targets(), SIZES, strict=True)):
        usable = [a[0] >= 0 and a[1] >= 0 and a[2] < width and a[3] < height for a in anchors]
        overlaps = [[plain.iou(box, a) for a in anchors] for box in target["boxes"].tolist()]
        assigned = plain.assign(overlaps, usable, 0.7, 0.3, 0.3) if overlaps else [-1 if u else None for u in usable]
        for index, found in enumerate(assigned):
            if found is None:
                continue
            score = scores[image, index]
            class_losses.append(binary_cross_entropy(score, torch.tensor(float(found >= 0))))
            if found >= 0:
                matched.add(found)
                wanted = torch.tensor(plain.encode(target["boxes"][found].tolist(), anchors[index]))
                box_loss = box_loss + smooth_l1_loss(deltas[image, index], wanted, beta=1 / 9, reduction="sum")
    assert matched == {0, 2}
    assert losses["loss_objectness"].item() == pytest.approx(torch.stack(class_losses).mean().item(), rel=1e-4)
    assert losses["loss_rpn_box_reg"].item() == pytest.approx(box_loss.item() / len(class_losses), rel=1e-4)


def test_anchors_inside():
    anchors = torch.tensor([[0.0, 0.0, 9.0, 9.0], [-1.0, 0.0, 5.0, 5.0], [0.0, 0.0, 20.0, 5.0], [0.0, 0.0, 5.0, 10.0]])
    assert anchors_inside(anchors, (10, 20)).tolist() == [True, False, False, False]
    assert anchors_inside(anchors, (11, 21)).tolist() == [True, False, True, True]
    assert anchors_inside(anchors, (5, 5)).all()  # an image smaller than every anchor is trained all the same


def test_default_network_is_torchvisions():
    network = rpn(inside_only=False, exact_anchors=False, batch_size_per_image=64)
    assert type(network) is RegionProposalNetwork
