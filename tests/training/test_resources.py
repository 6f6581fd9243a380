from types import SimpleNamespace

import pytest
import torch

from e3va_cli.training import resources
from e3va_cli.training.resources import WARMUP_STEPS, Resources
from e3va_cli.utils import environment as machine

LOAD, COMPUTE, OPTIMIZER = 1.0, 10.0, 5.0  # seconds
BATCH = [None, None]


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Train so many steps of several batches each, on a clock that goes as it is told."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: clock.now)
    module = SimpleNamespace(device=torch.device("cpu"), log=lambda *_, **__: None)

    def train(steps, *, batches, state=None):
        callback = Resources(tmp_path / "resources.json", {}, window=1)
        if state is not None:
            callback.load_state_dict(state)
        logged = []
        logger = SimpleNamespace(log_metrics=lambda values, step: logged.append(values))
        trainer = SimpleNamespace(world_size=1, global_step=0, loggers=[logger])
        callback.on_train_start(trainer, module)
        for batch in range(steps * batches):
            ends = batch % batches == batches - 1
            trainer.fit_loop = SimpleNamespace(_should_accumulate=lambda ends=ends: not ends)
            clock.now += LOAD
            callback.on_train_batch_start(trainer, module, BATCH, batch)
            clock.now += COMPUTE + OPTIMIZER * ends
            trainer.global_step += ends
            callback.on_train_batch_end(trainer, module, None, BATCH, batch)
        return callback.state_dict(), logged

    return train


def test_a_step_is_all_of_its_batches_and_the_optimizer(train):
    state, logged = train(WARMUP_STEPS + 2, batches=3)
    assert state["steps"] == 2 and state["images"] == 2 * 3 * len(BATCH)
    assert state["step_times"].tolist() == [3 * COMPUTE + OPTIMIZER] * 2
    assert state["load_times"].tolist() == [3 * LOAD] * 2
    assert state["measured_time"] == 2 * (3 * COMPUTE + OPTIMIZER + 3 * LOAD)
    assert len(logged) == WARMUP_STEPS + 2
    for values in logged:
        assert values["resources/step_time_s"] == 3 * COMPUTE + OPTIMIZER
        assert values["resources/images_per_second"] == pytest.approx(3 * len(BATCH) / (3 * COMPUTE + OPTIMIZER + 3))


def test_a_long_run_keeps_recent_times_and_counts_all(train, monkeypatch):
    monkeypatch.setattr(resources, "MAX_TIMES", 4)
    state, _ = train(WARMUP_STEPS + 10, batches=1)
    state, _ = train(WARMUP_STEPS + 1, batches=2, state=state)
    first, second = COMPUTE + OPTIMIZER, 2 * COMPUTE + OPTIMIZER
    assert state["step_times"].tolist() == [first] * 3 + [second]
    assert (state["steps"], state["starts"]) == (11, 2)
    assert state["measured_time"] == 10 * (first + LOAD) + second + 2 * LOAD
