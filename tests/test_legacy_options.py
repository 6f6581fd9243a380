"""What was made before an option existed is read with the value that it had then, and under its name of then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from e3va_cli.commands.saved_config import with_saved_config
from e3va_cli.config.overrides import overrides_of_config
from e3va_cli.config.run_config import missing_options, to_dict, with_older_options
from e3va_cli.data import DATASET_FORMATS
from e3va_cli.export.adapter_checkpoint import build_trained_meta_model, read_checkpoint_or_adapter
from e3va_cli.export.adapter_folder import write_adapter
from e3va_cli.export.config_builder import build_adapter_config
from e3va_cli.models.heads import HEADS
from e3va_cli.training.checkpoints import METADATA_KEY, read_checkpoint
from tests.export.crafted_runs import SEGMENTER, aged, craft

VOC = ["dataset=voc", "dataset.root=x", "head.fpn_channels=32", "backbone=swin_nano", "dataset.classes=[a,b,c,d,e]"]
VOC += ["dataset.num_classes=5"]
WINDOWS = [*SEGMENTER, "head.slide_window=64", "head.slide_stride=40", "num_visualizations=3"]
FORMER = {
    "slide_window": "window",
    "slide_stride": "stride",
    "num_visualizations": "pictures",
    "cat_max_ratio": "crop_one_class",
}
FORMER |= {"photometric_distortion": "distort", "max_nonfinite_steps": "max_bad_losses"}
CURRENT = {"head.slide_window=64", "head.slide_stride=40", "num_visualizations=3", "trainer.max_nonfinite_steps=3"}
OLD = {
    "dataset.intensity_range=[0.0,65535.0]",
    "dataset.intensity_percentiles=[0.1,99.9]",
    "dataset.encoding='latin-1'",
}


@pytest.mark.parametrize("dataset", list(DATASET_FORMATS))
@pytest.mark.parametrize("head", list(HEADS))
def test_what_is_older_is_filled_in_where_it_was(config: Callable[..., Any], dataset: str, head: str) -> None:
    root = [] if dataset == "shapes" else ["dataset.root=x"]
    made = to_dict(config(f"dataset={dataset}", f"head={head}", *root))
    assert with_older_options(made) == made
    filled = with_older_options(aged(made))
    assert {group: options.keys() for group, options in filled.items() if isinstance(options, dict)} == {
        group: options.keys() for group, options in made.items() if isinstance(options, dict)
    }


def test_an_exported_adapter(tmp_path: Path) -> None:
    old_head = ["head.p6_from=p5", "head.exact_anchors=false"]
    trained = read_checkpoint_or_adapter(str(craft(tmp_path / "run", *VOC, *old_head)), "checkpoint")
    description = build_adapter_config(trained, build_trained_meta_model(trained), tmp_path / "run")
    description["config"] = aged(description["config"])
    description["head"] = description["config"]["head"]
    write_adapter(tmp_path / "old", trained.state_dict, description, precision="fp32")
    read = read_checkpoint_or_adapter(str(tmp_path / "old"), "checkpoint").metadata["config"]["dataset"]
    assert (read["intensity_range"], read["encoding"]) == ([0.0, 65_535.0], "latin-1")
    words = with_saved_config("evaluate", ["checkpoint=old"], str(tmp_path / "old"))
    assert set(words) >= OLD and "dataset.num_classes=null" in words


def test_a_run_folder(tmp_path: Path) -> None:
    run = craft(tmp_path / "run", *VOC)
    made = read_checkpoint_or_adapter(str(run), "checkpoint").metadata["config"]
    for config in (made, aged(made)):
        assert bool(missing_options(config)) == (config is not made)
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        words = with_saved_config("evaluate", ["checkpoint=x"], str(run))
        assert (set(words) >= OLD) == (config is not made)
    assert not OLD & set(with_saved_config("evaluate", ["checkpoint=x", "dataset=coco"], str(run)))
    assert set(overrides_of_config(with_older_options(aged(made)))) >= OLD


def under_former_names(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {FORMER.get(key, key): under_former_names(inner) for key, inner in value.items()}


def test_an_adapter_under_former_names(tmp_path: Path) -> None:
    trained = read_checkpoint_or_adapter(str(craft(tmp_path / "run", *WINDOWS)), "checkpoint")
    description = under_former_names(build_adapter_config(trained, build_trained_meta_model(trained), tmp_path / "run"))
    assert description["head"]["window"] == 64
    write_adapter(tmp_path / "old", trained.state_dict, description, precision="fp32")
    read = read_checkpoint_or_adapter(str(tmp_path / "old"), "checkpoint").metadata
    assert (read["config"], read["head"]) == (trained.metadata["config"], trained.metadata["head"])
    overrides = with_saved_config("evaluate", ["checkpoint=old"], str(tmp_path / "old"))
    assert set(overrides) >= CURRENT - {"trainer.max_nonfinite_steps=3"}


def test_a_run_under_former_names(tmp_path: Path) -> None:
    run = craft(tmp_path / "run", *WINDOWS)
    checkpoint = run / "checkpoints" / "last.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    config = content[METADATA_KEY]["config"]
    torch.save({**content, METADATA_KEY: under_former_names(content[METADATA_KEY])}, checkpoint)
    assert read_checkpoint_or_adapter(str(run), "checkpoint").metadata["config"] == config
    assert read_checkpoint(checkpoint)[METADATA_KEY]["head"] == config["head"]
    (run / "config.yaml").write_text(yaml.safe_dump(under_former_names(config)))
    assert set(with_saved_config("train", [f"resume={run}"], str(run))) >= CURRENT
    (run / "config.yaml").unlink()
    (run / ".hydra/overrides.yaml").write_text(yaml.safe_dump(["head=upernet", "head.window=64", "pictures=3"]))
    overrides = with_saved_config("train", [f"resume={run}"], str(run))
    assert overrides[:3] == ["head=upernet", "head.slide_window=64", "num_visualizations=3"]
