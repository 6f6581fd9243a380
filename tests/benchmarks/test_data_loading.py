"""The benchmark of the training loader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.data import Subset

from benchmarks import common, data_loading
from e3va_cli.data import build_datasets

WORDS = ["dataset.train_images=5", "dataset.val_images=2", "dataset.image_size=64", "data.batch_size=2"]


@pytest.mark.parametrize(
    ("ratios", "workers"),
    [({0: 0.1, 1: 1.5, 2: 1.0, 4: 0.4}, 2), ({0: 0.1}, None), ({1: 2.0, 2: 1.1}, None), ({4: 0.2, 1: 0.9}, 1)],
)
def test_sufficient_workers(ratios: dict[int, float], workers: int | None) -> None:
    assert data_loading.sufficient_workers(ratios) == workers
    assert (f"from {workers} worker" if workers else "at every number") in data_loading.verdict(ratios)


def test_loader_is_that_of_training() -> None:
    config = common.compose("train", WORDS)
    train, val = build_datasets(config.dataset)
    seconds, images = data_loading.time_loader(config, Subset(train, range(5)), val, 0)
    assert images == 4 and seconds > 0  # whole batches only
    batches = data_loading.load_batches(config, train, val, 9)
    assert [len(batch) for batch in batches] == [2, 2]
    assert all(0 not in target["labels"] for batch in batches for target in batch.targets)


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    output = tmp_path / "out.json"
    arguments = ["--workers", "0,1", "--steps", "1", "--threads", "1", "--output", str(output), *WORDS]
    assert data_loading.main(arguments) == 0
    torch.set_num_threads(threads)
    written = json.loads(output.read_text())
    assert set(written["images_per_second"]) == {"0", "1"} and written["source"] == "measured"
    for workers, ratio in written["of_a_step"].items():
        expected = 2 / written["images_per_second"][workers] / written["step_time_s"]
        assert ratio == pytest.approx(expected)
    assert "5 images, batches of 2" in capsys.readouterr().out
