"""`e3va train budget=`: what is refused, and what is offered instead."""

from types import SimpleNamespace

import pytest
from hydra import initialize_config_module

from e3va_cli.commands import memory_check
from e3va_cli.config.composition import CONFIG_MODULE
from e3va_cli.errors import UserError
from e3va_cli.memory import benchmark

MIB = 2**20


@pytest.fixture
def estimated(monkeypatch):
    """Estimates of 100 MiB per image for full fine-tuning, 30 for E3VA, half of that in 16 bits."""

    def estimate_memory(config, size, **_):
        assert size.image_size == (128, 128)
        an_image = {"full": 100, "e3va": 30}[config.adapter.name] / (1 if size.precision == "32" else 2)
        return SimpleNamespace(peak=SimpleNamespace(total_bytes=MIB * (100 + an_image * size.batch_size)))

    monkeypatch.setattr(benchmark, "estimate_memory", estimate_memory)


def check(options, budget):
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        memory_check.check_memory(options, budget)


def test_a_run_that_fits_goes_on(config, estimated, capsys):
    check(config("adapter=full", "data.batch_size=8"), "1924MiB")  # 900, and 1024 for CUDA
    assert "estimate 900 MiB" in capsys.readouterr().out


def test_a_run_that_cannot_fit_is_refused_with_what_would(config, estimated):
    options = config("adapter=full", "data.batch_size=8", "trainer.accumulate_grad_batches=2")
    with pytest.raises(UserError) as refused:
        check(options, "1923MiB")
    (message,) = refused.value.messages
    assert "needs 900 MiB" in message and "128x128" in message
    # 7 images a step, and three steps together for the 16 that the run had in mind
    assert "data.batch_size=7 trainer.accumulate_grad_batches=3" in message
    assert "trainer.precision=bf16-mixed" in message and "adapter=e3va" in message


def test_only_what_fits_is_offered(config, estimated):
    with pytest.raises(UserError) as refused:
        check(config("adapter=full", "data.batch_size=8"), "1100MiB")
    assert refused.value.messages[0].endswith("nothing smaller fits either")


@pytest.mark.slow
def test_training_stops_before_it_loads_anything(e3va, tmp_path):
    small = ["dataset.image_size=96", "dataset.train_short_sides=[96]", "dataset.max_size=96", "adapter=full"]
    done = e3va("train", *small, "data.batch_size=16", "budget=1250MiB", "hydra.run.dir=out", expect=2)
    assert "cannot fit" in done.stderr and "adapter=e3va" in done.stderr
    assert not list(tmp_path.rglob("checkpoints"))
