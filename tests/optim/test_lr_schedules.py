from itertools import pairwise

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, PolynomialLR

from e3va_cli.optim.train_schedule import TrainSchedule
from tests.components import build_schedule

STEPS, PER_EPOCH = 60, 10


def ours(name, warmup_steps=0, warmup_ratio=0.001, stretch=1.0, **options):
    course = TrainSchedule(
        total_batch=2,
        lr=1.0,
        warmup_steps=warmup_steps,
        recipe_warmup=warmup_steps,
        epochs=STEPS // PER_EPOCH,
        stretch=stretch,
        steps_per_epoch=PER_EPOCH,
        total_steps=STEPS,
        recipe_batch=None,
    )
    factor = build_schedule(name, course, warmup_ratio=warmup_ratio, **options)
    return [factor(step) for step in range(STEPS)]


def torchs(scheduler, **options):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule, rates = scheduler(optimizer, **options), []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_curves_equal_torchs():
    assert ours("multistep", milestones=[3, 5], gamma=0.1) == pytest.approx(
        torchs(MultiStepLR, milestones=[30, 50], gamma=0.1)
    )
    assert ours("cosine", min_ratio=0.0) == pytest.approx(torchs(CosineAnnealingLR, T_max=STEPS), abs=1e-9)
    assert ours("poly", power=0.9, min_ratio=0.0) == pytest.approx(torchs(PolynomialLR, total_iters=STEPS, power=0.9))


def test_milestones_keep_their_place_in_a_stretched_run():
    stretched = ours("multistep", milestones=[1, 2], gamma=0.1, stretch=2.0)  # of a recipe of 3 epochs
    assert stretched == pytest.approx(torchs(MultiStepLR, milestones=[20, 40], gamma=0.1))


def test_floors():
    assert min(ours("poly", power=1.0, min_ratio=0.25)) == 0.25
    assert min(ours("cosine", min_ratio=0.25)) > 0.25


def test_warm_up_is_linear_and_ends_on_the_curve():
    rates = ours("multistep", milestones=[100], gamma=0.1, warmup_steps=20, warmup_ratio=0.1)
    assert rates[0] == pytest.approx(0.1) and rates[10] == pytest.approx(0.55) and rates[20] == 1.0
    assert all(b > a for a, b in pairwise(rates[:21]))
