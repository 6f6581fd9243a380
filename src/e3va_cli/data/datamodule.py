"""Loaders over the two splits of a data set."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.queues import Queue
from typing import Any, NoReturn

import lightning as L  # noqa: N812 (Lightning's own alias)
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from e3va_cli.components.options import Options, option
from e3va_cli.data.collate import Batch, collate
from e3va_cli.data.dataset import DenseDataset, Target
from e3va_cli.data.sampling import EpochSampler, Reproducible
from e3va_cli.errors import first_line


def load_batch(samples: Sequence[tuple[torch.Tensor, Target]]) -> Batch:
    """Collate; in a loader process, put the batch into shared memory here, so that a failure is an error of the run.

    Otherwise the thread that hands batches over does so, and leaves out with a traceback what it fails of, for which
    the run would wait for ever.
    """
    batch = collate(samples)
    if get_worker_info() is not None:
        batch.share_memory()
    return batch


def begin_process(_: int) -> None:
    """Prepare a loader process: a batch that cannot be handed over ends it, and Ctrl-C is for the run to answer."""
    Queue._on_queue_feeder_error = staticmethod(_end_process)  # type: ignore[attr-defined]
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end_process(error: Exception, _: Any) -> NoReturn:
    print(f"e3va: error: a batch cannot leave its loader process: {first_line(error)}", file=sys.stderr, flush=True)
    os._exit(1)


class ResumableLoader(DataLoader[Batch]):
    """A loader whose place in an epoch Lightning keeps in checkpoints: a resumed run goes on with the next batch.

    Its workers start with the first batch, not before: Lightning asks for the iterator before it tells the sampler the
    epoch.
    """

    def __init__(self, dataset: Dataset[Any], batch_size: int, *, sampler: EpochSampler, **options: Any) -> None:
        super().__init__(dataset, batch_size, sampler=sampler, **options)
        self.order, self.per_batch = sampler, batch_size
        self.batches = 0  # that this epoch has given
        self.resumed = (-1, 0)  # an epoch that was begun, and the batches that it had given

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        epoch, given = self.resumed
        self.batches = given if epoch == self.order.epoch else 0
        self.order.start = self.batches * self.per_batch
        for batch in super().__iter__():
            self.batches += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch."""
        return {"epoch": self.order.epoch, "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Leave out what the epoch had given."""
        self.resumed, self.batches = (state["epoch"], state["batches"]), state["batches"]


@dataclass
class LoaderOptions(Options):
    """Options of loading batches."""

    batch_size: int = option(help="images per step and device; memory grows with it", above=0)
    val_batch_size: int = option(help="the same in evaluation", above=0)
    num_workers: int = option(help="processes that read and transform images, per device", least=0)


class DenseDataModule(L.LightningDataModule):
    """Shuffled training batches and validation batches in order, each rank its share.

    Args:
        train: the training split, or None where only evaluation is wanted.
        val: the validation split.
        options: of loading.
        seed: of the order of the training images and of their random transforms.
    """

    def __init__(self, train: DenseDataset | None, val: DenseDataset, options: LoaderOptions, *, seed: int) -> None:
        super().__init__()
        self.train, self.val = train, val
        self.batch_size, self.val_batch_size = options.batch_size, options.val_batch_size
        self.num_workers, self.seed = options.num_workers, seed

    def _loader(self, dataset: DenseDataset, batch_size: int, *, shuffle: bool) -> DataLoader[Batch]:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = EpochSampler(len(dataset), shuffle=shuffle, seed=self.seed, rank=rank, world=world)
        if self.num_workers:
            multiprocessing.Lock()  # where there is no shared memory this fails before a loader is half made
        loader = ResumableLoader if shuffle else DataLoader
        return loader(
            Reproducible(dataset, self.seed),
            batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=load_batch,
            worker_init_fn=begin_process,
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
