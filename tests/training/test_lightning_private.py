"""What breaks when Lightning changes a part that has no public name."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies.launchers import subprocess_script
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from e3va_cli.training.lightning_private import (
    child_processes,
    completed_epochs,
    is_optimizer_step,
    kill_children,
    launcher_log,
    optimizer_handles_unscaling,
)
from e3va_cli.training.run import build_run
from tests.training.small import SMALL, last


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_are_unscaled_once_with_mixed_precision(fused):
    optimizer = torch.optim.AdamW([torch.ones(2, requires_grad=True)], fused=fused)
    assert optimizer_handles_unscaling(optimizer) == fused


def test_optimizer_steps_and_completed_epochs(config, tmp_path):
    """Metrics, checkpoints and signals wait for the end of a step; resuming tells whether a run is complete."""

    class Steps(Callback):
        def __init__(self):
            self.ends, self.counted = [], []

        def on_train_batch_end(self, trainer, *_):
            self.ends.append(is_optimizer_step(trainer))
            self.counted.append(trainer.global_step)

    words = ["data.batch_size=1", "trainer.accumulate_grad_batches=3", "trainer.limit_val_batches=0"]
    run, steps = build_run(config(*SMALL, *words), tmp_path), Steps()
    run.trainer.callbacks.insert(0, steps)
    run.trainer.fit(run.lightning_module, run.data)
    assert steps.counted == [0, 0, 1, 1, 1, 2, 2, 3], "8 images: the last step has two batches"
    assert steps.ends == [False, False, True, False, False, True, False, True]
    assert completed_epochs(torch.load(last(tmp_path), weights_only=True)) == 1


def test_child_processes_are_killed():
    """Without it, ranks outlive a run whose first process was stopped in an evaluation."""
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), num_processes=2, num_nodes=1)
    trainer = SimpleNamespace(strategy=SimpleNamespace(launcher=launcher))
    assert not kill_children(trainer)
    launcher.procs.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
    assert child_processes(trainer) == launcher.procs
    assert kill_children(trainer) and launcher.procs[0].wait(60) == -9


def test_the_launcher_logs_which_process_died():
    """Without it, a run ends without a message when a rank dies."""
    assert launcher_log is subprocess_script._logger
    assert callable(subprocess_script._ChildProcessObserver._run)


def test_the_progress_bar_describes_epochs():
    """Without it, the bar counts epochs from 0."""
    assert callable(RichProgressBar._get_train_description)
