"""Training and evaluation of a model, as Lightning runs them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning as L  # noqa: N812 (Lightning's own alias)
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision.amp import _optimizer_handles_unscaling
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from e3va_cli.data.collate import Batch
from e3va_cli.data.sampling import mix
from e3va_cli.evaluation import Evaluator
from e3va_cli.models.model import DenseModel
from e3va_cli.optim.lr_schedules import Factor
from e3va_cli.optim.optimizer import set_fused, update_options
from e3va_cli.training.checkpoint_callback import CheckpointCallback
from e3va_cli.training.checkpoints import FINGERPRINTS_KEY, METADATA_KEY, trainable_state_dict
from e3va_cli.training.nonfinite_guard import NonFiniteGuard
from e3va_cli.training.steps import BatchRecord


class DenseLightningModule(L.LightningModule):
    """Minimises the head's losses; measures its findings on the validation images.

    Args:
        model: the network.
        evaluator: measures findings against the validation split's ground truth.
        optimizer: builds the optimizer of a model.
        schedule: the learning rate's factor at each step.
        metadata: what the checkpoints belong to.
        seed: of what is random inside a step, such as the sampling of proposals.
        guard: decides whether a step may change the weights.
        data: the fingerprint of each split, for the checkpoints.
    """

    strict_loading = False  # checkpoints hold what was trained, and that is all that is loaded

    def __init__(
        self,
        model: DenseModel,
        evaluator: Evaluator,
        *,
        optimizer: Callable[[DenseModel], Optimizer],
        schedule: Factor | None,
        metadata: dict[str, Any],
        seed: int,
        guard: NonFiniteGuard,
        data: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.evaluator = evaluator
        self.build_optimizer, self.schedule = optimizer, schedule
        self.metadata, self.seed = metadata, seed
        self.guard = guard
        self.data = data or {}
        self.seen: list[BatchRecord] = []  # the batches of the current step
        self.evaluating = False  # whether the last batch was one of an evaluation
        self.gradient_norm = torch.zeros(())  # of that step, before clipping
        self.results: dict[str, Any] | None = None  # of the last evaluation
        self.evaluated_step = -1

    def configure_optimizers(self) -> Any:
        """The optimizer with its schedule, counted in steps."""
        assert self.schedule is not None
        optimizer = self.build_optimizer(self.model)
        scheduler = LambdaLR(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Draw what is random in a step from (seed, epoch, batch, rank) alone, so that a resumed run repeats it."""
        self.evaluating = False
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.seen.clear()
        self.seen.append(BatchRecord.of(batch))
        torch.manual_seed(mix(self.seed, self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """The sum of the head's losses; None where memory does not suffice and the step is to be left out."""
        try:
            losses = self.model.losses(batch.images, batch.image_sizes, batch.targets)
        except (RuntimeError, MemoryError) as error:
            if not self.guard.skips(error):
                raise
            return None
        total = torch.stack(list(losses.values())).sum()
        self.seen[-1].losses = {name: value.detach() for name, value in {"loss": total, **losses}.items()}
        return total

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """As Lightning does, unless memory does not suffice and the step is to be left out."""
        try:
            super().backward(loss, *args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if not self.guard.skips(error):
                raise
            self.seen[-1].losses.clear()

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """As Lightning does; a gradient scaler is not shown a backward pass that was broken off.

        The gradients go right after the step. Lightning would hold them through the next forward pass.
        """
        assert optimizer_closure is not None

        def loss() -> Any:
            value = optimizer_closure()
            return value if self.seen[-1].losses else None

        super().optimizer_step(epoch, batch_idx, optimizer, loss)
        optimizer.zero_grad()

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip to a norm, and note what it was; a step that went wrong changes no weight."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        bad = self.guard.bad_losses(self.seen, self.device)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and _optimizer_handles_unscaling(optimizer) and self.seen[-1].losses:
            # Lightning leaves unscaling to a fused optimizer's step, which comes after clipping. The scaler leaves
            # the step out on the device if it finds a gradient that is not finite.
            for gradient in [p.grad for p in parameters if p.grad is not None][:1]:
                gradient.add_(torch.where(bad, torch.nan, 0.0))
            scaler.unscale_(optimizer)
        limit = math.inf if gradient_clip_val is None else gradient_clip_val
        self.gradient_norm = clip_grad_norm_(parameters, limit)
        self.guard.check(self.trainer, optimizer, self.seen, bad, self.gradient_norm)

    def measured(self) -> dict[str, Tensor]:
        """What the current step measured: the mean of each loss over its batches, and the gradient's norm."""
        losses = [batch.losses for batch in self.seen if batch.losses]
        names = losses[0] if losses else ()
        means = {f"train/{name}": torch.stack([of_batch[name] for of_batch in losses]).mean() for name in names}
        return {**means, "train/grad_norm": self.gradient_norm}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the kind of optimizer that suits this device, and with the options of this run."""
        assert self.schedule is not None
        fresh = self.build_optimizer(self.model)
        states = zip(checkpoint.get("optimizer_states", []), checkpoint.get("lr_schedulers", []), strict=False)
        for state, scheduler in states:
            set_fused(state, self.trainer.strategy.root_device)
            update_options(state, scheduler, fresh, self.schedule)

    def on_validation_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Remember what is at hand."""
        self.evaluating = True
        self.seen = [BatchRecord.of(batch)]

    def on_validation_epoch_start(self) -> None:
        """Forget the last evaluation."""
        self.evaluator.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Note what is found; in a training run, keep the state of its beginning first."""
        if batch_idx == 0 and isinstance(self.trainer.checkpoint_callback, CheckpointCallback):
            self.trainer.checkpoint_callback.before_evaluation(self.trainer)
        found = self.model.predict(batch.images, batch.image_sizes)
        for of_image, target in zip(found, batch.targets, strict=True):
            self.evaluator.update(of_image, target)

    def on_validation_epoch_end(self) -> None:
        """Measure the predictions of all processes on the first one, which alone holds them; all get the result."""
        results: list[Any] = [None]
        if dist.is_available() and dist.is_initialized():
            shares: list[Any] | None = [None] * dist.get_world_size() if self.trainer.is_global_zero else None
            dist.gather_object(self.evaluator.share(), shares)
            if shares is not None:
                self.evaluator.gather(shares)
                results = [self.evaluator.compute()]
            dist.broadcast_object_list(results)
        else:
            results = [self.evaluator.compute()]
        self.results = results[0]
        assert self.results is not None
        self.evaluated_step = self.global_step
        for name, value in self.evaluator.scores(self.results).items():
            self.log(f"val/{name}", value, prog_bar=name == self.evaluator.monitor, rank_zero_only=False)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What was trained, nothing else."""
        return {f"model.{name}": value for name, value in trainable_state_dict(self.model).items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what the checkpoint belongs to, once it is known that the run goes on."""
        self.guard.settle(self.trainer)
        checkpoint[METADATA_KEY] = self.metadata
        checkpoint[FINGERPRINTS_KEY] = self.data
