import random

import pytest
import torch

from e3va_cli.data import DenseDataModule
from e3va_cli.data.formats.shapes import Shapes
from e3va_cli.data.sampling import EpochSampler, derive_seed
from e3va_cli.data.transforms import DetectionTransforms
from tests.components import loader_options


def test_ranks_share_out_every_image_once():
    for world in (1, 2, 3):
        shares = [list(EpochSampler(11, shuffle=False, seed=0, rank=r, world=world)) for r in range(world)]
        assert sorted(index for share in shares for _, index in share) == list(range(11))
        shuffled = [list(EpochSampler(11, shuffle=True, seed=0, rank=r, world=world)) for r in range(world)]
        seen = [index for share in shuffled for _, index in share]
        assert len({len(share) for share in shuffled}) == 1 and len(seen) == len(set(seen)) == 11 // world * world


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = EpochSampler(50, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        random.random(), torch.rand(1)
        return list(sampler)

    assert order(0, 3) == order(0, 3)
    assert order(0, 3) != order(0, 4) != order(1, 4)


def test_derived_seeds_are_distinct():
    seeds = {derive_seed(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(seeds) == 1000 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_are_the_same_for_any_number_of_workers(workers):
    def batches(num_workers, epoch):
        transforms = DetectionTransforms(
            train_short_sides=[48, 64, 80], val_short_side=64, max_size=80, flip=0.5
        ).train_transforms()
        dataset = Shapes("train", images=9, size=64, seed=0, transforms=transforms)
        data = DenseDataModule(dataset, dataset, loader_options(2, 2, num_workers), seed=5)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return list(loader)

    reference, others = batches(0, epoch=2), batches(workers, epoch=2)
    assert len(reference) == len(others) == 4
    for one, other in zip(reference, others, strict=True):
        assert torch.equal(one.images, other.images)
        for a, b in zip(one.targets, other.targets, strict=True):
            assert a["image_id"] == b["image_id"]
            assert torch.equal(a["boxes"], b["boxes"]) and torch.equal(a["masks"], b["masks"])
    later = batches(0, epoch=3)
    assert any(
        a.images.shape != b.images.shape or not torch.equal(a.images, b.images)
        for a, b in zip(reference, later, strict=True)
    )
