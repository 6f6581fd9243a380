import copy

import pytest
import torch
from torch import nn
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from e3va_cli.config.run_config import to_dict
from e3va_cli.models.heads import Detections
from tests.components import build_head

CHANNELS = [8, 16, 32, 64]
SIZE = (96, 128)


@pytest.fixture
def options(config):
    options = to_dict(config("head=mask_rcnn_nano").head)
    options["box"]["score_threshold"] = 0.0
    return options


@pytest.fixture
def head(options):
    return build_head(**options, channels=CHANNELS, num_classes=3)


@pytest.fixture
def features():
    return [torch.randn(2, c, SIZE[0] // s, SIZE[1] // s) for c, s in zip(CHANNELS, (4, 8, 16, 32), strict=True)]


@pytest.fixture
def images():
    return ImageList(torch.zeros(2, 3, *SIZE), [SIZE, (80, 100)])


def targets(empty=False):
    masks = torch.zeros(2, *SIZE, dtype=torch.uint8)
    masks[0, 10:50, 20:60] = 1
    masks[1, 30:70, 60:90] = 1
    boxes = torch.tensor([[20.0, 10.0, 60.0, 50.0], [60.0, 30.0, 90.0, 70.0]])
    full = {"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks}
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": masks[:0]}
    return [full, none if empty else copy.deepcopy(full)]


class PyramidBackbone(nn.Module):
    """A backbone that returns the head's pyramid of fixed features."""

    out_channels = 64

    def __init__(self, head, features):
        super().__init__()
        self.head, self.features = head, features

    def forward(self, images):
        return self.head.neck(dict(zip("0123", self.features, strict=True)))


class IdentityTransform(nn.Module):
    """Replaces torchvision's transform: images and targets are already transformed."""

    def __init__(self, images):
        super().__init__()
        self.images = images

    def forward(self, images, targets):
        return self.images, targets

    def postprocess(self, result, image_sizes, original_image_sizes):
        return result


def torchvisions(head, features, images, options):
    """Build torchvision's Mask R-CNN with the same options and weights."""
    rpn, box, mask = options["rpn"], options["box"], options["mask"]
    model = TorchvisionMaskRCNN(
        PyramidBackbone(head, features),
        num_classes=None,
        rpn_anchor_generator=AnchorGenerator(tuple((s,) for s in rpn["anchor_sizes"]), ((0.5, 1.0, 2.0),) * 5),
        rpn_pre_nms_top_n_train=rpn["pre_nms_train"],
        rpn_pre_nms_top_n_test=rpn["pre_nms_test"],
        rpn_post_nms_top_n_train=rpn["post_nms_train"],
        rpn_post_nms_top_n_test=rpn["post_nms_test"],
        rpn_batch_size_per_image=rpn["batch_size_per_image"],
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 7, box["sampling_ratio"]),
        box_head=TwoMLPHead(64 * 49, box["hidden"]),
        box_predictor=FastRCNNPredictor(box["hidden"], 4),
        box_batch_size_per_image=box["batch_size_per_image"],
        box_score_thresh=0.0,
        mask_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 14, mask["sampling_ratio"]),
        mask_head=MaskRCNNHeads(64, mask["channels"], 1),
        mask_predictor=MaskRCNNPredictor(64, 64, 4),
    )
    model.rpn.load_state_dict(head.rpn.state_dict())
    model.roi_heads.load_state_dict(head.roi_heads.state_dict())
    model.transform = IdentityTransform(images)
    return model


def test_losses_gradients_and_detections_equal_torchvision(head, features, images, options):
    model = torchvisions(head, features, images, options)
    head.train(), model.train()
    torch.manual_seed(5)
    ours = head.losses(features, images, targets())
    torch.manual_seed(5)
    theirs = model([torch.zeros(3, *SIZE)] * 2, targets())
    assert set(ours) == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}
    for name, value in ours.items():
        assert value.item() == theirs[name].item() and value > 0
    parameters = [
        [*head.neck.parameters(), *owner.rpn.parameters(), *owner.roi_heads.parameters()] for owner in (head, model)
    ]
    for gradient, reference in zip(
        torch.autograd.grad(sum(ours.values()), parameters[0]),
        torch.autograd.grad(sum(theirs.values()), parameters[1]),
        strict=True,
    ):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)
    head.eval(), model.eval()
    with torch.no_grad():
        for found, expected in zip(
            head.predict(lambda _: features, images), model([torch.zeros(3, *SIZE)] * 2), strict=True
        ):
            assert len(found) > 0
            for key in ("boxes", "scores", "labels", "masks"):
                assert torch.equal(getattr(found, key), expected[key]), key


def test_sizes_equal_torchvision_defaults(config):
    """The full head has the same parameters as torchvision's maskrcnn on the same pyramid."""
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=81)
    ours = build_head(**to_dict(config("head=mask_rcnn").head), channels=[256, 512, 1024, 2048], num_classes=80)
    assert isinstance(ours.neck.extra_blocks, LastLevelMaxPool)
    for part in ("rpn", "roi_heads"):
        expected = {k: v.shape for k, v in getattr(theirs, part).state_dict().items()}
        assert {k: v.shape for k, v in getattr(ours, part).state_dict().items()} == expected
    for name in (
        "fg_bg_sampler.batch_size_per_image",
        "proposal_matcher.high_threshold",
        "nms_thresh",
        "score_thresh",
        "detections_per_img",
        "box_coder.weights",
    ):
        value, expected = ours.roi_heads, theirs.roi_heads
        for step in name.split("."):
            value, expected = getattr(value, step), getattr(expected, step)
        assert tuple(value) == tuple(expected) if isinstance(value, list | tuple) else value == expected, name
    assert ours.rpn._pre_nms_top_n == theirs.rpn._pre_nms_top_n
    assert ours.rpn.fg_bg_sampler.batch_size_per_image == theirs.rpn.fg_bg_sampler.batch_size_per_image


def test_training_on_images_without_objects(head, features, images):
    head.train()
    losses = head.losses(features, images, targets(empty=True))
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values())
    assert all(p.grad is not None for p in head.parameters()), "DDP requires every parameter to be used"


def test_detections_are_inside_their_image(head, features, images):
    head.eval()
    with torch.no_grad():
        found = head.predict(lambda _: features, images)
    assert len(found) == 2 and all(len(f) for f in found)
    for detections, (height, width) in zip(found, images.image_sizes, strict=True):
        assert detections.image_size == (height, width)
        assert (detections.boxes[:, 2] <= width).all() and (detections.boxes[:, 3] <= height).all()
        assert detections.masks.shape == (len(detections), 1, 28, 28)
        assert ((detections.labels >= 1) & (detections.labels <= 3)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_box_arithmetic_in_float32(head, features, images, dtype):
    head.train()
    with torch.autocast("cpu", dtype=dtype):
        losses = head.losses(features, images, targets())
        head.eval()
        found = head.predict(lambda _: features, images)
    assert all(torch.isfinite(v) for v in losses.values())
    assert all(f.boxes.dtype == torch.float32 for f in found)


def test_rescaled_and_paste_masks():
    boxes = torch.tensor([[10.0, 20.0, 30.0, 40.0]])
    masks = torch.rand(1, 1, 28, 28)
    found = Detections(boxes, torch.ones(1), torch.ones(1, dtype=torch.int64), masks, (50, 100))
    larger = found.rescaled((100, 300))
    assert larger.boxes.tolist() == [[30.0, 40.0, 90.0, 80.0]]
    (mask,) = larger.paste_masks()
    assert torch.equal(mask, paste_masks_in_image(masks, larger.boxes, (100, 300))[0, 0] > 0.5)
