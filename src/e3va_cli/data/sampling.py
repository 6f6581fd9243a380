"""Which image comes when: a function of (seed, epoch, rank) alone, so that a run can be repeated and resumed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

Key = tuple[int, int]  # epoch, index


class EpochSampler(Sampler[Key]):
    """Yields (epoch, index): every rank its share of one shuffled or ordered pass over the data.

    Training shares are equally long (what is left over waits for another epoch's order); evaluation leaves nothing out
    and repeats nothing.

    Attributes:
        start: samples of the share that the next pass leaves out, as a run that was stopped has seen them.
    """

    def __init__(self, length: int, *, shuffle: bool, seed: int, rank: int = 0, world: int = 1) -> None:
        self.length, self.shuffle, self.seed = length, shuffle, seed
        self.rank, self.world = rank, world
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        if self.shuffle:
            return self.length // self.world
        return len(range(self.rank, self.length, self.world))

    def __iter__(self) -> Iterator[Key]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
            order = torch.randperm(self.length, generator=generator).tolist()
        else:
            order = list(range(self.length))
        for index in order[self.rank :: self.world][self.start : len(self)]:
            yield self.epoch, index


class Reproducible(Dataset[Any]):
    """A data set whose random transforms depend on (seed, epoch, index), whichever process runs them.

    Args:
        dataset: looked up by index.
        seed: another seed, other transforms.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> Any:
        epoch, index = key
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, epoch, index))
            return self.dataset[index]


def derive_seed(*numbers: int) -> int:
    """One seed of several numbers, such that neighbours share nothing."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
