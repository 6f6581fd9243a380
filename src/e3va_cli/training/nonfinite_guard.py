"""Steps that go wrong: losses that are NaN or infinite, and batches that memory does not suffice for."""

from __future__ import annotations

import json
import math
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812 (Lightning's own alias)
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision.amp import _optimizer_handles_unscaling
from torch import Tensor
from torch.optim import Optimizer

from e3va_cli.errors import UserError
from e3va_cli.training.process_watchdog import raise_on_all_ranks
from e3va_cli.training.steps import BatchRecord
from e3va_cli.utils.environment import Moment, is_out_of_memory
from e3va_cli.utils.files import write_json
from e3va_cli.utils.text import truncate_list

RECORDED = 1000  # bad batches that the file holds at most
IMAGES_SHOWN = 8
LAG = 2  # steps after which a GPU has long come to what is read of a step


@dataclass(frozen=True)
class CheckedStep:
    """A step whose weights were left alone if it went wrong, which is not known here before it is read.

    Attributes:
        number: of the optimizer step.
        epoch: that it is in, from 1.
        batches: that went into it.
        gradient_norm: before clipping.
        bad: whether it went wrong, on its way to the host.
        arrived: when `bad` is there.
    """

    number: int
    epoch: int
    batches: list[BatchRecord]
    gradient_norm: Tensor
    bad: Tensor
    arrived: Moment


class NonFiniteGuard:
    """Leaves out steps that went wrong, notes their batches, and ends the run when too many follow each other.

    A fused optimizer leaves a step out on the device, so that no step waits for it; what happened is read, and said,
    two steps later. Otherwise it is known at once.

    Args:
        path: of the notes, JSON.
        limit: steps left out in a row that end the run; None for no end.
        skip_oom: leave out a step whose batch does not fit into memory, too.
    """

    def __init__(self, path: Path, limit: int | None, *, skip_oom: bool) -> None:
        self.path, self.limit, self.skip_oom = path, limit, skip_oom
        self.in_a_row = 0
        self.unread: deque[CheckedStep] = deque()

    def skips(self, error: BaseException) -> bool:
        """Whether a step that ended with `error` is to be left out."""
        return self.skip_oom and is_out_of_memory(error)

    def bad_losses(self, seen: list[BatchRecord], device: torch.device) -> Tensor:
        """Return whether a loss of the step is not finite, or missing because the step ran out of memory."""
        return torch.stack([self._is_bad(batch, device) for batch in seen]).any()

    def check(
        self, trainer: L.Trainer, optimizer: Optimizer, seen: list[BatchRecord], bad: Tensor, gradient_norm: Tensor
    ) -> None:
        """Keep a step that went wrong from changing the weights.

        Its losses must be finite, and so must its gradient, except where a gradient scaler looks for its own scale.

        Args:
            bad: the step's `bad_losses`.

        Raises:
            UserError: this step, or one before it, was the last of too many.
        """
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if not scaled:
            bad = bad | ~gradient_norm.isfinite()
        if trainer.world_size > 1:
            flag = bad.to(torch.uint8)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            bad = flag.bool()
        if any(not batch.losses for batch in seen) and torch.cuda.is_available():
            torch.cuda.empty_cache()  # what a failed batch had taken, in pieces of its own sizes
        fused = _optimizer_handles_unscaling(optimizer)
        if fused and not scaled:
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # as a gradient scaler would say it
        elif not fused and bad:
            optimizer.zero_grad()  # sets to None, which AdamW passes over
        on_host = bad.to("cpu", non_blocking=fused)
        arrived = Moment(bad.device)
        step = CheckedStep(trainer.global_step, trainer.current_epoch + 1, list(seen), gradient_norm, on_host, arrived)
        self.unread.append(step)
        self.settle(trainer, lag=LAG if fused else 0)

    def settle(self, trainer: L.Trainer, *, lag: int = 0) -> None:
        """Read of all steps but the last `lag` whether they went wrong, and say so of those that did.

        Raises:
            UserError: one of them was the last of too many.
        """
        while len(self.unread) > lag:
            step = self.unread.popleft()
            step.arrived.wait()
            if step.bad:
                self.in_a_row += 1
                self._report(trainer, step, self._note(trainer, step))
            else:
                self.in_a_row = 0

    @staticmethod
    def _is_bad(batch: BatchRecord, device: torch.device) -> Tensor:
        if not batch.losses:
            return torch.ones((), dtype=torch.bool).to(device, non_blocking=True)
        return ~batch.losses["loss"].isfinite()

    def _note(self, trainer: L.Trainer, step: CheckedStep) -> list[dict[str, Any]]:
        """Put the bad batches of all processes on file; where only the gradient is bad, all batches of the step."""
        bad = [batch for batch in step.batches if self._is_bad(batch, step.gradient_norm.device)]
        if trainer.world_size == 1 and not bad:
            bad = step.batches
        entries = [
            {
                "step": step.number,
                "epoch": step.epoch,
                "image_ids": batch.image_ids,
                "image_sizes": batch.image_sizes,
                "out_of_memory": not batch.losses,
                "losses": {name: _number(value) for name, value in batch.losses.items()},
                "gradient_norm": _number(step.gradient_norm),
            }
            for batch in bad
        ]
        if trainer.world_size > 1:
            shares: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(shares, entries)
            entries = [entry for share in shares for entry in share]
        if trainer.is_global_zero:
            before = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else []
            write_json(self.path, (before + entries)[-RECORDED:])
        return entries

    def _report(self, trainer: L.Trainer, step: CheckedStep, entries: list[dict[str, Any]]) -> None:
        """One line, and the end of the run at the limit."""
        memory = any(entry["out_of_memory"] for entry in entries)
        what = "out of memory" if memory else "the loss or its gradient is not finite"
        ids = [number for entry in entries for number in entry["image_ids"]]
        where = f"step {step.number:,}: {what} (images {truncate_list(ids, IMAGES_SHOWN)})"
        if self.limit is None or self.in_a_row < self.limit:
            if trainer.is_global_zero:
                print(f"e3va: warning: {where}; left out, {self.in_a_row} in a row", file=sys.stderr, flush=True)
            return
        advice = (
            "lower data.batch_size"
            if memory
            else "lower optimizer.lr, use trainer.precision=32 or bf16-mixed, or look for what e3va check-data says"
        )
        error = UserError(
            f"{where}; the run ends, as this makes {self.in_a_row} steps in a row (trainer.max_nonfinite_steps); "
            f"the batches are listed in {self.path}; {advice}"
        )
        raise_on_all_ranks(trainer, error)


def _number(value: Tensor) -> float | str:
    """A number that JSON has, or the name of one that it has not."""
    number = float(value)
    return number if math.isfinite(number) else str(number)
