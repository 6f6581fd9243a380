"""A run and an adapter go by their own configuration, whatever the shipped defaults have become since."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from e3va_cli.commands.saved_config import with_saved_config
from e3va_cli.commands.train import write_config
from e3va_cli.config.composition import load_config
from e3va_cli.config.run_config import COMMANDS, to_dict, typed
from e3va_cli.export.adapter_checkpoint import build_trained_meta_model, read_checkpoint_or_adapter
from e3va_cli.export.adapter_folder import write_adapter
from e3va_cli.export.config_builder import build_adapter_config
from tests.export.crafted_runs import craft

CONF = Path(__file__).parents[2] / "conf"
CHANGED = {
    "adapter/e3va.yaml": ("rank: 16", "rank: 4"),
    "head/mask_rcnn.yaml": ("score_threshold: 0.05", "score_threshold: 0.5"),
    "dataset/shapes.yaml": ("val_short_side: 128", "val_short_side: 64"),
    "optimizer/adamw.yaml": ("weight_decay: 0.05", "weight_decay: 0.5"),
    "schedule/cosine.yaml": ("lr_scaling: sqrt", "lr_scaling: linear"),
    "trainer/lightning.yaml": ("gradient_clip_norm: 1.0", "gradient_clip_norm: null"),
    "base.yaml": ("seed: 0", "seed: 9"),
}


@pytest.fixture
def other_defaults(tmp_path: Path) -> Iterator[None]:
    """Hydra on a copy of `conf/` with other values in every group."""
    shutil.copytree(CONF, tmp_path / "conf")
    for name, (old, new) in CHANGED.items():
        path = tmp_path / "conf" / name
        assert old in path.read_text(), name
        path.write_text(path.read_text().replace(old, new))
    with initialize_config_dir(str(tmp_path / "conf"), version_base="1.3"):
        yield
    GlobalHydra.instance().clear()


def composed(command: str, words: list[str]) -> Any:
    return typed(compose(command, overrides=words), COMMANDS[command])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = craft(tmp_path / "run", "optimizer.lr=2e-3")
    write_config(load_config("train", ["optimizer.lr=2e-3"]), folder)
    return folder


def test_a_resumed_run_keeps_its_configuration(run: Path, request: pytest.FixtureRequest) -> None:
    before = to_dict(load_config("train", ["optimizer.lr=2e-3"]))
    request.getfixturevalue("other_defaults")
    assert to_dict(composed("train", [])) != before, "the defaults have changed"
    assert to_dict(composed("train", with_saved_config("train", [f"resume={run}"], str(run)))) == before
    found = composed("train", with_saved_config("train", [f"resume={run}", "optimizer.lr=1e-4"], str(run)))
    before["optimizer"]["lr"] = 1e-4
    assert to_dict(found) == before, "but for what is given"


@pytest.mark.parametrize("exported", [False, True], ids=["run", "adapter"])
def test_an_evaluation_is_that_of_the_run(
    run: Path, exported: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    place = run
    if exported:
        trained = read_checkpoint_or_adapter(str(run), "checkpoint")
        place = tmp_path / "adapter"
        write_adapter(
            place, trained.state_dict, build_adapter_config(trained, build_trained_meta_model(trained), run), "fp32"
        )
    before = to_dict(load_config("train", ["optimizer.lr=2e-3"]))
    request.getfixturevalue("other_defaults")
    found = to_dict(composed("evaluate", with_saved_config("evaluate", [f"checkpoint={place}"], str(place))))
    for group in ("backbone", "adapter", "head", "dataset", "data", "seed", "num_visualizations"):
        assert found[group] == before[group], group
    for option in ("precision", "limit_val_batches"):
        assert found["trainer"][option] == before["trainer"][option]
