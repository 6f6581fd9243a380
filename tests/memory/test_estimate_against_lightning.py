"""Estimates against a step of `trainer.fit`, with real tensors on a CPU."""

import lightning as L  # noqa: N812 (Lightning's own alias)
import pytest
from torch.utils.data import DataLoader

from e3va_cli.memory.benchmark import BenchmarkSpec
from e3va_cli.memory.module_groups import module_groups
from e3va_cli.memory.rois import add_matching_proposals
from e3va_cli.memory.step import StepSize, batch_tensors, optimizer_tensors, random_batch
from e3va_cli.memory.tracker import StorageTracker
from e3va_cli.training.run import build_run

TOLERANCE = 0.01  # 0.001 % in float32, 0.7 % in bfloat16


class TrackStep(L.Callback):
    """Track the last step, which has the optimizer's state."""

    def __init__(self, last_batch):
        self.last_batch, self.tracker = last_batch, StorageTracker()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.last_batch:
            self.tracker.track(batch_tensors(batch), "batch")
            self.tracker.track(optimizer_tensors(trainer.optimizers[0]), "optimizer")
            self.model_hooks = self.tracker.track_model(pl_module.model, module_groups)
            self.model_hooks.__enter__()
            self.tracker.__enter__()
            self.tracker.reset_peak()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.last_batch:
            self.tracker.__exit__(None, None, None)
            self.model_hooks.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("method", "precision", "accumulated"),
    [("full", "32", 1), ("full", "bf16-mixed", 2), ("e3va", "32", 2), ("e3va", "bf16-mixed", 1)],
)
def test_peak_is_that_of_a_step_under_lightning(config, tmp_path, method, precision, accumulated):
    batches = 2 * accumulated
    size = StepSize(2, (128, 160), 6, precision, clip_norm=1.0, accumulates=accumulated > 1)
    options = config(
        *(f"adapter={method}", "backbone=swin_nano", "head=mask_rcnn_nano", "trainer.limit_val_batches=0"),
        *(f"trainer.precision={precision}", "trainer.accelerator=cpu", "trainer.tensorboard=false"),
        *(f"trainer.accumulate_grad_batches={accumulated}", "trainer.max_epochs=null", "trainer.max_steps=2"),
    )
    run = build_run(options, tmp_path)
    (module,) = (part for part in vars(run).values() if isinstance(part, L.LightningModule))
    classes = len(run.val.classes)
    batch = random_batch(size, num_classes=classes, target_types=run.model.head.target_types)
    for number, target in enumerate(batch.targets):
        target["image_id"] = number
    track = TrackStep(batches - 1)
    run.trainer.callbacks.append(track)
    with add_matching_proposals(run.model):
        run.trainer.fit(module, DataLoader([batch] * batches, batch_size=None))
    estimate = BenchmarkSpec(size, classes, "cpu", warmup=0, repeats=0).estimate(options)
    assert track.tracker.peak.total_bytes == pytest.approx(estimate.peak.total_bytes, rel=TOLERANCE)
