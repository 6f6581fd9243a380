"""Estimates beside published memory: every row composes, and what the other code adds is added."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import published_memory
from benchmarks.published_memory import ROWS, Published
from e3va_cli.errors import UserError
from e3va_cli.models.model import build_meta_model, parameter_counts

SMALL = ("backbone=swin_nano", "image_size=[96,128]", "data.batch_size=1")
PLAIN = Published("nobody", "small", 100.0, "full", ("dataset=coco", "head=mask_rcnn_nano", *SMALL))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.source}: {row.title}")
def test_every_row_composes(row: Published) -> None:
    config = published_memory.configured(row, [])
    assert config.adapter.name == row.method and config.measure is False
    assert config.backbone.drop_path_rate > 0  # their methods have it, with gradients through the backbone


def test_their_code_keeps_gradients_and_has_ddp_buckets() -> None:
    large = dataclasses.replace(
        PLAIN, overrides=(*PLAIN.overrides, "image_size=[512,512]")
    )  # so that forward is the peak
    ours, theirs = (published_memory.estimated_mib(large, [], as_theirs=as_theirs) for as_theirs in (False, True))
    counts = parameter_counts(build_meta_model(published_memory.configured(large, []), num_classes=80))
    assert theirs - ours >= 2 * 4 * counts["trainable_params"] / 2**20


@pytest.mark.slow
def test_apex_runs_gelu_in_float32() -> None:
    mixed = dataclasses.replace(
        PLAIN, overrides=(*PLAIN.overrides, "image_size=[512,512]", "trainer.precision=16-mixed")
    )
    apex = dataclasses.replace(mixed, apex=True)
    without, with_it = (published_memory.estimated_mib(row, [], as_theirs=True) for row in (mixed, apex))
    hidden = [2 * (128 >> stage) ** 2 * 4 * (32 << stage) for stage in range(4)]  # of swin_nano's two blocks a stage
    assert with_it - without == pytest.approx(2 * sum(hidden) / 2**20)  # 2 bytes more each


def test_cells() -> None:
    assert published_memory.cells(1000.0, 900.0, 1010.0) == ["1,000", "900", "-10.0%", "1,010", "+1.0%"]


def test_unknown_source_is_an_error() -> None:
    with pytest.raises(UserError, match=r"--rows mona,detectron2: no source detectron2; choices: mona, mmdetection"):
        published_memory.main(["--rows", "mona,detectron2"])
