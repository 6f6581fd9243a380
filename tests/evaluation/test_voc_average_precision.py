import json

import numpy as np
import pytest
import torch

from e3va_cli.evaluation.average_precision import AveragePrecision
from e3va_cli.evaluation.base import EVALUATORS
from e3va_cli.evaluation.voc_average_precision import VocAveragePrecision, area_under_curve, eleven_points
from e3va_cli.models.heads import Detections

IDS = [3, 7, 20, 90]  # not contiguous
NAMES = ["cat", "dog", "owl", "yak"]
RULES = {"voc": area_under_curve, "voc_11_point": eleven_points}
SIZE = (200, 200)


CATEGORIES = tuple(zip(IDS, NAMES, strict=True))


def truth_of(objects, categories=CATEGORIES):
    """Ground truth of (image, category id, corners, difficult)."""
    annotations = [
        {
            "id": i,
            "image_id": image,
            "category_id": category,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": (x2 - x1) * (y2 - y1),
            "iscrowd": difficult,
        }
        for i, (image, category, (x1, y1, x2, y2), difficult) in enumerate(objects, start=1)
    ]
    images = [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in sorted({image for image, *_ in objects})]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in categories],
    }


def detections(found):
    """Detections of [(label, score, corners)]."""
    return Detections(
        torch.tensor([box for _, _, box in found], dtype=torch.float32).reshape(-1, 4),
        torch.tensor([score for _, score, _ in found], dtype=torch.float32),
        torch.tensor([label for label, _, _ in found], dtype=torch.int64),
        None,
        SIZE,
    )


def target(image, size=SIZE):
    return {"image_id": image, "original_size": size}


def evaluated(truth, found, rule="voc", ids=IDS):
    """The evaluator after all of {image: [(label, score, corners)]}."""
    metric = VocAveragePrecision(truth, ids, rule=RULES[rule])
    for image, of_image in found.items():
        metric.update(detections(of_image), target(image))
    return metric


def random_data(images=30, seed=0):
    """Crowded random objects, some difficult, and findings around them, beside them and twice; scores without ties."""
    random = np.random.default_rng(seed)
    objects, found = [], {}
    for image in range(1, images + 1):
        found[image] = []
        for _ in range(random.integers(0, 9)):
            label = int(random.choice([1, 2, 3], p=[0.5, 0.3, 0.2]))  # nothing of class 4
            x, y = random.uniform(0, 120, 2)
            box = [x, y, x + random.uniform(20, 80), y + random.uniform(20, 80)]
            objects.append((image, IDS[label - 1], box, int(random.random() < 0.25)))
            for _ in range(random.integers(0, 4)):
                moved = np.array(box) + random.normal(0, 8, 4)
                said = label if random.random() < 0.8 else int(random.integers(1, 5))
                found[image].append((said, 0.0, np.clip(moved, 0, 200).tolist()))
    every = [entry for of_image in found.values() for entry in of_image]
    scores = iter(random.permutation(len(every)) / len(every))
    found = {image: [(label, next(scores), box) for label, _, box in of_image] for image, of_image in found.items()}
    return objects, found


def devkit(objects, found, category, label, rule):
    """VOCevaldet.m and VOCap.m (or VOC 2007's eleven points), line by line; None without an object that counts."""
    truths = {}
    for image, number, (x1, y1, x2, y2), difficult in objects:
        if number == category and image in found:
            pixels = (x1 + 1, y1 + 1, x2, y2)  # from 1, the last one included
            truths.setdefault(image, []).append({"bb": pixels, "diff": difficult, "det": False})
    npos = sum(not t["diff"] for of_image in truths.values() for t in of_image)
    if npos == 0:
        return None
    results = [
        (score, image, box) for image, of_image in found.items() for said, score, box in of_image if said == label
    ]
    results.sort(key=lambda result: -result[0])
    tp, fp = [0] * len(results), [0] * len(results)
    for d, (_, image, box) in enumerate(results):
        bb = (*(float(np.float32(v)) + 1 for v in box[:2]), *(float(np.float32(v)) for v in box[2:]))
        ovmax, best = -float("inf"), None
        for truth in truths.get(image, []):
            gt = truth["bb"]
            iw = min(bb[2], gt[2]) - max(bb[0], gt[0]) + 1
            ih = min(bb[3], gt[3]) - max(bb[1], gt[1]) + 1
            if iw > 0 and ih > 0:
                ua = (bb[2] - bb[0] + 1) * (bb[3] - bb[1] + 1) + (gt[2] - gt[0] + 1) * (gt[3] - gt[1] + 1) - iw * ih
                if iw * ih / ua > ovmax:
                    ovmax, best = iw * ih / ua, truth
        if ovmax >= 0.5:
            if not best["diff"]:
                if not best["det"]:
                    tp[d] = 1
                    best["det"] = True
                else:
                    fp[d] = 1
        else:
            fp[d] = 1
    recall, precision, tps, fps = [], [], 0, 0
    for t, f in zip(tp, fp, strict=True):
        tps, fps = tps + t, fps + f
        recall.append(tps / npos)
        precision.append(tps / (tps + fps) if tps + fps else 0.0)
    if rule == "voc_11_point":
        ap = 0
        for t in range(11):
            ap += max((p for r, p in zip(recall, precision, strict=True) if r > t / 10 - 1e-9), default=0) / 11
        return ap
    mrec, mpre = [0, *recall, 1], [0, *precision, 0]
    for i in range(len(mpre) - 2, -1, -1):
        mpre[i] = max(mpre[i], mpre[i + 1])
    return sum((mrec[i] - mrec[i - 1]) * mpre[i] for i in range(1, len(mrec)))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_development_kit(rule, seed):
    objects, found = random_data(seed=seed)
    results = evaluated(truth_of(objects), found, rule).compute()["box"]
    expected = [devkit(objects, found, IDS[label - 1], label, rule) for label in (1, 2, 3, 4)]
    assert list(results["per_class"].values()) == pytest.approx(expected, abs=1e-9)
    assert expected[3] is None
    assert all(0.1 < value < 0.9 for value in expected[:3])
    assert results["AP50"] == pytest.approx(np.mean(expected[:3]), abs=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_only_updated_images_are_evaluated(rule):
    objects, found = random_data()
    part = dict(list(found.items())[7:19])
    results = evaluated(truth_of(objects), part, rule).compute()["box"]["per_class"]
    expected = [devkit(objects, part, IDS[label - 1], label, rule) for label in (1, 2, 3, 4)]
    assert list(results.values()) == pytest.approx(expected, abs=1e-9)
    assert list(results.values()) != list(
        evaluated(truth_of(objects), found, rule).compute()["box"]["per_class"].values()
    )


def test_the_two_rules_on_a_curve_done_by_hand():
    # Of four objects the 1st, 3rd and 4th finding hit: precision 1, 1/2, 2/3, 3/4 at recall 1/4, 1/4, 1/2, 3/4.
    boxes = [[10 + 45 * i, 10, 50 + 45 * i, 50] for i in range(4)]
    truth = truth_of([(1, 3, box, 0) for box in boxes])
    miss = [10, 120, 50, 160]
    found = {1: [(1, 0.9, boxes[0]), (1, 0.8, miss), (1, 0.7, boxes[1]), (1, 0.6, boxes[2])]}
    assert evaluated(truth, found, "voc").compute()["box"]["AP50"] == pytest.approx((1 + 3 / 4 + 3 / 4) / 4)
    # Recall 0, 0.1, 0.2: 1; 0.3 to 0.7: 3/4; 0.8, 0.9, 1: 0.
    assert evaluated(truth, found, "voc_11_point").compute()["box"]["AP50"] == pytest.approx((3 + 5 * 3 / 4) / 11)


def test_a_recall_of_exactly_a_tenth_counts():
    boxes = [[1 + 19 * i, 1, 15 + 19 * i, 30] for i in range(10)]
    truth = truth_of([(1, 3, box, 0) for box in boxes])
    for hits in range(1, 11):
        found = {1: [(1, 1 - 0.01 * i, box) for i, box in enumerate(boxes[:hits])]}
        value = evaluated(truth, found, "voc_11_point").compute()["box"]["AP50"]
        assert value == pytest.approx((hits + 1) / 11)


@pytest.mark.parametrize("rule", RULES)
def test_a_difficult_object_found_twice_is_neither_hit_nor_miss(rule):
    plain, difficult = [10, 10, 60, 60], [100, 100, 160, 160]
    truth = truth_of([(1, 3, difficult, 1), (1, 3, plain, 0)])
    found = [(1, 0.9, difficult), (1, 0.8, difficult), (1, 0.7, plain)]
    assert evaluated(truth, {1: found}, rule).compute()["box"]["AP50"] == 1.0
    truth["annotations"][0]["iscrowd"] = 0
    assert evaluated(truth, {1: found}, rule).compute()["box"]["AP50"] < 1.0


@pytest.mark.parametrize("rule", RULES)
def test_a_difficult_object_takes_what_overlaps_it_most(rule):
    plain, difficult = [10, 10, 60, 60], [12, 10, 62, 60]
    truth = truth_of([(1, 3, plain, 0), (1, 3, difficult, 1)])
    assert evaluated(truth, {1: [(1, 0.9, difficult)]}, rule).compute()["box"]["AP50"] == 0.0
    assert evaluated(truth, {1: [(1, 0.9, plain)]}, rule).compute()["box"]["AP50"] == 1.0


def test_a_second_detection_of_an_object_is_a_false_positive():
    one, two = [10, 10, 60, 60], [100, 100, 160, 160]
    truth = truth_of([(1, 3, one, 0), (1, 3, two, 0)])
    found = {1: [(1, 0.7, two), (1, 0.9, one), (1, 0.8, one)]}
    assert evaluated(truth, found).compute()["box"]["AP50"] == pytest.approx((1 + 2 / 3) / 2)


def test_iou_from_a_half_on():
    truth = truth_of([(1, 3, [10, 10, 30, 30], 0)])
    half, less = [10, 10, 30, 20], [10, 10, 30, 19.9]
    assert evaluated(truth, {1: [(1, 0.9, half)]}).compute()["box"]["AP50"] == 1.0
    assert evaluated(truth, {1: [(1, 0.9, less)]}).compute()["box"]["AP50"] == 0.0


@pytest.mark.parametrize("rule", RULES)
def test_perfect_detections(rule):
    objects, _ = random_data()
    found = {image: [] for image, *_ in objects}
    for image, category, box, _ in objects:
        found[image].append((IDS.index(category) + 1, 0.5, box))  # all tie
    metric = evaluated(truth_of(objects), found, rule)
    results = metric.compute()
    assert results == {"box": {"AP50": 1.0, "per_class": {"cat": 1.0, "dog": 1.0, "owl": 1.0, "yak": None}}}
    assert metric.log_dict(results) == {metric.monitor: 1.0} == {"box_AP50": 1.0}
    json.dumps(results, allow_nan=False)


@pytest.mark.parametrize("rule", RULES)
def test_no_detections_are_zero_and_no_objects_are_none(rule):
    objects, found = random_data()
    results = evaluated(truth_of(objects), {image: [] for image in found}, rule).compute()
    assert results == {"box": {"AP50": 0.0, "per_class": {"cat": 0.0, "dog": 0.0, "owl": 0.0, "yak": None}}}
    nothing = {"box": {"AP50": None, "per_class": dict.fromkeys(NAMES)}}
    only_difficult = [(image, category, box, 1) for image, category, box, _ in objects]
    for metric in (
        evaluated({**truth_of(objects), "annotations": []}, found, rule),
        evaluated(truth_of(only_difficult), found, rule),
        evaluated(truth_of(objects), {}, rule),
    ):
        assert metric.compute() == nothing
        assert metric.log_dict(nothing) == {}


def test_boxes_of_a_resized_image_are_scaled_back():
    metric = VocAveragePrecision(truth_of([(1, 3, [20, 40, 80, 120], 0)]), IDS, rule=area_under_curve)
    found = Detections(
        torch.tensor([[10.0, 10, 40, 30]]), torch.ones(1), torch.ones(1, dtype=torch.int64), None, (50, 100)
    )
    metric.update(found, target(1, (200, 200)))
    assert metric.compute()["box"]["AP50"] == 1.0


def test_merged_states_of_two_processes_equal_one():
    objects, found = random_data()
    found = {image: [(label, round(score, 1), box) for label, score, box in f] for image, f in found.items()}  # ties
    truth = truth_of(objects)
    whole = evaluated(truth, found)
    odd = evaluated(truth, {image: f for image, f in found.items() if image % 2})
    even = evaluated(truth, {image: f for image, f in found.items() if not image % 2})
    assert odd.compute() != whole.compute()
    odd.merge([odd.state(), even.state()])
    assert odd.num_images == whole.num_images == len(found)
    assert odd.compute() == whole.compute()
    odd.reset()
    assert odd.num_images == 0


@pytest.mark.parametrize("rule", RULES)
def test_registered(rule):
    class Dataset:
        category_ids = IDS

        def ground_truth(self):
            return truth_of(random_data()[0])

    needs, build = EVALUATORS[rule]
    assert needs == {"boxes"}
    assert build(Dataset(), ["boxes"]).rule is RULES[rule]


def test_classes_of_the_same_name_stay_apart():
    categories = [(3, "dog"), (7, "cat"), (20, "dog"), (90, "yak")]
    box = [10, 10, 60, 60]
    truth = truth_of([(1, 3, box, 0), (1, 20, box, 0), (1, 7, box, 0)], categories)
    metric = evaluated(truth, {1: [(1, 0.9, box)]})
    expected = {"dog (id 3)": 1.0, "cat": 0.0, "dog (id 20)": 0.0, "yak": None}
    assert metric.compute()["box"]["per_class"] == expected
    coco = AveragePrecision(truth, IDS, ["box"])
    coco.update(detections([(1, 0.9, box)]), target(1))
    assert coco.compute()["box"]["per_class"] == pytest.approx(expected)
