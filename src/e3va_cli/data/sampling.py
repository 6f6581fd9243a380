"""Samplers that depend on (seed, epoch, rank) only, so that runs can be reproduced and resumed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

Key = tuple[int, int]  # epoch, index


class EpochSampler(Sampler[Key]):
    """Yields (epoch, index) of this rank's part of a shuffled or sequential pass over the data.

    In training, all ranks get the same number of samples and the remainder is dropped; in evaluation, each sample is
    used exactly once.

    Attributes:
        start: samples to skip in the next pass, as an interrupted run has used them.
    """

    def __init__(self, length: int, *, shuffle: bool, seed: int, rank: int = 0, world: int = 1) -> None:
        self.length, self.shuffle, self.seed = length, shuffle, seed
        self.rank, self.world = rank, world
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; called by Lightning before each one."""
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
    """Makes random transforms depend on (seed, epoch, index) only, not on the process that runs them.

    Args:
        dataset: map-style.
        seed: of the transforms.
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
    """Return a seed made of several numbers; similar numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def evenly_spaced(length: int, count: int) -> list[int]:
    """Return up to `count` evenly spaced indices below `length`, in ascending order."""
    chosen: list[int] = np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()
    return chosen
