"""What is not as it was when a run is resumed is refused, or said in one line; new options of the optimizer hold."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
from PIL import Image

from e3va_cli.data.formats.ade20k import SegmentationDataset
from e3va_cli.data.formats.coco import open_coco
from e3va_cli.data.formats.label_encoding import label_encoding
from e3va_cli.errors import UserError
from e3va_cli.training.resume import config_changes, read_resume_checkpoint
from e3va_cli.training.run import build_run
from tests.training.small import SMALL, last, rows

RUN = [*SMALL, "schedule=multistep", "schedule.warmup_steps=0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def checkpoint(finished, config):
    if not last(finished).is_file():
        run = build_run(config(*RUN), finished)
        run.trainer.fit(run.lightning_module, run.data)
    return last(finished)


def told(config, checkpoint, folder, *words):
    options = config(*RUN, *words)
    return read_resume_checkpoint(checkpoint, build_run(options, folder), options).changes


def test_nothing_is_said_where_nothing_has_changed(config, checkpoint, tmp_path):
    length = ["trainer.max_epochs=9", "data.num_workers=1", "data.val_batch_size=1", "num_visualizations=0"]
    assert told(config, checkpoint, tmp_path, *length) == []


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("seed=1", "seed=1 (was 0): the order of images and the random transforms change"),
        ("data.batch_size=4", "data.batch_size=4 (was 2): the steps of an epoch and the learning rate change"),
        ("trainer.accumulate_grad_batches=2", "trainer.accumulate_grad_batches=2 (was 1): the steps of an epoch"),
        ("optimizer.lr=0.5", "optimizer.lr=0.5 (was 0.001)"),
        ("optimizer.weight_decay=0.5", "optimizer.weight_decay=0.5 (was 0.05)"),
        ("schedule.gamma=0.5", "schedule.gamma=0.5 (was 0.1)"),
        ("trainer.precision=bf16-mixed", "trainer.precision='bf16-mixed' (was '32')"),
        ("dataset.train_images=6", "dataset: train has 6 images, 8 before; results before and after are of different"),
        ("dataset.val_images=3", "dataset: val has 3 images, 4 before"),
    ],
)
def test_a_line_for_each_thing(config, checkpoint, tmp_path, word, says):
    (line,) = told(config, checkpoint, tmp_path, word)
    assert line.startswith(says)


@pytest.mark.parametrize(("option", "saved"), [("decay_biases=true", "false"), ("adapter_lr_scale=2.0", "1.0")])
def test_other_groups_of_the_optimizer_are_refused(config, checkpoint, tmp_path, option, saved):
    was = f"{option.partition('=')[0]}={saved}"
    expected = rf"optimizer\.{option}: the run was started with optimizer\.{was}.*start a new run"
    with pytest.raises(UserError, match=expected):
        told(config, checkpoint, tmp_path, f"optimizer.{option}")


def test_a_checkpoint_from_before_fingerprints(config, checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    del content["data"]
    assert list(config_changes(content, config(*RUN), {"train": {"images": 1, "files": "", "annotations": ""}})) == []


def test_new_options_of_the_optimizer_hold(config, checkpoint, tmp_path):
    """PyTorch puts the saved ones in their place."""
    folder = shutil.copytree(checkpoint.parents[1], tmp_path / "run")
    words = ["trainer.max_epochs=2", "optimizer.lr=0.004", "optimizer.weight_decay=0.3", "optimizer.betas=[0.8,0.9]"]
    run = build_run(config(*RUN, *words), folder)
    run.trainer.fit(run.lightning_module, run.data, ckpt_path=last(folder), weights_only=True)
    lrs = [float(row["lr-AdamW/pg1"]) for row in rows(folder) if row.get("lr-AdamW/pg1") and int(row["step"]) >= 4]
    assert lrs == [run.train_schedule.lr] * 4, "from the first step on"
    decayed, plain = torch.load(last(folder), weights_only=True)["optimizer_states"][0]["param_groups"]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert list(decayed["betas"]) == list(plain["betas"]) == [0.8, 0.9]


def changed(before, after):
    return list(after.fingerprint().changes(asdict(before)))


OTHER_FILES = ["image files changed (names or sizes)"]


def test_fingerprints_of_coco(write_coco, annotate, tmp_path):
    objects = [annotate(1, [2, 2, 20, 20]), annotate(2, [4, 4, 10, 10], image_id=5)]
    folder, annotations = write_coco(objects)
    first = open_coco(folder, annotations).fingerprint()
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    assert changed(first, open_coco(elsewhere, annotations)) == [], "wherever it lies"
    write_coco([objects[0], {**objects[1], "bbox": [4, 4, 10, 11]}])
    assert changed(first, open_coco(folder, annotations)) == ["annotations changed"]
    write_coco(objects)
    with (folder / "a.png").open("ab") as file:
        file.write(b"more")
    assert changed(first, open_coco(folder, annotations)) == OTHER_FILES
    content = json.loads(annotations.read_text())
    write_coco(objects[:1], images=content["images"][:1])
    assert changed(first, open_coco(folder, annotations)) == ["1 image, 2 before"]


def test_fingerprints_of_masks(tmp_path):
    for name in ("a", "b"):
        for folder, kind in (("images", "RGB"), ("labels", "L")):
            (tmp_path / folder).mkdir(exist_ok=True)
            picture = Image.new(kind, (8, 8))
            picture.paste(2, (0, 0, 4, 4)) if kind == "L" else None
            picture.paste(1, (4, 4, 8, 8)) if kind == "L" else None
            picture.save(tmp_path / folder / f"{name}.png")

    def opened():
        encoding = label_encoding(
            num_classes=2, reduce_zero_label=True, ignore_index=None, label_map=None, root=tmp_path
        )
        return SegmentationDataset(tmp_path / "images", tmp_path / "labels", classes=["x", "y"], encoding=encoding)

    first = opened().fingerprint()
    assert changed(first, opened()) == []
    with (tmp_path / "labels" / "a.png").open("ab") as file:
        file.write(b"more")
    assert changed(first, opened()) == ["annotations changed"]
    for folder in ("images", "labels"):
        (tmp_path / folder / "b.png").rename(tmp_path / folder / "c.png")
    assert changed(first, opened()) == OTHER_FILES
