"""Training of several models at once on one forward pass of their common frozen backbone.

A frozen backbone never sees the adapters, so its activations serve any number of models. Each model has a thread with
its own Lightning trainer, which runs as it does alone: the threads take turns, one batch each, and only one runs at a
time. The first to reach a batch loads it and computes the branches of the backbone; the others replay both. As each
step seeds its random numbers, weights and metrics are those of separate runs.

The steps run one after another, so memory grows by each model's weights and optimizer state, and by the recorded
branches, not by the activations of all models.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L  # noqa: N812 (Lightning's own alias)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from e3va_cli.config.run_config import RunConfig, to_dict
from e3va_cli.data.collate import Batch
from e3va_cli.errors import UserError
from e3va_cli.models.adapters import METHODS
from e3va_cli.models.backbones import build_backbone
from e3va_cli.models.backbones.base import ResidualBackbone, Stage
from e3va_cli.training.graceful_shutdown import GracefulShutdown
from e3va_cli.training.progress import TrainingProgressBar
from e3va_cli.training.run import TrainingRun, build_run, evaluate_last_step

ONE_RUN_CALLBACKS = (GracefulShutdown, TrainingProgressBar)  # of a process with one trainer
SHARED_OPTIONS = ("backbone", "dataset", "data", "trainer", "schedule", "seed")  # the same for all members

Position = tuple[str, int, int]  # train or validation, epoch, batch


class RecordedBackbone(ResidualBackbone):
    """A frozen backbone that computes each branch once per batch and replays it from then on.

    Args:
        backbone: without gradients.
    """

    def __init__(self, backbone: ResidualBackbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.mean, self.std = backbone.mean, backbone.std
        self.position: Position | None = None
        self.passes: list[dict[Any, Tensor]] = []  # of the batch; a sliding window needs more than one
        self.number = -1  # of the current pass

    @property
    def model(self) -> Any:
        """The network."""
        return self.backbone.model

    def start_batch(self, position: Position) -> None:
        """Replay from the first pass of the batch, or forget all of the batch before."""
        if position != self.position:
            self.position, self.passes = position, []
        self.number = -1

    def stem(self, images: Tensor) -> Tensor:
        """Start the next pass: (B, 3, H, W) -> (B, H/stride, W/stride, C)."""
        self.number += 1
        if self.number == len(self.passes):
            self.passes.append({})
        return self._record("stem", self.backbone.stem, images).clone()

    @property
    def stages(self) -> list[Stage]:
        """The stages, whose branches replay."""
        return [
            replace(
                stage,
                branches=tuple(
                    # Without its block, whose offloaded weights a replay would copy to the device.
                    replace(branch, block=nn.Identity(), compute=partial(self._record, (s, b), branch))
                    for b, branch in enumerate(stage.branches)
                ),
            )
            for s, stage in enumerate(self.backbone.stages)
        ]

    def patches(self, stream: Tensor) -> Tensor:
        """Return the stream as a map (B, H, W, C)."""
        return self.backbone.patches(stream)

    @property
    def num_params(self) -> int:
        """The number of weights of the backbone."""
        return self.backbone.num_params

    def _record(self, key: Any, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        recorded = self.passes[self.number]
        if key not in recorded:
            recorded[key] = compute(x)
        return recorded[key]


class MemberStopped(Exception):  # noqa: N818 (not an error of the member)
    """Raised in each member when all are to stop."""


class Turns:
    """Lets one of several threads run at a time, in turn.

    Args:
        count: number of threads.

    Attributes:
        stopped: whether all threads are to end at their next turn.
    """

    def __init__(self, count: int) -> None:
        self._changed = threading.Condition()
        self._running = list(range(count))
        self._turn = 0
        self.stopped = False

    def wait(self, member: int) -> None:
        """Wait for the turn of a thread.

        Raises:
            MemberStopped: the threads are to end.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._turn == member)
        if self.stopped:
            raise MemberStopped

    def end(self, member: int, *, done: bool = False) -> None:
        """End the turn of a thread, and let the next one run; `done` if it needs no further turn."""
        with self._changed:
            later = [other for other in self._running if other > member]
            following = later[0] if later else self._running[0]
            if done:
                self._running.remove(member)
                following = later[0] if later else next(iter(self._running), -1)
            self._turn = following
            self._changed.notify_all()


class TurnTaking(L.Callback):
    """Ends the turn of a trainer after each of its batches."""

    def __init__(
        self,
        turns: Turns,
        member: int,
        backbone: RecordedBackbone | None,
        progress: Callable[[int, L.Trainer], None] | None = None,
    ) -> None:
        self.turns, self.member, self.backbone, self.progress = turns, member, backbone, progress

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Record or replay this batch."""
        self._start(("train", trainer.current_epoch, batch_idx))

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Record or replay this batch."""
        self._start(("validation", trainer.current_epoch, batch_idx))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End the turn."""
        self._next_turn(trainer)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """End the turn."""
        self._next_turn(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """End the turn before Lightning moves the model, and with it the backbone, back to the CPU."""
        self._next_turn(trainer)

    def _start(self, position: Position) -> None:
        if self.backbone is not None:
            self.backbone.start_batch(position)

    def _next_turn(self, trainer: L.Trainer) -> None:
        if self.progress is not None:
            self.progress(self.member, trainer)
        self.turns.end(self.member)
        self.turns.wait(self.member)


class SharedBatches:
    """The batches of one loader for several readers at about the same position; each batch is loaded once.

    Attributes:
        readers: their number.
    """

    def __init__(self, loader: DataLoader[Batch], readers: int) -> None:
        self.loader, self.readers = loader, readers
        self._iterators: dict[int, Iterator[Batch]] = {}  # by number of the pass over the data
        self._loaded: dict[tuple[int, int], tuple[Batch, int]] = {}  # by pass and index: batch, readers so far

    def read(self, number: int, index: int) -> Batch:
        """Return a batch of a pass over the data, and forget it after its last reader."""
        if index == 0 and number not in self._iterators:
            self._iterators = {number: iter(self.loader)}
        if (number, index) in self._loaded:
            batch, readers = self._loaded.pop((number, index))
        else:
            batch, readers = next(self._iterators[number]), 0
        if readers + 1 < self.readers:
            self._loaded[number, index] = batch, readers + 1
        return batch


class SharedLoader(DataLoader[Batch]):
    """The loader of one reader of `SharedBatches`."""

    def __init__(self, batches: SharedBatches) -> None:
        loader = batches.loader
        super().__init__(loader.dataset, loader.batch_size, sampler=loader.sampler, drop_last=loader.drop_last)
        self.batches, self.passes = batches, 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        number, self.passes = self.passes, self.passes + 1
        for index in range(len(self)):
            yield self.batches.read(number, index)


class SharedData(L.LightningDataModule):
    """Loaders of one of several readers of the same data."""

    def __init__(self, train: SharedBatches, val: SharedBatches) -> None:
        super().__init__()
        self.train_batches, self.val_batches = train, val

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the training batches."""
        return SharedLoader(self.train_batches)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation batches."""
        return SharedLoader(self.val_batches)


def train_together(
    configs: Sequence[RunConfig], folders: Sequence[Path], progress: Callable[[int, L.Trainer], None] | None = None
) -> list[TrainingRun | BaseException]:
    """Train runs that differ in what the backbone and the data do not depend on.

    Args:
        configs: of the runs, with the same backbone, data, loaders, seed and length; a single one has any method.
        folders: their run folders.
        progress: called after each batch with the member's number and its trainer.

    Returns:
        Each run, with its results, or the error that ended it; the others then go on.

    Raises:
        UserError: the runs cannot share a pass.
    """
    shared = None
    if len(configs) > 1:
        check_sharing(configs)
        backbone, identity = build_backbone(configs[0].backbone)
        shared = RecordedBackbone(backbone), identity
    runs = [build_run(config, folder, backbone=shared) for config, folder in zip(configs, folders, strict=True)]
    turns, outcomes = Turns(len(runs)), list[TrainingRun | BaseException](runs)
    batches = [
        SharedBatches(loader(), len(runs)) for loader in (runs[0].data.train_dataloader, runs[0].data.val_dataloader)
    ]

    def work(member: int, run: TrainingRun) -> None:
        try:
            turns.wait(member)
            loaders = SharedData(*batches)
            run.trainer.fit(run.lightning_module, loaders)
            evaluate_last_step(run, loaders)
        except BaseException as error:  # of one member: the others go on
            outcomes[member] = error
        finally:
            for one in batches:
                one.readers -= 1
            turns.end(member, done=True)

    threads = []
    for member, run in enumerate(runs):
        others = [one for one in cast(Any, run.trainer).callbacks if not isinstance(one, ONE_RUN_CALLBACKS)]
        cast(Any, run.trainer).callbacks = [*others, TurnTaking(turns, member, shared and shared[0], progress)]
        threads.append(threading.Thread(target=work, args=(member, run), daemon=True))
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        turns.stopped = True
        for thread in threads:
            thread.join()
        raise
    return outcomes


def check_sharing(configs: Sequence[RunConfig]) -> None:
    """Check that runs can share a pass.

    Raises:
        UserError: an option that the backbone or the data depend on differs, or a method changes the backbone.
    """
    first = to_dict(configs[0])
    for config in configs:
        if not METHODS[config.adapter.name].shares_backbone:
            raise UserError(
                f"adapter={config.adapter.name}: changes the backbone's activations, so it cannot share a pass"
            )
        other = to_dict(config)
        for key in SHARED_OPTIONS:
            if first[key] != other[key]:
                raise UserError(f"{key}: runs that share a pass of the backbone must have the same")
