"""Steps that go wrong: what they leave untouched, what is noted of them, and when they end a run."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision

from e3va_cli.errors import UserError
from e3va_cli.optim import optimizer
from e3va_cli.training.run import build_run
from tests.training.small import SMALL, last, rows


def times(factor):
    """Losses times a number: nan and inf make bad gradients too."""
    return lambda losses: {name: value * factor for name, value in losses.items()}


def plus_infinity(losses):
    """An infinite loss whose gradient is finite."""
    return {name: value + torch.inf for name, value in losses.items()}


def bad_gradient(losses):
    """A finite loss whose gradient is not."""
    for value in losses.values():
        value.register_hook(lambda gradient: gradient * torch.nan)
    return losses


def no_memory_forward(losses):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def no_memory_backward(losses):
    def fail(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    for value in losses.values():
        value.register_hook(fail)
    return losses


class Weights(Callback):
    """The weights before the run and after each batch, and the ids of each batch's images."""

    def __init__(self):
        self.after, self.ids = [], []

    def note(self, pl_module):
        self.after.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    def on_train_start(self, trainer, pl_module):
        self.note(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.note(pl_module)
        self.ids.append([target["image_id"] for target in batch.targets])

    def changed(self, batch):
        return any(not torch.equal(self.after[batch][name], self.after[batch + 1][name]) for name in self.after[0])


@pytest.fixture(params=[{"cuda"}, {"cpu"}], ids=["known at once", "left out on the device"])
def fused_on(request, monkeypatch):
    """With a fused optimizer, as on a GPU, what became of a step is read later."""
    monkeypatch.setattr(optimizer, "FUSED_ON", request.param)


@pytest.fixture
def train(config, tmp_path, fused_on):
    """Train with losses spoilt at some batches (counted from 0); returns the run, and what became of the weights."""

    def train(spoil, batches, *words, plugin=None, folder=tmp_path, resume=None):
        run = build_run(config(*SMALL, "trainer.max_epochs=1", "trainer.limit_val_batches=0", *words), folder)
        weights = Weights()
        run.trainer.callbacks.insert(0, weights)
        losses, calls = run.model.losses, iter(range(1000))

        def spoilt(*args):
            found = losses(*args)
            return spoil(found) if next(calls) in batches else found

        run.model.losses = spoilt
        if plugin is not None:
            run.trainer.strategy.precision_plugin = plugin
        run.trainer.fit(run.lightning_module, run.data, ckpt_path=resume, weights_only=True)
        return run, weights

    return train


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (times(torch.nan), []),
        (plus_infinity, []),
        (bad_gradient, []),
        (no_memory_forward, ["trainer.skip_oom=true"]),
        (no_memory_backward, ["trainer.skip_oom=true"]),
    ],
)
def test_a_step_that_went_wrong_changes_no_weight(train, tmp_path, capsys, spoil, words):
    _, weights = train(spoil, {2}, *words)
    assert [weights.changed(batch) for batch in range(4)] == [True, True, False, True]
    (entry,) = json.loads((tmp_path / "skipped_steps.json").read_text())
    assert entry["step"] == 2 and entry["image_ids"] == weights.ids[2] and len(entry["image_sizes"]) == 2
    assert entry["out_of_memory"] == bool(words)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("e3va: ")]
    assert line.startswith("e3va: warning: step 2") and str(weights.ids[2][0]) in line


def test_what_a_bad_step_measured_is_written_as_json_can(train, tmp_path):
    train(times(torch.nan), {1})
    (entry,) = json.loads((tmp_path / "skipped_steps.json").read_text())
    assert entry["losses"]["loss"] == "nan" and entry["gradient_norm"] == "nan"
    assert rows(tmp_path)[1]["train/loss"] == "nan"


def test_too_many_in_a_row_end_the_run(train, tmp_path):
    with pytest.raises(UserError, match=r"step 3: .*3 skipped steps in a row.*skipped_steps.json.*optimizer.lr"):
        train(times(torch.inf), {1, 2, 3})
    assert len(json.loads((tmp_path / "skipped_steps.json").read_text())) == 3
    assert torch.load(last(tmp_path), weights_only=True)["global_step"] == 0, "the state from before is whole"


def test_a_good_step_starts_the_count_again(train):
    train(times(torch.nan), {0, 2, 3}, "trainer.max_nonfinite_steps=3")
    with pytest.raises(UserError):
        train(times(torch.nan), {0, 2, 3}, "trainer.max_nonfinite_steps=2")


@pytest.mark.parametrize("spoil", [times(torch.nan), no_memory_forward, no_memory_backward])
def test_gradients_accumulated_before_are_dropped(train, spoil):
    words = ["data.batch_size=1", "trainer.accumulate_grad_batches=2", "trainer.skip_oom=true"]
    _, weights = train(spoil, {1, 4}, *words)  # the second batch of the first step, the first of the third
    assert [weights.changed(batch) for batch in (1, 3, 5, 7)] == [False, True, False, True]


def test_out_of_memory_ends_the_run_unless_it_is_to_be_left_out(train):
    with pytest.raises(torch.OutOfMemoryError):
        train(no_memory_backward, {0})


def test_the_gradient_norm_is_logged_as_it_was_before_clipping(config, tmp_path):
    class Gradients(Callback):
        def __init__(self):
            self.before, self.after = [], []

        def norm(self, pl_module):
            return float(torch.cat([p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]).norm())

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.before.append(self.norm(pl_module))

        def on_train_start(self, trainer, pl_module):
            trainer.optimizers[0].register_step_post_hook(lambda *_: self.after.append(self.norm(pl_module)))

    gradients = Gradients()
    run = build_run(config(*SMALL, "trainer.limit_val_batches=0", "trainer.gradient_clip_norm=0.5"), tmp_path)
    run.trainer.callbacks.insert(0, gradients)
    run.trainer.fit(run.lightning_module, run.data)
    logged = [float(row["train/grad_norm"]) for row in rows(tmp_path)]
    assert logged == pytest.approx(gradients.before, rel=1e-4) and min(logged) > 0.5
    assert gradients.after == pytest.approx([0.5] * 4, rel=1e-4)


def test_the_scaler_of_half_precision_goes_on_where_it_was(train, tmp_path):
    def plugin():
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3))

    words = ["trainer.skip_oom=true", "trainer.max_nonfinite_steps=5"]
    run, weights = train(no_memory_backward, {1}, *words, plugin=plugin())
    assert [weights.changed(batch) for batch in range(4)] == [True, False, True, True]
    saved = torch.load(last(tmp_path), weights_only=True)["MixedPrecision"]
    assert saved["scale"] == 512.0, "three steps without overflow double it; the one left out counts for nothing"
    run, _ = train(times(torch.inf), {0}, *words, "trainer.max_epochs=2", plugin=plugin(), resume=last(tmp_path))
    scaler = run.trainer.precision_plugin.scaler.state_dict()
    assert scaler["scale"] == 512.0 and scaler["_growth_tracker"] == 0
