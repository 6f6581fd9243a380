"""Steps that go wrong: losses that are NaN or infinite, and batches that memory does not suffice for."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812 (Lightning's own alias)
import torch
import torch.distributed as dist
from torch import Tensor

from e3va_cli.errors import UserError
from e3va_cli.files import write_json
from e3va_cli.machine import is_out_of_memory
from e3va_cli.text import first_few
from e3va_cli.training.ranks import raise_on_all
from e3va_cli.training.steps import Seen

RECORDED = 1000  # bad batches that the file holds at most
IMAGES_SHOWN = 8


class StepGuard:
    """Leaves out steps that went wrong, notes their batches, and ends the run when too many follow each other.

    Args:
        path: of the notes, JSON.
        limit: steps left out in a row that end the run; None for no end.
        skip_oom: leave out a step whose batch does not fit into memory, too.
    """

    def __init__(self, path: Path, limit: int | None, *, skip_oom: bool) -> None:
        self.path, self.limit, self.skip_oom = path, limit, skip_oom
        self.in_a_row = 0

    def skips(self, error: BaseException) -> bool:
        """Whether a step that ended with `error` is to be left out."""
        return self.skip_oom and is_out_of_memory(error)

    def admit(self, trainer: L.Trainer, seen: list[Seen], gradient_norm: Tensor) -> bool:
        """Whether a step may change the weights.

        Its losses must be finite, and so must its gradient, except where a gradient scaler looks for its own scale.

        Raises:
            UserError: this was the last step of too many.
        """
        bad = not all(self._is_good(batch) for batch in seen)
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            bad = bad or not gradient_norm.isfinite()
        if not trainer.strategy.reduce_boolean_decision(bad, all=False):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what a failed batch had taken, in pieces of its own sizes
        entries = self._note(trainer, seen, gradient_norm)
        self._report(trainer, entries)
        return False

    @staticmethod
    def _is_good(batch: Seen) -> bool:
        return bool(batch.losses) and bool(batch.losses["loss"].isfinite())

    def _note(self, trainer: L.Trainer, seen: list[Seen], gradient_norm: Tensor) -> list[dict[str, Any]]:
        """Put the bad batches of all processes on file; where only the gradient is bad, all batches of the step."""
        bad = [batch for batch in seen if not self._is_good(batch)]
        if trainer.world_size == 1 and not bad:
            bad = seen
        entries = [
            {
                "step": trainer.global_step,
                "epoch": trainer.current_epoch,
                "image_ids": batch.image_ids,
                "image_sizes": batch.image_sizes,
                "out_of_memory": not batch.losses,
                "losses": {name: _number(value) for name, value in batch.losses.items()},
                "gradient_norm": _number(gradient_norm),
            }
            for batch in bad
        ]
        if trainer.world_size > 1:
            shares: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(shares, entries)
            entries = [entry for share in shares for entry in share]
        if trainer.is_global_zero:
            before = json.loads(self.path.read_text()) if self.path.is_file() else []
            write_json(self.path, (before + entries)[-RECORDED:])
        return entries

    def _report(self, trainer: L.Trainer, entries: list[dict[str, Any]]) -> None:
        """One line, and the end of the run at the limit."""
        memory = any(entry["out_of_memory"] for entry in entries)
        what = "memory did not suffice" if memory else "the loss or its gradient is not finite"
        ids = [number for entry in entries for number in entry["image_ids"]]
        where = f"step {trainer.global_step:,}: {what} (images {first_few(ids, IMAGES_SHOWN)})"
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
            f"{where}; the run ends, as this makes {self.in_a_row} steps in a row (trainer.max_bad_losses); "
            f"the batches are listed in {self.path}; {advice}"
        )
        raise_on_all(trainer, error)


def _number(value: Tensor) -> float | str:
    """A number that JSON has, or the name of one that it has not."""
    number = float(value)
    return number if math.isfinite(number) else str(number)
