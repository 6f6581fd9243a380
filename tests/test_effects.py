"""Options that do nothing where they are given are refused, with what would make them do something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from e3va_cli.components.options import info_of
from e3va_cli.config.composition import validate_overrides
from e3va_cli.config.run_config import REGISTRIES, SINGLE, BenchmarkMemoryConfig
from e3va_cli.data import build_datasets
from e3va_cli.errors import UserError

ADE = ["dataset=ade20k", "dataset.root=x"]
IDLE = {
    "head.slide_stride": ["train", *ADE, "head.slide_stride=64"],
    "head.auxiliary_stage": ["train", *ADE, "head.auxiliary_weight=0", "head.auxiliary_stage=1"],
    "head.auxiliary_channels": ["train", *ADE, "head.auxiliary_weight=0", "head.auxiliary_channels=8"],
    "adapter.compress_bits": ["train", "adapter.compress_bits=16"],
    "schedule.warmup_ratio": ["train", "schedule.warmup_steps=0", "schedule.warmup_ratio=0.1"],
    "schedule.lr_scaling": ["train", "schedule.lr_scaling=sqrt"],
    "trainer.val_every_epochs": ["train", "trainer.limit_val_batches=0", "trainer.val_every_epochs=2"],
    "dataset.intensity_percentiles": [
        "train",
        *["dataset=coco", "dataset.root=x", "dataset.intensity_range=[0,9]", "dataset.intensity_percentiles=[1,99]"],
    ],
    "dataset.reduce_zero_label": ["train", *ADE, "dataset.label_map=[0,255]", "dataset.reduce_zero_label=false"],
    "backbone.seed": ["train", "backbone=swin_t", "backbone.pretrained=true", "backbone.seed=3"],
    "warmup": ["benchmark_memory", "measure=false", "warmup=2"],
    "repeats": ["benchmark_memory", "measure=false", "repeats=2"],
}


def test_every_option_of_the_table_is_tried() -> None:
    kinds = [(f"{group}.", registry.options(name)) for group, registry in REGISTRIES.items() for name in registry]
    kinds += [("", BenchmarkMemoryConfig), *((f"{group}.", kind) for group, kind in SINGLE.items())]
    assert set(IDLE) == {f"{at}{one.name}" for at, kind in kinds for one in fields(kind) if info_of(one).conditions}


@pytest.mark.parametrize("key", IDLE)
def test_an_option_without_effect_is_refused(key: str) -> None:
    command, *words = IDLE[key]
    with pytest.raises(UserError) as caught:
        validate_overrides(command, words)
    [line] = caught.value.messages
    assert line.startswith(f"{key}=") and "does nothing with" in line and f"leave out {key}" in line
    validate_overrides(command, words, given=words[:-1])  # as a run that is built on may have it


@pytest.mark.parametrize(
    "words",
    [
        [*ADE, "head.slide_window=64", "head.slide_stride=32"],
        ["adapter.activations=compress", "adapter.compress_bits=16"],
        ["schedule.total_batch=16", "schedule.lr_scaling=sqrt"],
        ["backbone.seed=3"],
        ["adapter.activations=keep,compress", "adapter.compress_bits=16"],
    ],
)
def test_options_with_an_effect_are_not(words: list[str]) -> None:
    validate_overrides("train", words)


@pytest.mark.parametrize("given", [None, 2, 7])
def test_a_number_of_classes_that_the_data_does_not_have(
    given: int | None, write_coco: Callable[..., tuple[Path, Path]], annotate: Any, config: Any, tmp_path: Path
) -> None:
    write_coco([annotate(1, [2, 3, 10, 20])])
    words = ["dataset=coco", f"dataset.root={tmp_path}"]
    words += [f"dataset.{split}_images=images" for split in ("train", "val")]
    words += [f"dataset.{split}_annotations=instances.json" for split in ("train", "val")]
    options = config(*words, *([f"dataset.num_classes={given}"] if given else [])).dataset
    if given == 7:
        with pytest.raises(UserError, match=r"dataset\.num_classes=7: the data has 2 classes, dog, cat; remove"):
            build_datasets(options)
    else:
        assert len(build_datasets(options)[1].classes) == 2


def test_generated_shapes_have_five_classes(config: Any) -> None:
    with pytest.raises(UserError, match="num_classes=7: the data has 5 classes"):
        build_datasets(config("dataset.num_classes=7", "dataset.val_images=1", "dataset.train_images=1").dataset)
    assert OmegaConf.create(config())["dataset"]["num_classes"] == 5
