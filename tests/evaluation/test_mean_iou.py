import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from e3va_cli.evaluation.base import EVALUATORS
from e3va_cli.evaluation.mean_iou import MeanIoU, miou
from e3va_cli.models.heads.predictions import Segmentation

NAMES = ["wall", "sky", "tree", "road", "person", "car"]  # the last never occurs


def certain(labels):
    """A segmentation that finds exactly these labels, 1..K."""
    scores = torch.nn.functional.one_hot(torch.as_tensor(labels).long() - 1, len(NAMES)).permute(2, 0, 1).float()
    size = tuple(labels.shape)
    return Segmentation(scores, size, size)


def cases(images=5, seed=0):
    """(found, annotated) semantic masks of several sizes: 0 is unlabeled; person is found but never annotated."""
    random = np.random.default_rng(seed)
    sizes = [(int(random.integers(5, 30)), int(random.integers(5, 30))) for _ in range(images)]
    return [(random.integers(1, 6, size), random.integers(0, 5, size)) for size in sizes]


def measured(pairs):
    metric = MeanIoU(NAMES)
    for index, (found, annotated) in enumerate(pairs):
        target = {"image_id": index, "original_size": annotated.shape, "semantic": torch.tensor(annotated).short()}
        metric.update(certain(found), target)
    return metric


def confusion(pairs):
    """Pixel by pixel."""
    matrix = np.zeros((len(NAMES), len(NAMES)), int)
    for found, annotated in pairs:
        for f, a in zip(found.ravel().tolist(), annotated.ravel().tolist(), strict=True):
            if a != 0:
                matrix[a - 1, f - 1] += 1
    return matrix


def test_equals_a_count_pixel_by_pixel():
    metric, matrix = measured(cases()), confusion(cases())
    assert np.array_equal(metric.matrix.numpy(), matrix) and metric.matrix.dtype == torch.int64
    assert metric.num_images == 5
    with np.errstate(invalid="ignore"):
        hits, annotated, found = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        ious = hits / (annotated + found - hits)
        accuracies = hits / annotated
    results = metric.compute()
    assert np.isnan(ious[5]) and ious[4] == 0
    assert results["mIoU"] == pytest.approx(np.nanmean(ious))
    assert results["mean_accuracy"] == pytest.approx(np.nanmean(accuracies))
    assert results["pixel_accuracy"] == pytest.approx(hits.sum() / matrix.sum())
    assert list(results["per_class"]) == NAMES
    assert results["per_class"]["car"] is None
    assert [results["per_class"][name] for name in NAMES[:5]] == pytest.approx(ious[:5].tolist())
    assert metric.log_dict(results) == {k: results[k] for k in ("mIoU", "pixel_accuracy")}
    assert metric.monitor in metric.log_dict(results)


def test_classes_are_measured_over_the_whole_set_not_per_image():
    large, small = np.full((10, 10), 1), np.full((1, 10), 1)
    results = measured([(large, large), (np.full((1, 10), 2), small)]).compute()
    assert results["per_class"] == {"wall": 100 / 110, "sky": 0.0, "tree": None, "road": None} | dict.fromkeys(
        NAMES[4:]
    )
    assert results["mIoU"] == pytest.approx(100 / 110 / 2), "what is only found counts as 0"
    assert results["mean_accuracy"] == pytest.approx(100 / 110), "but has no accuracy"


def test_pixels_without_a_label_do_not_count():
    found, annotated = cases(images=1)[0]
    elsewhere = np.where(annotated == 0, found % 5 + 1, found)
    assert not np.array_equal(found, elsewhere)
    assert measured([(found, annotated)]).compute() == measured([(elsewhere, annotated)]).compute()


def test_no_labeled_pixels():
    found, annotated = cases(images=1)[0]
    metric = measured([(found, annotated * 0)])
    results = metric.compute()
    assert results == {
        "mIoU": None,
        "pixel_accuracy": None,
        "mean_accuracy": None,
        "per_class": dict.fromkeys(NAMES),
    }
    assert metric.log_dict(results) == {} and metric.num_images == 1


def test_order_does_not_matter_and_reset_discards():
    metric = measured(cases())
    assert metric.compute() == measured(cases()[::-1]).compute()
    metric.reset()
    assert metric.num_images == 0 and metric.matrix.sum() == 0


def test_merged_states_of_two_processes_equal_one():
    states = [pickle.loads(pickle.dumps(measured(part).state())) for part in (cases()[:2], cases()[2:])]
    ranks = [measured(cases()[:2]), measured(cases()[2:])]
    for rank in ranks:
        rank.merge(states)
        assert rank.compute() == measured(cases()).compute() and rank.num_images == 5


def test_compares_at_the_original_size():
    scores = torch.zeros(2, 8, 8)
    scores[0, :, :4], scores[1, :, 4:] = 1, 1  # of an image 32 wide, padded to 64: all of it the first class
    found = Segmentation(scores, (64, 64), (64, 28))
    metric = MeanIoU(NAMES[:2])
    annotated = torch.ones(101, 47, dtype=torch.int16)
    metric.update(found, {"image_id": 0, "original_size": (101, 47), "semantic": annotated})
    assert metric.matrix.tolist() == [[101 * 47, 0], [0, 0]]


def test_registered_for_data_sets_with_masks():
    assert EVALUATORS["miou"] == (frozenset({"semantic"}), miou)
    assert miou(SimpleNamespace(classes=NAMES), ["semantic"]).classes == NAMES
