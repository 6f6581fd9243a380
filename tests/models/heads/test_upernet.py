import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812 (torch's own alias)
from torchvision.models.detection.image_list import ImageList

from e3va_cli.config.run_config import to_dict
from e3va_cli.errors import UserError
from e3va_cli.models.heads.layers import num_groups
from e3va_cli.models.heads.sliding_window import sliding_scores, window_starts
from e3va_cli.models.heads.upernet import adaptive_avg_pool2d
from tests.components import build_head

CHANNELS = [8, 16, 24, 40]
STRIDES = (4, 8, 16, 32)
CLASSES = 5
SIZE = (64, 96)
OPTIONS = {
    "fpn_channels": 24,
    "pool_scales": [1, 2, 3, 6],
    "dropout": 0.1,
    "auxiliary_stage": 2,
    "auxiliary_channels": 16,
    "auxiliary_weight": 0.4,
    "slide_window": None,
    "slide_stride": 21,
}


def make_head(**changes):
    return build_head("upernet", channels=CHANNELS, num_classes=CLASSES, **OPTIONS | changes)


def make_features(size=SIZE, batch=2):
    return [torch.randn(batch, c, size[0] // s, size[1] // s) for c, s in zip(CHANNELS, STRIDES, strict=True)]


def make_images(size=SIZE):
    return ImageList(torch.randn(2, 3, *size), [size, (50, 83)])


def make_targets():
    return [{"semantic": torch.randint(0, CLASSES + 1, size, dtype=torch.int16)} for size in make_images().image_sizes]


class Extract(torch.nn.Module):
    """A backbone of one fixed random convolution per stride."""

    def __init__(self):
        super().__init__()
        pairs = zip(CHANNELS, STRIDES, strict=True)
        self.stages = torch.nn.ModuleList(torch.nn.Conv2d(3, c, s, stride=s) for c, s in pairs)
        self.requires_grad_(False)

    def forward(self, images):
        return [stage(images) for stage in self.stages]


def reference_scores(head, features):
    """The network of the paper in plain operators, with the head's weights."""
    weights = dict(head.named_parameters())

    def block(name, x):
        kernel = weights[f"{name}.0.weight"]
        x = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)
        groups = {24: 3}[kernel.shape[0]]
        return F.group_norm(x, groups, weights[f"{name}.1.weight"], weights[f"{name}.1.bias"]).relu()

    def to(x, like):
        return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)

    c1, c2, c3, c4 = features
    grids = [block(f"neck.pooling.project.{i}", F.adaptive_avg_pool2d(c4, s)) for i, s in enumerate((1, 2, 3, 6))]
    p4 = block("neck.pooling.fuse", torch.cat([c4] + [to(g, c4) for g in grids], 1))
    p3 = block("neck.laterals.2", c3) + to(p4, c3)
    p2 = block("neck.laterals.1", c2) + to(p3, c2)
    p1 = block("neck.laterals.0", c1) + to(p2, c1)
    levels = [block("neck.smooth.0", p1), block("neck.smooth.1", p2), block("neck.smooth.2", p3), p4]
    fused = block("neck.fuse", torch.cat([to(x, c1) for x in levels], 1))
    return F.conv2d(fused, weights["classifier.1.weight"], weights["classifier.1.bias"])


@pytest.mark.parametrize("size", [(64, 96), (32, 32), (96, 416)])
def test_scores_equal_the_paper(size):
    head = make_head().eval()
    features = make_features(size)
    scores = head.scores(features)
    assert scores.shape == (2, CLASSES, size[0] // 4, size[1] // 4)
    torch.testing.assert_close(scores, reference_scores(head, features), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "cells"), [((7, 11), 3), ((16, 16), 6), ((2, 5), 6), ((1, 1), 2), ((5, 4), 1)])
def test_adaptive_avg_pool2d_equals_pytorch(size, cells):
    ours = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    weight = torch.randn(2, 3, cells, cells, dtype=torch.float64)
    mine, expected = adaptive_avg_pool2d(ours, cells), F.adaptive_avg_pool2d(theirs, cells)
    (mine * weight).sum().backward(), (expected * weight).sum().backward()
    torch.testing.assert_close(mine, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_number_of_parameters(config):
    channels, k = [192, 384, 768, 1536], 150
    head = build_head(**to_dict(config("head=upernet").head), channels=channels, num_classes=k)
    width, aux = 512, 256
    kernels = sum(c * width for c in channels[:3]) + 3 * 9 * width * width  # laterals and their 3x3
    kernels += 4 * 1536 * width + 9 * (1536 + 4 * width) * width + 9 * 4 * width * width  # pooling, its fuse, fuse
    norms = 2 * width * (3 + 3 + 4 + 1 + 1)
    assert sum(p.numel() for p in head.neck.parameters()) == kernels + norms
    assert sum(p.numel() for p in head.classifier.parameters()) == (width + 1) * k
    auxiliary = 9 * 768 * aux + 2 * aux + (aux + 1) * k
    assert sum(p.numel() for p in head.auxiliary.parameters()) == auxiliary
    assert sum(p.numel() for p in head.parameters()) == kernels + norms + (width + 1) * k + auxiliary


def test_num_groups():
    assert {c: num_groups(c) for c in (512, 256, 64, 32, 24, 100, 7, 1)} == {
        512: 32, 256: 32, 64: 8, 32: 4, 24: 3, 100: 10, 7: 1, 1: 1
    }  # fmt: skip


def by_hand(scores, targets):
    """Mean negative log-probability over labeled pixels, in numpy, image by image without padding."""
    full = F.interpolate(scores, SIZE, mode="bilinear", align_corners=False).detach().double().numpy()
    log_p = full - np.log(np.exp(full).sum(1, keepdims=True))
    losses = []
    for of_image, target in zip(log_p, targets, strict=True):
        labels = target["semantic"].numpy()
        rows, columns = np.nonzero(labels)
        losses += (-of_image[labels[rows, columns] - 1, rows, columns]).tolist()
    return np.mean(losses)


@pytest.mark.parametrize("stage", [0, 2])
def test_losses_are_cross_entropies_over_labeled_pixels(stage):
    head, features, targets = make_head(auxiliary_stage=stage).eval(), make_features(), make_targets()
    losses = head.losses(features, make_images(), targets)
    assert set(losses) == {"segmentation", "auxiliary"}
    assert losses["segmentation"].item() == pytest.approx(by_hand(head.scores(features), targets), rel=1e-5)
    auxiliary = by_hand(head.auxiliary(features[stage]), targets)
    assert losses["auxiliary"].item() == pytest.approx(0.4 * auxiliary, rel=1e-5)


def test_no_auxiliary_classifier_at_weight_0():
    head = make_head(auxiliary_weight=0.0)
    assert not any(name.startswith("auxiliary") for name, _ in head.named_parameters())
    assert set(head.losses(make_features(), make_images(), make_targets())) == {"segmentation"}


def test_batch_without_labels_has_zero_loss_and_gradients():
    head, targets = make_head(), make_targets()
    for target in targets:
        target["semantic"].zero_()
    losses = head.losses(make_features(), make_images(), targets)
    sum(losses.values()).backward()
    assert [loss.item() for loss in losses.values()] == [0.0, 0.0]
    assert all(p.grad is not None and (p.grad == 0).all() for p in head.parameters()), (
        "DDP requires every parameter to be used"
    )


def test_training_on_one_image_of_32_pixels():
    head = make_head()
    images = ImageList(torch.zeros(1, 3, 32, 32), [(32, 32)])
    targets = [{"semantic": torch.randint(1, CLASSES + 1, (32, 32), dtype=torch.int16)}]
    sum(head.losses(make_features((32, 32), batch=1), images, targets).values()).backward()
    grid = head.neck.pooling.project[0][0].weight.grad
    assert torch.isfinite(grid).all() and grid.abs().max() > 1e-6, "gradients reach the 1x1 pooled map"


def test_losses_on_the_meta_device():
    with torch.device("meta"):
        head, features, images, targets = make_head(), make_features(), make_images(), make_targets()
        losses = head.losses(features, images, targets)
        sum(losses.values()).backward()
    assert all(loss.shape == () for loss in losses.values())
    assert all(p.grad.is_meta and p.grad.shape == p.shape for p in head.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_losses_and_scores_in_float32(dtype):
    head, features, targets = make_head().eval(), make_features(), make_targets()
    exact = head.losses(features, make_images(), targets)
    with torch.autocast("cpu", dtype=dtype):
        losses = head.losses(features, make_images(), targets)
        auxiliary = 0.4 * by_hand(head.auxiliary(features[2]).float(), targets)
        found = [*head.predict(lambda _: features, make_images())]
        head.slide_window, head.slide_stride = 64, 32
        found += head.predict(Extract(), make_images())
    for name, loss in losses.items():
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact[name].item(), rel=0.02)
    assert losses["auxiliary"].item() == pytest.approx(auxiliary, rel=1e-6), "16 bits end before the upsampling"
    assert all(of_image.scores.dtype == torch.float32 for of_image in found)


def test_predictions_have_image_sizes():
    head, extract, images = make_head().eval(), Extract(), make_images()
    whole = head.predict(extract, images)
    for one, size, scores in zip(whole, images.image_sizes, head.scores(extract(images.tensors)), strict=True):
        assert (one.padded_size, one.image_size) == (SIZE, size)
        assert torch.equal(one.scores, scores)
    assert [tuple(one.labels((33, 35)).shape) for one in whole] == [(33, 35)] * 2


@pytest.mark.parametrize("window", [96, 128])
def test_one_window_equals_the_whole_image(window):
    extract, images, head = Extract(), make_images(), make_head().eval()
    whole = head.predict(extract, images)
    head.slide_window = window
    for one, expected in zip(head.predict(extract, images), whole, strict=True):
        assert type(one) is type(expected) and one.scores.shape == (CLASSES, *SIZE)
        assert torch.equal(one.labels((70, 101)), expected.labels((70, 101)))


@pytest.mark.parametrize(("size", "stride"), [((64, 96), 21), ((32, 160), 64), ((128, 96), 50), ((96, 96), 64)])
def test_windows_are_averaged_where_they_overlap(size, stride):
    extract, head = Extract(), make_head(slide_window=64, slide_stride=stride).eval()
    images = make_images(size)
    height, width = (min(64, side) for side in size)
    corners = [
        [min(i * stride, side - part) for i in range(-(-(side - part) // stride) + 1)]
        for side, part in zip(size, (height, width), strict=True)
    ]
    above, count = np.zeros((2, CLASSES, *size)), np.zeros(size)
    for top in corners[0]:
        for left in corners[1]:
            rows, columns = slice(top, top + height), slice(left, left + width)
            scores = reference_scores(head, extract(images.tensors[:, :, rows, columns]))
            scores = F.interpolate(scores, (height, width), mode="bilinear", align_corners=False)
            above[:, :, rows, columns] += scores.detach().numpy()
            count[rows, columns] += 1
    assert count.min() >= 1 and len(corners[0]) * len(corners[1]) > 1
    for one, expected in zip(head.predict(extract, images), above / count, strict=True):
        np.testing.assert_allclose(one.scores.detach().numpy(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("side", "window", "stride", "starts"),
    [
        (512, 512, 341, [0]),
        (100, 512, 341, [0]),
        (683, 512, 341, [0, 171]),
        (853, 512, 341, [0, 341]),
        (2048, 512, 341, [0, 341, 682, 1023, 1364, 1536]),
    ],
)
def test_window_starts(side, window, stride, starts):
    assert window_starts(side, window, stride) == starts


def test_network_is_called_once_per_window():
    seen = []

    def score(part):
        seen.append(tuple(part.shape))
        return part.mean(1, keepdim=True)

    images = torch.rand(1, 3, 96, 160)
    scores = sliding_scores(score, images, window=64, stride=48)
    assert seen == [(1, 3, 64, 64)] * 6
    torch.testing.assert_close(scores, images.mean(1, keepdim=True))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"slide_window": 100}, "head.slide_window=100"),
        ({"slide_window": 64, "slide_stride": 65}, "head.slide_stride=65"),
        ({"slide_window": 64, "slide_stride": 0}, "head.slide_stride=0"),
        ({"auxiliary_stage": 4}, "head.auxiliary_stage=4"),
        ({"pool_scales": [1, 0]}, r"head.pool_scales=\[1, 0\]"),
    ],
)
def test_errors_of_options_out_of_range(changes, says):
    with pytest.raises(UserError, match=says):
        make_head(**changes)


def test_overfits_two_images(config):
    options = to_dict(config("head=upernet_nano").head)
    head, extract = build_head(**options, channels=CHANNELS, num_classes=3), Extract()
    generator = torch.Generator().manual_seed(1)
    labels = torch.ones(2, 64, 64, dtype=torch.int16)
    labels[0, 8:32, 16:56], labels[1, 24:60, 4:28] = 2, 3
    labels[:, :4] = 0
    pixels = torch.randn(4, 3, generator=generator)[labels.long()].permute(0, 3, 1, 2)
    images = ImageList(pixels + 0.1 * torch.randn(pixels.shape, generator=generator), [(64, 64)] * 2)
    targets = [{"semantic": one} for one in labels]
    before = copy.deepcopy(head).eval().predict(extract, images)
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3)
    for _ in range(40):
        losses = head.losses(extract(images.tensors), images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    after = head.eval().predict(extract, images)

    def accuracy(found):
        right = torch.stack([one.labels((64, 64)) for one in found]) == labels
        return right[labels > 0].double().mean().item()

    assert accuracy(before) < 0.8
    assert accuracy(after) > 0.97
