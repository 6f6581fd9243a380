"""Data loaders of the training and validation split."""

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
    """Collate; in a worker, move the batch to shared memory, so that out of shared memory is an error of the run.

    Otherwise the worker's queue thread moves it, drops it with a traceback on failure, and the run waits forever.
    """
    batch = collate(samples)
    if get_worker_info() is not None:
        batch.share_memory()
    return batch


def init_worker(_: int) -> None:
    """Set up a worker: it exits if a batch cannot be sent, and leaves Ctrl-C to the main process."""
    Queue._on_queue_feeder_error = staticmethod(_exit_worker)  # type: ignore[attr-defined]
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _exit_worker(error: Exception, _: Any) -> NoReturn:
    # The worker ends here, so that nothing else can report the error.
    print(f"e3va: error: a data loader worker cannot send a batch: {first_line(error)}", file=sys.stderr, flush=True)
    os._exit(1)


class ResumableLoader(DataLoader[Batch]):
    """A loader whose position in the epoch Lightning saves: a resumed run continues with the next batch.

    Its workers start with the first batch, as Lightning creates the iterator before it sets the sampler's epoch.
    """

    def __init__(self, dataset: Dataset[Any], batch_size: int, *, sampler: EpochSampler, **options: Any) -> None:
        super().__init__(dataset, batch_size, sampler=sampler, **options)
        self.order, self.per_batch = sampler, batch_size
        self.batches = 0  # of this epoch so far
        self.resumed = (-1, 0)  # epoch, and its batches before the interruption

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        epoch, done = self.resumed
        self.batches = done if epoch == self.order.epoch else 0
        self.order.start = self.batches * self.per_batch
        for batch in super().__iter__():
            self.batches += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the epoch."""
        return {"epoch": self.order.epoch, "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Skip the batches of the interrupted epoch."""
        self.resumed, self.batches = (state["epoch"], state["batches"]), state["batches"]


@dataclass
class LoaderOptions(Options):
    """Options of the data loaders."""

    batch_size: int = option(help="images per step and device; affects memory", gt=0)
    val_batch_size: int = option(help="batch size in evaluation", gt=0)
    num_workers: int = option(help="data loader workers per device", ge=0)


class DenseDataModule(L.LightningDataModule):
    """Shuffled training batches and sequential validation batches, distributed over ranks.

    Args:
        train: the training split, None for evaluation only.
        val: the validation split.
        options: of the loaders.
        seed: of shuffling and random transforms.
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
            multiprocessing.Lock()  # fails here if there is no shared memory
        loader = ResumableLoader if shuffle else DataLoader
        return loader(
            Reproducible(dataset, self.seed),
            batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=load_batch,
            worker_init_fn=init_worker,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            drop_last=shuffle and len(sampler) > batch_size,
        )

    def batches_per_epoch(self, devices: int) -> int:
        """Return the number of training batches of each device in one epoch."""
        assert self.train is not None
        return max(1, len(self.train) // devices // self.batch_size)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return shuffled batches without the incomplete last one."""
        assert self.train is not None
        return self._loader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return batches in order."""
        return self._loader(self.val, self.val_batch_size, shuffle=False)
