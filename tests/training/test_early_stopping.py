"""Early stopping where an evaluation has nothing to measure."""

import pytest

from e3va_cli.training.run import build_run
from tests.training.small import SMALL


@pytest.mark.parametrize("exists", [False, True])
def test_a_run_without_an_ap_is_not_stopped(config, tmp_path, exists):
    words = ["trainer.max_epochs=4", "trainer.early_stopping_patience=1", "dataset.train_images=2"]
    run = build_run(config(*SMALL, *words), tmp_path)
    evaluator = run.lightning_module.evaluator
    run.lightning_module.evaluator.log_dict = lambda results: {evaluator.monitor: 0.0} if exists else {}
    run.trainer.fit(run.lightning_module, run.data)
    assert run.trainer.current_epoch == (2 if exists else 4)
