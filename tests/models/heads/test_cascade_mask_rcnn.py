import copy

import pytest
import torch
from torch.nn.functional import binary_cross_entropy, cross_entropy
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import box_iou

from e3va_cli.config.run_config import to_dict, with_older_options
from e3va_cli.models.heads.cascade_mask_rcnn import BoxStage, CascadeBoxOptions
from e3va_cli.models.heads.roi_sampling import SampledRoIs, match, sample_rois
from e3va_cli.models.heads.torchvision_private import BalancedPositiveNegativeSampler, Matcher
from tests.components import build_head
from tests.models.heads import plain

CHANNELS = [8, 16, 32, 64]
SIZE = (96, 128)
SIZES = [SIZE, (80, 100)]
IMAGES = ImageList(torch.zeros(2, 3, *SIZE), SIZES)
SMALL = [
    "head=cascade_mask_rcnn",
    "head.fpn_channels=32",
    "head.rpn.anchor_sizes=[12,24,48,96,192]",
    "head.rpn.pre_nms_train=100",
    "head.rpn.post_nms_train=50",
    "head.rpn.post_nms_test=50",
    "head.box.conv_channels=[32]",
    "head.box.hidden=32",
    "head.box.batch_size_per_image=32",
    "head.box.score_threshold=0.0",
    "head.mask.channels=[16]",
    "head.mask.predictor_channels=16",
]


@pytest.fixture
def build(config):
    def head(*overrides, classes=3):
        return build_head(**to_dict(config(*SMALL, *overrides).head), channels=CHANNELS, num_classes=classes)

    return head


def features():
    return [torch.randn(2, c, SIZE[0] // s, SIZE[1] // s) for c, s in zip(CHANNELS, (4, 8, 16, 32), strict=True)]


def targets(classes=3, empty=False):
    masks = torch.zeros(2, *SIZE, dtype=torch.uint8)
    masks[0, 10:50, 20:60] = 1
    masks[1, 30:70, 60:90] = 1
    boxes = torch.tensor([[20.0, 10.0, 60.0, 50.0], [60.0, 30.0, 90.0, 70.0]])
    full = {"boxes": boxes, "labels": torch.tensor([1, classes]), "masks": masks}
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": masks[:0]}
    return [full, none if empty else copy.deepcopy(full)]


def stage(
    loss="smooth_l1", iou=0.5, weights=(10.0, 10.0, 5.0, 5.0), samples=32, loss_weight=1.0, classes=4, agnostic=False
):
    options = CascadeBoxOptions(
        roi_size=7,
        sampling_ratio=0,
        aligned=True,
        class_agnostic=agnostic,
        conv_channels=[32],
        hidden=32,
        batch_size_per_image=samples,
        positive_fraction=0.25,
        loss=loss,
        loss_weight=loss_weight,
    )
    return BoxStage(options, 32, classes, fg_iou=iou, regression_weights=weights)


def torchvisions(head):
    """Torchvision's single-stage heads with the weights of a cascade of one stage and one class."""
    ours, branch = head.box_stages[0], head.masks[0]
    predictor = FastRCNNPredictor(32, 2)
    with torch.no_grad():
        predictor.cls_score.load_state_dict(ours.predictor.cls_score.state_dict())
        predictor.bbox_pred.weight[4:] = ours.predictor.bbox_pred.weight  # the boxes of class 1
        predictor.bbox_pred.bias[4:] = ours.predictor.bbox_pred.bias
    return RoIHeads(
        ours.pool,
        ours.head,
        predictor,
        0.5,
        0.5,
        32,
        0.25,
        (10.0, 10.0, 5.0, 5.0),
        0.0,
        0.5,
        100,
        branch.pool,
        branch.head,
        branch.predictor,
    )


ONE_STAGE = [
    "head.box.fg_iou=[0.5]",
    "head.box.regression_weights=[[10,10,5,5]]",
    "head.box.stage_loss_weights=[1.0]",
    "head.box.loss=smooth_l1",
    "head.box.loss_weight=1.0",
]


def remove_newer_options(head):
    """Remove the options of a head that runs of earlier versions do not have."""
    for part, names in {
        "rpn": ["inside_only", "exact_anchors"],
        "box": ["class_agnostic", "aligned", "score_averaging"],
        "mask": ["aligned"],
    }.items():
        for name in names:
            del head[part][name]
        if part != "rpn":
            head[part]["sampling_ratio"] = 2
    return head


@pytest.fixture
def legacy(config):
    def head(*overrides, classes=3):
        options = {"head": remove_newer_options(to_dict(config(*SMALL, *overrides).head))}
        return build_head(**with_older_options(options)["head"], channels=CHANNELS, num_classes=classes)

    return head


@pytest.mark.parametrize("empty", [False, True])
def test_older_options_with_one_stage_and_class_equal_torchvision(legacy, empty):
    head = legacy(*ONE_STAGE, classes=1)
    reference, maps, truth = torchvisions(head), features(), targets(1, empty)
    with torch.no_grad():
        for layer in (head.box_stages[0].predictor.bbox_pred, reference.box_predictor.bbox_pred):
            layer.weight[-4:] = 10 * layer.weight[-4:]  # so that boxes move
    pyramid = head.neck(dict(zip("0123", maps, strict=True)))
    torch.manual_seed(1)
    losses = head.losses(maps, IMAGES, truth)
    torch.manual_seed(1)
    proposals, _ = head.rpn(IMAGES, pyramid, truth)
    _, theirs = reference(pyramid, proposals, SIZES, truth)
    assert losses["stage1_class"].item() == pytest.approx(theirs["loss_classifier"].item(), rel=1e-5)
    assert losses["stage1_box"].item() == pytest.approx(theirs["loss_box_reg"].item(), rel=1e-5)
    assert losses["stage1_box"] > 0

    head.eval(), reference.eval()
    with torch.no_grad():
        proposals, _ = head.rpn(IMAGES, pyramid)
        expected, _ = reference(pyramid, proposals, SIZES)
        for found, theirs in zip(head.predict(lambda _: maps, IMAGES), expected, strict=True):
            assert len(found) > 0
            for key in ("boxes", "scores", "labels", "masks"):
                torch.testing.assert_close(getattr(found, key), theirs[key])


def test_matching():
    annotated = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 40.0, 40.0]])
    boxes = torch.tensor(
        [
            [0.0, 0.0, 10.0, 6.0],  # IoU 0.6 with the first
            [20.0, 20.0, 40.0, 33.0],  # 0.65 with the second
            [0.0, 0.0, 10.0, 10.0],  # the first itself
            [50.0, 50.0, 60.0, 60.0],
        ]
    )
    labels = torch.tensor([7, 9])
    for iou, expected in ((0.5, [7, 9, 7, 0]), (0.61, [0, 9, 7, 0]), (0.7, [0, 0, 7, 0])):
        found = match(boxes, annotated, labels, Matcher(iou, iou))
        assert found[1].tolist() == expected
        assert [i for i, label in zip(*map(list, found), strict=True) if label] == [
            int(box_iou(b[None], annotated).argmax()) for b, e in zip(boxes, expected, strict=True) if e
        ]
    assert match(boxes, annotated[:0], labels[:0], Matcher(0.5, 0.5))[1].tolist() == [0, 0, 0, 0]


def test_sample_includes_ground_truth_and_limits_positives():
    truth = targets()[:1]
    near = truth[0]["boxes"].repeat(20, 1) + torch.rand(40, 4)
    far = torch.tensor([[100.0, 80.0, 110.0, 90.0]]).repeat(60, 1)
    sampler = BalancedPositiveNegativeSampler(32, 0.25)
    rois = sample_rois([torch.cat((near, far))], truth, Matcher(0.5, 0.5), sampler)
    assert len(rois.boxes[0]) == 32 and (rois.labels[0] > 0).sum() == 8
    overlaps = box_iou(rois.boxes[0], truth[0]["boxes"]).max(1).values
    assert torch.equal(overlaps >= 0.5, rois.labels[0] > 0)
    everything = sample_rois([far[:3]], truth, Matcher(0.5, 0.5), sampler)
    assert everything.proposed[0].tolist() == [True] * 3 + [False] * 2
    assert everything.labels[0].tolist() == [0, 0, 0, 1, 3]


def test_older_options_are_class_agnostic(legacy, build):
    for head, boxes, averages_logits in ((legacy(), 1, False), (build(), 3, True)):
        assert [s.predictor.bbox_pred.out_features for s in head.box_stages] == [4 * boxes] * 3
        assert head.averages_logits == averages_logits


def one_image(labels):
    boxes = torch.tensor([[20.0, 10.0, 60.0, 50.0], [0.0, 0.0, 5.0, 5.0]])
    return boxes, SampledRoIs([boxes], [torch.tensor(labels)], [torch.tensor([0, 0])], [torch.tensor([True, True])])


@pytest.mark.parametrize("agnostic", [False, True])
def test_losses(agnostic):
    truth = targets()[:1]
    _, rois = one_image([2, 0])
    logits, deltas = torch.randn(2, 4), torch.full((2, 4 if agnostic else 12), 50.0)  # of other classes: ignored
    own = slice(0, 4) if agnostic else slice(4, 8)
    deltas[0, own] = torch.tensor([1.0, 0.0, 0.0, 0.0])  # with weight 10 on x: a tenth of the width, 4 pixels right
    deltas[1] = 100.0  # background: ignored
    class_loss, box_loss = stage("giou", loss_weight=10.0, agnostic=agnostic).losses(logits, deltas, rois, truth)
    assert class_loss.item() == pytest.approx(cross_entropy(logits, torch.tensor([2, 0])).item())
    iou = 36 * 40 / (2 * 40 * 40 - 36 * 40)  # the boxes' hull is their union, so GIoU = IoU
    assert box_loss.item() == pytest.approx(10 * (1 - iou) / 2, rel=1e-5)
    _, box_loss = stage("smooth_l1", agnostic=agnostic).losses(logits, deltas, rois, truth)
    assert box_loss.item() == pytest.approx((1.0 - 0.5 / 9) / 2)  # beyond beta = 1/9: |x| - beta / 2


def test_box_loss_is_normalized_by_all_rois_of_the_batch():
    """mmdetection's formula: 10 sum_i (1 - GIoU_i) / regions, over images with different numbers of objects."""
    truth = targets()
    near = [t["boxes"].repeat(n, 1) + 6 * torch.rand(2 * n, 4) for t, n in zip(truth, (1, 3), strict=True)]
    rois = SampledRoIs(
        near,
        [torch.tensor([1, 3]), torch.tensor([1, 3] * 2 + [0, 0])],
        [torch.tensor([0, 1] * n) for n in (1, 3)],
        [torch.ones(len(boxes), dtype=torch.bool) for boxes in near],
    )
    logits, deltas = torch.randn(8, 4), torch.randn(8, 12)
    _, box_loss = stage("giou", weights=(20, 20, 10, 10), loss_weight=10.0).losses(logits, deltas, rois, truth)
    total = 0.0
    for index, (box, label) in enumerate(zip(torch.cat(near), torch.cat(rois.labels).tolist(), strict=True)):
        if label:
            moved = plain.decode(deltas[index, 4 * (label - 1) : 4 * label], box, (0.05, 0.05, 0.1, 0.1)).tolist()
            wanted = truth[0]["boxes"][0 if label == 1 else 1].tolist()
            hull = [f(a, b) for f, a, b in zip((min, min, max, max), moved, wanted, strict=True)]
            areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (moved, wanted, hull)]
            overlap = plain.iou(moved, wanted)
            union = (areas[0] + areas[1]) / (1 + overlap)
            total += 1 - overlap + (areas[2] - union) / areas[2]
    assert box_loss.item() == pytest.approx(10 * total / 8, rel=1e-4)


@pytest.mark.parametrize("agnostic", [False, True])
def test_refinement(agnostic):
    boxes = [torch.tensor([[20.0, 10.0, 60.0, 50.0], [40.0, 5.0, 50.0, 40.0]]), torch.tensor([[0.0, 0.0, 60.0, 70.0]])]
    logits = torch.tensor([[9.0, 1.0, 3.0, 2.0], [9.0, 5.0, 3.0, 2.0], [0.0, 1.0, 3.0, 4.0]])
    deltas = torch.randn(3, 4 if agnostic else 12)
    sizes = [SIZE, (60, 50)]
    for weights in ((10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)):
        one, stds = stage(weights=weights, agnostic=agnostic), [1 / w for w in weights]
        for labels, classes in ((None, (2, 1, 3)), (torch.tensor([1, 0, 0]), (1, 1, 3))):
            found = torch.cat(one.refine(logits, deltas, boxes, sizes, labels))
            for index, label in enumerate(classes):
                own = deltas[index] if agnostic else deltas[index, 4 * label - 4 : 4 * label]
                moved = plain.decode(own, torch.cat(boxes)[index], stds)
                torch.testing.assert_close(found[index], plain.clip(moved, sizes[index // 2]))
        candidates = torch.cat(one.candidates(deltas, boxes, sizes))
        assert candidates.shape == (3, 1 if agnostic else 3, 4)
        for index, of_region in enumerate(deltas.unflatten(1, (-1, 4))):
            for of_class, own in enumerate(of_region):
                moved = plain.decode(own, torch.cat(boxes)[index], stds)
                torch.testing.assert_close(candidates[index, of_class], plain.clip(moved, sizes[index // 2]))


def test_detections_have_the_box_of_their_class(build):
    """Two classes of one RoI are detected, each with its own box; the lowest score is below the threshold."""
    head = build("head.box.score_threshold=0.05")
    boxes = torch.tensor([[[0.0, 0.0, 20.0, 20.0], [5.0, 5.0, 30.0, 30.0], [8.0, 8.0, 9.0, 9.0]]])
    found = head.select(boxes, torch.tensor([[0.26, 0.3, 0.4, 0.04]]), SIZE)
    assert found.labels.tolist() == [2, 1] and found.boxes.tolist() == boxes[0, [1, 0]].tolist()
    assert (
        head.select(boxes[:, :1], torch.tensor([[0.26, 0.3, 0.4, 0.04]]), SIZE).boxes.tolist()
        == [[0.0, 0.0, 20.0, 20.0]] * 2
    )


def test_mask_loss(build):
    """Ground-truth masks are cropped by aligned RoIAlign, binarized, and compared with the class's channel."""
    branch, truth = build().masks[0], targets()
    pyramid = {str(level): torch.randn(2, 32, SIZE[0] // s, SIZE[1] // s) for level, s in enumerate((4, 8, 16, 32))}
    boxes = [t["boxes"] + 8 * torch.rand(2, 4) for t in truth]
    labels = [torch.tensor([1, 0]), torch.tensor([1, 3])]
    proposed = [torch.ones(2, dtype=torch.bool)] * 2
    rois = SampledRoIs(boxes, labels, [torch.tensor([0, 1])] * 2, proposed)
    logits = branch(pyramid, [boxes[0][:1], boxes[1]], SIZES)
    wanted = [
        plain.roi_align(truth[image]["masks"][index][None].float(), boxes[image][index], 28, 1)[0] >= 0.5
        for image, index in ((0, 0), (1, 0), (1, 1))
    ]
    own = torch.stack([logits[0, 1], logits[1, 1], logits[2, 3]])
    expected = binary_cross_entropy(own.sigmoid(), torch.stack(wanted).float())
    assert branch.loss(pyramid, SIZES, rois, truth).item() == pytest.approx(expected.item(), rel=1e-5)


def test_each_stage_is_trained_on_refined_boxes(build, monkeypatch):
    """With a perfect first regression, the second stage's proposals are the ground-truth boxes."""
    head, seen = build(), []
    sample = BoxStage.sample

    def noted(self, proposals, truth):
        seen.append(proposals)
        return sample(self, proposals, truth)

    def perfect(self, logits, deltas, boxes, sizes, labels):
        assert len(labels) == len(deltas) == len(torch.cat(boxes))
        return [t["boxes"][box_iou(b, t["boxes"]).argmax(1)] for b, t in zip(boxes, targets(), strict=True)]

    monkeypatch.setattr(BoxStage, "sample", noted)
    monkeypatch.setattr(BoxStage, "refine", perfect)
    head.losses(features(), IMAGES, targets())
    assert len(seen) == 3
    for proposals, truth in zip(seen[1], targets(), strict=True):
        assert len(proposals) > 0 and box_iou(proposals, truth["boxes"]).max(1).values.min() == 1
    assert [s.matcher.high_threshold for s in head.box_stages] == [0.5, 0.6, 0.7]


@pytest.mark.parametrize("averaging", ["logits", "probabilities"])
def test_scores_and_masks_are_averaged_over_stages(build, averaging):
    head, maps = build(f"head.box.score_averaging={averaging}").eval(), features()
    with torch.no_grad():
        for one in head.box_stages:  # so that stages disagree, and the two means differ
            one.predictor.cls_score.weight.normal_(std=1.0)
    pyramid = head.neck(dict(zip("0123", maps, strict=True)))
    with torch.no_grad():
        found = head.predict(lambda _: maps, IMAGES)
        boxes, _ = head.rpn(IMAGES, pyramid)
        of_stages = []
        for one in head.box_stages:
            logits, deltas = one(pyramid, boxes, SIZES)
            of_stages.append(logits)
            boxes = one.refine(logits, deltas, boxes, SIZES)
        means = {
            "logits": (sum(of_stages) / 3).softmax(-1),
            "probabilities": sum(logits.softmax(-1) for logits in of_stages) / 3,
        }
        best = {name: mean[: len(boxes[0]), 1:].max().item() for name, mean in means.items()}
        assert best["logits"] != pytest.approx(best["probabilities"], rel=0.01)
        assert found[0].scores[0] == pytest.approx(best[averaging], rel=1e-5)
        at, labels = [f.boxes for f in found], [f.labels for f in found]
        masks = [branch.probabilities(pyramid, at, SIZES, labels)[1] for branch in head.masks]
        torch.testing.assert_close(found[1].masks, sum(masks) / 3)


def test_losses_are_weighted_by_stage(build):
    maps, truth = features(), targets()
    head = build()
    torch.manual_seed(2)
    weighted = head.losses(maps, IMAGES, truth)
    head.loss_weights = [1.0, 1.0, 1.0]
    torch.manual_seed(2)
    plain = head.losses(maps, IMAGES, truth)
    for index, weight in enumerate((1.0, 0.5, 0.25), start=1):
        for loss in ("class", "box", "mask"):
            name = f"stage{index}_{loss}"
            assert weighted[name].item() == pytest.approx(weight * plain[name].item(), rel=1e-5)


def test_masks_on_the_last_stage_only(build):
    head = build("head.mask.every_stage=false")
    losses = head.losses(features(), IMAGES, targets())
    assert [name for name in losses if "mask" in name] == ["stage3_mask"]
    with torch.no_grad():
        assert head.eval().predict(lambda _: features(), IMAGES)[0].masks.shape[1:] == (1, 28, 28)


def test_every_parameter_is_trained(build):
    head = build("head.mask.every_stage=true")
    sum(head.losses(features(), IMAGES, targets(empty=True)).values()).backward()
    assert [name for name, p in head.named_parameters() if p.grad is None] == []


def test_autocast_decodes_in_float32(build):
    head, maps = build().eval(), features()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = head.predict(lambda _: maps, IMAGES)
    assert all(one.boxes.dtype == one.scores.dtype == torch.float32 and len(one) for one in found)
