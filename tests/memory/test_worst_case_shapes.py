"""Worst-case sizes of data-dependent operators on tensors without data."""

import pytest
import torch
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher
from torchvision.ops import boxes as box_ops
from torchvision.ops.poolers import LevelMapper

from e3va_cli.memory.worst_case_shapes import BEST_ANCHORS, worst_case_shapes


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def test_without_bounds_all_entries_count():
    with worst_case_shapes():
        x = meta(7, 3)
        assert torch.where(x > 0)[0].shape == (21,)
        assert x[meta(7, dtype=torch.bool)].shape == (7, 3)


def test_samples_are_bounded_by_the_sampler():
    sampler = BalancedPositiveNegativeSampler(32, 0.25)
    with worst_case_shapes():
        labels = [meta(100, dtype=torch.int64), meta(90, dtype=torch.int64)]
        positive, negative = sampler(labels)
        assert len(torch.where(torch.cat(positive))[0]) == 16
        sampled = torch.where(positive[0] | negative[0])[0]
        assert len(sampled) == 32
        assert len(torch.where(labels[0][sampled] > 0)[0]) == 8


def test_the_bound_is_never_below_what_values_give():
    """The same program with values, of which more are positive than may be sampled."""
    sampler = BalancedPositiveNegativeSampler(32, 0.25)
    labels = [torch.arange(100) % 2]
    positive, negative = sampler(labels)
    assert len(torch.where(positive[0] | negative[0])[0]) == 32
    assert int((labels[0][torch.where(positive[0] | negative[0])[0]] > 0).sum()) == 8


def test_an_unknown_write_resets_the_bound():
    with worst_case_shapes() as mode:
        mask = torch.zeros_like(meta(50, dtype=torch.uint8))
        assert mode.bound(mask) == 0
        mask.copy_(meta(50, dtype=torch.uint8))
        assert mode.bound(mask) == 50


def test_each_region_is_on_one_level():
    with worst_case_shapes():
        levels = LevelMapper(2, 5)([meta(40, 4)])
        assert [len(torch.where(levels == level)[0]) for level in range(4)] == [40, 0, 0, 0]


def test_few_anchors_have_the_best_iou():
    matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True)
    seen = []
    original = torch.Tensor.__getitem__
    with worst_case_shapes() as mode:
        with mode.max_entries(BEST_ANCHORS * 5):
            seen.append(len(torch.where(meta(5, 1000) == meta(5, 1))[0]))
        assert matcher(meta(5, 1000)).shape == (1000,)
    assert seen == [20] and torch.Tensor.__getitem__ is original


def test_nms_keeps_all():
    with worst_case_shapes():
        assert len(box_ops.batched_nms(meta(3000, 4), meta(3000), meta(3000, dtype=torch.int64), 0.7)) == 3000
        assert len(box_ops.nms(meta(30, 4), meta(30), 0.7)) == 30


def test_torchvision_is_restored():
    before = (BalancedPositiveNegativeSampler.__call__, LevelMapper.__call__, box_ops.batched_nms)
    with pytest.raises(ZeroDivisionError), worst_case_shapes():
        assert box_ops.batched_nms is not before[2]
        raise ZeroDivisionError
    assert (BalancedPositiveNegativeSampler.__call__, LevelMapper.__call__, box_ops.batched_nms) == before
    kept = box_ops.batched_nms(torch.tensor([[0, 0, 9, 9.0]] * 2), torch.ones(2), torch.zeros(2), 0.5)
    assert len(kept) == 1
