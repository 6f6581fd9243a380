"""Training and evaluation of a model, as Lightning runs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L  # noqa: N812 (Lightning's own alias)
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from e3va_cli.data.batch import Batch
from e3va_cli.data.sampling import mix
from e3va_cli.metrics import Evaluator
from e3va_cli.model import DenseModel
from e3va_cli.training.checkpoints import ABOUT, trained_state
from e3va_cli.training.schedules import Factor


class DenseTask(L.LightningModule):
    """Minimises the head's losses; measures its findings on the validation images.

    Args:
        model: the network.
        evaluator: measures findings against the validation split's ground truth.
        optimizer: builds the optimizer of a model.
        schedule: the learning rate's factor at each step.
        about: what the checkpoints belong to.
        seed: of what is random inside a step, such as the sampling of proposals.
    """

    strict_loading = False  # checkpoints hold what was trained, and that is all that is loaded

    def __init__(
        self,
        model: DenseModel,
        evaluator: Evaluator,
        *,
        optimizer: Callable[[DenseModel], Optimizer],
        schedule: Factor | None,
        about: dict[str, Any],
        seed: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.evaluator = evaluator
        self.build_optimizer, self.schedule = optimizer, schedule
        self.about, self.seed = about, seed
        self.results: dict[str, Any] | None = None  # of the last evaluation
        self.evaluated_step = -1

    def configure_optimizers(self) -> Any:
        """The optimizer with its schedule, counted in steps."""
        assert self.schedule is not None
        optimizer = self.build_optimizer(self.model)
        scheduler = LambdaLR(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Losses of a batch, by name."""
        return self.model.losses(batch.images, batch.image_sizes, batch.targets)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Draw what is random in a step from (seed, epoch, batch, rank) alone, so that a resumed run repeats it."""
        torch.manual_seed(mix(self.seed, self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The sum of the head's losses."""
        losses = self.model.losses(batch.images, batch.image_sizes, batch.targets)
        total = torch.stack(list(losses.values())).sum()
        self.log("loss", total, prog_bar=True, logger=False, batch_size=len(batch))
        logged = {"train/loss": total} | {f"train/{name}": value for name, value in losses.items()}
        self.log_dict(logged, batch_size=len(batch))
        return total

    def on_validation_epoch_start(self) -> None:
        """Forget the last evaluation."""
        self.evaluator.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Note what is found."""
        found = self.model.predict(batch.images, batch.image_sizes)
        for of_image, target in zip(found, batch.targets, strict=True):
            self.evaluator.update(of_image, target)

    def on_validation_epoch_end(self) -> None:
        """Measure the findings of all ranks together; every rank learns the result."""
        if dist.is_available() and dist.is_initialized():
            shares: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(shares, self.evaluator.share())
            self.evaluator.gather(shares)
        self.results = self.evaluator.compute()
        self.evaluated_step = self.global_step
        for name, value in self.evaluator.scores(self.results).items():
            self.log(f"val/{name}", value, prog_bar=name == self.evaluator.monitor, rank_zero_only=False)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What was trained, nothing else."""
        return {f"model.{name}": value for name, value in trained_state(self.model).items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what the checkpoint belongs to."""
        checkpoint[ABOUT] = self.about
