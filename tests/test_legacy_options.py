"""What was made before an option existed is read with the value that it had then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from e3va_cli.config.legacy import LEGACY_OPTIONS, fill_legacy_options, missing_options
from e3va_cli.export.adapter_folder import write_adapter
from e3va_cli.export.description import describe
from e3va_cli.export.overrides import as_value, evaluation_words
from e3va_cli.export.trained import outlined, read_trained
from e3va_cli.hydra_app import on_top_of_run
from tests.export.crafted_runs import aged, craft

VOC = ["dataset=voc", "dataset.root=x", "head.fpn_channels=32", "backbone=swin_nano", "dataset.classes=[a,b,c,d,e]"]
VOC += ["dataset.num_classes=5"]
OLD = {
    "dataset.intensity_range=[0.0,65535.0]",
    "dataset.intensity_percentiles=[0.1,99.9]",
    "dataset.encoding='latin-1'",
}


def test_every_option_of_the_table_exists(config: Callable[..., dict[str, Any]]) -> None:
    for name in LEGACY_OPTIONS["dataset"]:
        made = config(f"dataset={name}", *([] if name == "shapes" else ["dataset.root=x"]))
        assert fill_legacy_options(made) == made
        assert fill_legacy_options(aged(made))["dataset"].keys() == made["dataset"].keys()
    assert fill_legacy_options(config()) == config()


def test_an_exported_adapter(tmp_path: Path) -> None:
    old_head = ["head.p6_from=p5", "head.exact_anchors=false"]
    trained = read_trained(str(craft(tmp_path / "run", *VOC, *old_head)), "checkpoint")
    description = describe(trained, outlined(trained), tmp_path / "run")
    description["config"] = aged(description["config"])
    description["head"] = description["config"]["head"]
    write_adapter(tmp_path / "old", trained.state, description, precision="fp32")
    read = read_trained(str(tmp_path / "old"), "checkpoint").about["config"]["dataset"]
    assert (read["intensity_range"], read["encoding"]) == ([0.0, 65_535.0], "latin-1")
    words = on_top_of_run("evaluate", ["checkpoint=old"], str(tmp_path / "old"))
    assert set(words) >= OLD and "dataset.num_classes=null" in words


def test_a_run_folder(tmp_path: Path) -> None:
    run = craft(tmp_path / "run", *VOC)
    made = read_trained(str(run), "checkpoint").about["config"]
    for config in (made, aged(made)):
        missing = {f"{key}={as_value(value)}" for key, value in missing_options(config).items()}
        assert missing >= OLD if config is not made else not missing
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        words = on_top_of_run("evaluate", ["checkpoint=x"], str(run))
        assert set(words) - {"checkpoint=x"} == missing
    assert not OLD & set(on_top_of_run("evaluate", ["checkpoint=x", "dataset=coco"], str(run)))
    assert set(evaluation_words(fill_legacy_options(aged(made)))) >= OLD
