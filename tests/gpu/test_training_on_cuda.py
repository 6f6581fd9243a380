"""Training on a CUDA GPU: no step waits for it, and steps that go wrong are left out there."""

import json
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from e3va_cli.training import progress
from e3va_cli.training.run import build_run
from tests.training.small import SMALL, last

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
ON_CUDA = [word.replace("accelerator=cpu", "accelerator=cuda") for word in SMALL] + ["trainer.limit_val_batches=0"]


class Weights(Callback):
    """The weights before the run and after each batch."""

    def __init__(self):
        self.after = []

    def on_train_start(self, trainer, pl_module):
        self.after.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.on_train_start(trainer, pl_module)

    def changed(self, batch):
        return any(not torch.equal(value, self.after[batch + 1][name]) for name, value in self.after[batch].items())


@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_step_changes_no_weight_and_is_noted(config, tmp_path, precision, bad):
    run = build_run(config(*ON_CUDA, "dataset.train_images=16", f"trainer.precision={precision}"), tmp_path)
    weights = Weights()
    run.trainer.callbacks.insert(0, weights)
    losses, calls = run.model.losses, iter(range(100))

    def spoilt(*args):
        factor = bad if next(calls) == 5 else 1
        return {name: value * factor for name, value in losses(*args).items()}

    run.model.losses = spoilt
    run.trainer.fit(run.lightning_module, run.data)
    assert run.trainer.optimizers[0].defaults["fused"]
    assert not weights.changed(5) and weights.changed(6)
    steps = {entry["step"] for entry in json.loads((tmp_path / "skipped_steps.json").read_text())}
    assert 5 in steps
    resources = json.loads((tmp_path / "resources.json").read_text())
    assert resources["steps_measured"] == 3 and 0 < resources["step_time_s"] < 10


def test_no_step_waits_for_the_device_but_at_logging(config, tmp_path, monkeypatch):
    """What heads look up on the way, such as how many boxes are left, is not looked at here."""
    monkeypatch.setattr(progress, "REFRESH_S", 1e9)

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            torch.cuda.set_sync_debug_mode("warn" if 4 <= batch_idx < 10 else "default")

    words = ["dataset.train_images=24", "trainer.log_every_n_steps=1000"]
    run = build_run(config(*ON_CUDA, *words), tmp_path)
    run.trainer.callbacks.insert(0, Watch())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.trainer.fit(run.lightning_module, run.data)
    torch.cuda.set_sync_debug_mode("default")
    waits = {f"{one.filename}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)}
    assert any("torchvision" in place or "heads" in place for place in waits), "the watch sees those of the head"
    assert not [place for place in waits if "e3va_cli/training" in place or "/lightning/" in place], waits


def test_a_run_begun_on_a_cpu_goes_on_on_a_gpu_and_back(config, tmp_path):
    for folder, words, resumed in (
        ("cpu", [*SMALL, "trainer.limit_val_batches=0"], None),
        ("cuda", [*ON_CUDA, "trainer.max_epochs=2"], "cpu"),
        ("back", [*SMALL, "trainer.limit_val_batches=0", "trainer.max_epochs=3"], "cuda"),
    ):
        run = build_run(config(*words), tmp_path / folder)
        checkpoint = None if resumed is None else last(tmp_path / resumed)
        run.trainer.fit(run.lightning_module, run.data, ckpt_path=checkpoint, weights_only=True)
    assert torch.load(last(tmp_path / "back"), weights_only=True)["global_step"] == 12
