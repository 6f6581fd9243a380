"""Loaders over the two splits of a data set."""

from __future__ import annotations

import lightning as L  # noqa: N812 (Lightning's own alias)
import torch
from torch.utils.data import DataLoader

from e3va_cli.data.batch import Batch, collate
from e3va_cli.data.sampling import EpochSampler, Reproducible
from e3va_cli.data.targets import DenseDataset


class DenseData(L.LightningDataModule):
    """Shuffled training batches and validation batches in order, each rank its share.

    Args:
        train: the training split, or None where only evaluation is wanted.
        val: the validation split.
        batch_size: training images per step and device.
        val_batch_size: validation images per step and device.
        num_workers: loader processes per device.
        seed: of the order of the training images and of their random transforms.
    """

    def __init__(
        self,
        train: DenseDataset | None,
        val: DenseDataset,
        *,
        batch_size: int,
        val_batch_size: int,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.train, self.val = train, val
        self.batch_size, self.val_batch_size = batch_size, val_batch_size
        self.num_workers, self.seed = num_workers, seed

    def _loader(self, dataset: DenseDataset, batch_size: int, *, shuffle: bool) -> DataLoader[Batch]:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = EpochSampler(len(dataset), shuffle=shuffle, seed=self.seed, rank=rank, world=world)
        return DataLoader(
            Reproducible(dataset, self.seed),
            batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            drop_last=shuffle and len(sampler) > batch_size,
        )

    def batches_per_epoch(self, devices: int) -> int:
        """Training batches that each of so many devices gets of one pass."""
        assert self.train is not None
        return max(1, len(self.train) // devices // self.batch_size)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled; a last, smaller batch is left out."""
        assert self.train is not None
        return self._loader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """In order."""
        return self._loader(self.val, self.val_batch_size, shuffle=False)
