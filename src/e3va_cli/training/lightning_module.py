"""Training and evaluation of a model, as Lightning runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import lightning as L  # noqa: N812 (Lightning's own alias)
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from e3va_cli.data.collate import Batch
from e3va_cli.data.sampling import derive_seed
from e3va_cli.evaluation import Evaluator
from e3va_cli.models.model import DenseModel
from e3va_cli.models.train_step import clip_gradients, compute_losses
from e3va_cli.optim.lr_schedules import Factor
from e3va_cli.training.checkpoint_callback import CheckpointCallback
from e3va_cli.training.nonfinite_guard import BatchRecord
from e3va_cli.utils.environment import is_out_of_memory


class EvalModel(Protocol):
    """Interface of a model for evaluation: a `DenseModel`, or several models combined into one."""

    def predict(self, images: Tensor, image_sizes: list[tuple[int, int]]) -> Sequence[Any]:
        """Return the predictions for each image: uint8 (B, 3, H, W) padded from `image_sizes`."""
        ...


class DenseLightningModule(L.LightningModule):
    """Minimizes the losses of a model's head, and evaluates its predictions on the validation images.

    Args:
        model: the network; a `DenseModel` for training.
        evaluator: compares predictions with the annotations of the validation images.
        optimizer: builds the optimizer of a model.
        schedule: factor of the learning rate at each step; None where only evaluation is wanted.
        seed: of the random numbers that a step draws, such as those that sample proposals.
        skip_oom: skip a batch that runs out of memory instead of raising the error.

    Attributes:
        batch_records: the batches of the current optimizer step, or the current one of an evaluation.
        evaluating: whether the last batch was one of an evaluation.
        gradient_norm: of the last step before clipping, as measured by `NonFiniteGuard`.
        results: of the last evaluation.
        evaluated_step: number of optimizer steps before the last evaluation.
    """

    strict_loading = False  # a checkpoint has only the trainable weights

    def __init__(
        self,
        model: EvalModel,
        evaluator: Evaluator,
        *,
        optimizer: Callable[[DenseModel], Optimizer],
        schedule: Factor | None,
        seed: int,
        skip_oom: bool = False,
    ) -> None:
        super().__init__()
        self.model: EvalModel = model
        self.evaluator = evaluator
        self.build_optimizer, self.schedule = optimizer, schedule
        self.seed, self.skip_oom = seed, skip_oom
        self.batch_records: list[BatchRecord] = []
        self.evaluating = False
        self.gradient_norm: Tensor | None = None
        self.results: dict[str, Any] | None = None
        self.evaluated_step = -1

    @property
    def dense_model(self) -> DenseModel:
        """Return the model, which must be a `DenseModel`."""
        assert isinstance(self.model, DenseModel)
        return self.model

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its schedule, which counts steps."""
        assert self.schedule is not None
        optimizer = self.build_optimizer(self.dense_model)
        scheduler = LambdaLR(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed PyTorch by (seed, epoch, batch, rank), so that a resumed run draws the same random numbers."""
        self.evaluating = False
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.batch_records.clear()
        self.batch_records.append(BatchRecord.of(batch))
        torch.manual_seed(derive_seed(self.seed, self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Return the sum of the losses; None if the batch is out of memory and skipped."""
        try:
            losses = compute_losses(self.dense_model, batch)
        except (RuntimeError, MemoryError) as error:
            if not (self.skip_oom and is_out_of_memory(error)):
                raise
            return None
        self.batch_records[-1].losses = {name: value.detach() for name, value in losses.items()}
        return losses["loss"]

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run the backward pass, and forget the losses of a batch that is out of memory and skipped."""
        try:
            super().backward(loss, *args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if not (self.skip_oom and is_out_of_memory(error)):
                raise
            self.batch_records[-1].losses.clear()

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step and drop the gradients, which Lightning would keep through the next forward pass.

        A closure without a loss tells Lightning that the backward pass failed, so that a gradient scaler is not used.
        """
        assert optimizer_closure is not None

        def loss() -> Any:
            value = optimizer_closure()
            return value if self.batch_records[-1].losses else None

        super().optimizer_step(epoch, batch_idx, optimizer, loss)
        optimizer.zero_grad()

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the norm of the gradients. Lightning's own method refuses fused optimizers with 16-mixed precision."""
        assert self.gradient_norm is not None
        clip_gradients(optimizer, gradient_clip_val, self.gradient_norm)

    def step_metrics(self) -> dict[str, Tensor]:
        """Return the mean of each loss over the batches of the current step, and the norm of its gradient."""
        losses = [batch.losses for batch in self.batch_records if batch.losses]
        names = losses[0] if losses else ()
        means = {f"train/{name}": torch.stack([of_batch[name] for of_batch in losses]).mean() for name in names}
        return means if self.gradient_norm is None else {**means, "train/grad_norm": self.gradient_norm}

    def on_validation_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Record the batch, for error messages."""
        self.evaluating = True
        self.batch_records = [BatchRecord.of(batch)]

    def on_validation_epoch_start(self) -> None:
        """Reset the evaluator."""
        self.evaluator.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Predict and update the evaluator. A training run first saves the state that its evaluation starts from."""
        if batch_idx == 0 and isinstance(self.trainer.checkpoint_callback, CheckpointCallback):
            self.trainer.checkpoint_callback.on_evaluation_start(self.trainer)
        predictions = self.model.predict(batch.images, batch.image_sizes)
        for prediction, target in zip(predictions, batch.targets, strict=True):
            self.evaluator.update(prediction, target)

    def on_validation_epoch_end(self) -> None:
        """Compute the results of all ranks on rank 0, where their predictions are merged, and broadcast them."""
        results: list[Any] = [None]
        if dist.is_available() and dist.is_initialized():
            shares: list[Any] | None = [None] * dist.get_world_size() if self.trainer.is_global_zero else None
            dist.gather_object(self.evaluator.state(), shares)
            if shares is not None:
                self.evaluator.merge(shares)
                results = [self.evaluator.compute()]
            dist.broadcast_object_list(results)
        else:
            results = [self.evaluator.compute()]
        self.results = results[0]
        assert self.results is not None
        self.evaluated_step = self.global_step
        for name, value in self.evaluator.log_dict(self.results).items():
            self.log(f"val/{name}", value, prog_bar=name == self.evaluator.monitor, rank_zero_only=False)
