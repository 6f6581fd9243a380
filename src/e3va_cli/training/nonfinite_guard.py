"""Steps that are skipped: losses or gradients that are NaN or infinite, and batches that run out of memory."""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812 (Lightning's own alias)
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from e3va_cli.data.collate import Batch
from e3va_cli.errors import UserError
from e3va_cli.models.train_step import gradient_norm
from e3va_cli.training.lightning_private import optimizer_handles_unscaling
from e3va_cli.training.process_watchdog import raise_on_all_ranks
from e3va_cli.utils.environment import DeviceEvent
from e3va_cli.utils.files import write_json
from e3va_cli.utils.output import log
from e3va_cli.utils.text import truncate_list

MAX_ENTRIES = 1000  # of the file
IMAGES_SHOWN = 8
LAG = 2  # steps after which a flag of a fused step is read: a GPU is rarely further behind


@dataclass
class BatchRecord:
    """A batch of the current step.

    Attributes:
        image_ids: of the data set.
        image_sizes: (height, width) of each image without padding.
        losses: by name, `loss` being their sum; empty before they are computed, and if the batch ran out of memory.
    """

    image_ids: list[int]
    image_sizes: list[tuple[int, int]]
    losses: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Batch) -> BatchRecord:
        """Return the record of a batch, without losses."""
        return cls([target["image_id"] for target in batch.targets], batch.image_sizes)


@dataclass(frozen=True)
class PendingStep:
    """A step of which the host does not know yet whether it was skipped.

    Attributes:
        number: of optimizer steps before it.
        epoch: counted from 1.
        batches: of the step.
        gradient_norm: before clipping.
        skipped: the flag, being copied to the host.
        copied: when the copy is complete.
    """

    number: int
    epoch: int
    batches: list[BatchRecord]
    gradient_norm: Tensor
    skipped: Tensor
    copied: DeviceEvent


class NonFiniteGuard(L.Callback):
    """Skips optimizer steps with NaN or infinite losses or gradients, and ends the run after too many in a row.

    A fused optimizer skips the step on the device, without synchronization: whether it did is read and reported two
    steps later. Other optimizers are checked on the host at once. The batches of skipped steps are written to a file.

    Args:
        path: of the file, JSON.
        max_in_a_row: skipped steps in a row that end the run; None for no limit.
    """

    def __init__(self, path: Path, max_in_a_row: int | None) -> None:
        self.path, self.max_in_a_row = path, max_in_a_row
        self.in_a_row = 0
        self.pending: deque[PendingStep] = deque()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        """Measure the gradient norm, and have the optimizer skip a step whose losses or gradients are not finite.

        With a gradient scaler only the losses are checked: the scaler itself skips gradients that are not finite, while
        it looks for its scale.

        Raises:
            UserError: too many steps in a row were skipped.
        """
        batches, device = pl_module.batch_records, pl_module.device
        fused = optimizer_handles_unscaling(optimizer)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        skip = torch.stack([_is_bad(batch, device) for batch in batches]).any()
        if scaler is None:
            pl_module.gradient_norm = gradient_norm(optimizer)
            skip = skip | ~pl_module.gradient_norm.isfinite()
        if trainer.world_size > 1:
            flag = skip.to(torch.uint8)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            skip = flag.bool()
        if scaler is not None:
            if fused and batches[-1].losses:
                # Lightning leaves unscaling to the step of a fused optimizer, but clipping comes before it.
                gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
                for gradient in gradients[:1]:
                    gradient.add_(torch.where(skip, torch.nan, 0.0))  # the scaler then skips the step
                scaler.unscale_(optimizer)
            pl_module.gradient_norm = gradient_norm(optimizer)
        if any(not batch.losses for batch in batches) and torch.cuda.is_available():
            torch.cuda.empty_cache()  # blocks of the sizes of the failed batch
        if fused and scaler is None:
            optimizer.found_inf = skip.float()  # type: ignore[attr-defined]  # as a gradient scaler sets it
        elif not fused and skip:
            optimizer.zero_grad()  # sets gradients to None, and AdamW skips parameters without one
        on_host = skip.to("cpu", non_blocking=fused)
        number, epoch, norm = trainer.global_step, trainer.current_epoch + 1, pl_module.gradient_norm
        self.pending.append(PendingStep(number, epoch, list(batches), norm, on_host, DeviceEvent(skip.device)))
        self.read_pending(trainer, lag=LAG if fused else 0)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Read all pending steps, so that a run that ends does not save its state first."""
        self.read_pending(trainer)

    def read_pending(self, trainer: L.Trainer, *, lag: int = 0) -> None:
        """Read whether all steps but the last `lag` were skipped, and report those that were.

        Raises:
            UserError: too many steps in a row were skipped.
        """
        while len(self.pending) > lag:
            step = self.pending.popleft()
            step.copied.synchronize()
            if step.skipped:
                self.in_a_row += 1
                self._report(trainer, step, self._record(trainer, step))
            else:
                self.in_a_row = 0

    def _record(self, trainer: L.Trainer, step: PendingStep) -> list[dict[str, Any]]:
        """Write the bad batches of all ranks to the file and return them; all batches if only the gradient is bad."""
        bad = [batch for batch in step.batches if _is_bad(batch, step.gradient_norm.device)]
        if trainer.world_size == 1 and not bad:
            bad = step.batches
        entries = [
            {
                "step": step.number,
                "epoch": step.epoch,
                "image_ids": batch.image_ids,
                "image_sizes": batch.image_sizes,
                "out_of_memory": not batch.losses,
                "losses": {name: _to_json(value) for name, value in batch.losses.items()},
                "gradient_norm": _to_json(step.gradient_norm),
            }
            for batch in bad
        ]
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(gathered, entries)
            entries = [entry for of_rank in gathered for entry in of_rank]
        if trainer.is_global_zero:
            before = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else []
            write_json(self.path, (before + entries)[-MAX_ENTRIES:])
        return entries

    def _report(self, trainer: L.Trainer, step: PendingStep, entries: list[dict[str, Any]]) -> None:
        """Warn of a skipped step; at the limit, end the run."""
        out_of_memory = any(entry["out_of_memory"] for entry in entries)
        reason = "out of memory" if out_of_memory else "the loss or its gradient is not finite"
        ids = [number for entry in entries for number in entry["image_ids"]]
        message = f"step {step.number:,}: {reason} (images {truncate_list(ids, IMAGES_SHOWN)})"
        if self.max_in_a_row is None or self.in_a_row < self.max_in_a_row:
            if trainer.is_global_zero:
                log.warning(f"{message}; skipped, {self.in_a_row} in a row")
            return
        advice = (
            "lower data.batch_size"
            if out_of_memory
            else "lower optimizer.lr, use trainer.precision=32 or bf16-mixed, or check the data with e3va check-data"
        )
        error = UserError(
            f"{message}; training stopped after {self.in_a_row} skipped steps in a row (trainer.max_nonfinite_steps); "
            f"their batches are in {self.path}; {advice}"
        )
        raise_on_all_ranks(trainer, error)


def _is_bad(batch: BatchRecord, device: torch.device) -> Tensor:
    """Return whether the loss of a batch is missing, NaN or infinite, without synchronization."""
    if not batch.losses:
        return torch.ones((), dtype=torch.bool).to(device, non_blocking=True)
    return ~batch.losses["loss"].isfinite()


def _to_json(value: Tensor) -> float | str:
    """Return a scalar as a number, or NaN and infinity, which JSON lacks, as a string."""
    number = float(value)
    return number if math.isfinite(number) else str(number)
