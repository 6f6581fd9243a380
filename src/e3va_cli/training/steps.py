"""Where an optimizer step ends, what went into it, and how many there may be."""

from __future__ import annotations

from dataclasses import dataclass, field

import lightning as L  # noqa: N812 (Lightning's own alias)
from torch import Tensor

from e3va_cli.data.collate import Batch


def is_optimizer_step(trainer: L.Trainer) -> bool:
    """Whether the batch at hand ends an optimizer step; batches whose gradients are accumulated before do not."""
    return not trainer.fit_loop._should_accumulate()


@dataclass
class BatchRecord:
    """A batch that went into a step.

    Attributes:
        image_ids: the data set's own.
        image_sizes: (height, width) of each image without its padding.
        losses: by name, `loss` being their sum; empty until they are known, and where the step ran out of memory.
    """

    image_ids: list[int]
    image_sizes: list[tuple[int, int]]
    losses: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Batch) -> BatchRecord:
        """What is to be remembered of a batch."""
        return cls([target["image_id"] for target in batch.targets], batch.image_sizes)


class StepLimit(L.Callback):
    """Ends a run after a count of steps.

    Lightning is told only once a checkpoint has been read: with a limit from the start, it takes the end of an epoch
    that it resumes for its middle, and counts that epoch twice.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the limit."""
        trainer.fit_loop.epoch_loop.max_steps = self.steps
