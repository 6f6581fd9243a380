"""Each experiment, by its own words, at reduced size: two steps and an evaluation of crafted data."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import e3va_cli.conf
from e3va_cli.config.composition import load_config
from e3va_cli.config.overrides import overrides_of_config
from e3va_cli.config.run_config import to_dict
from e3va_cli.training.run import train_schedule_from_config

SMALL = [
    "backbone=swin_nano",
    "head.fpn_channels=32",
    "data.batch_size=2",
    "data.num_workers=0",
    "trainer.accelerator=cpu",
    "trainer.tensorboard=false",
    "hydra.run.dir=run",
]
BOXES = [
    "dataset.train_short_sides=[64]",
    "dataset.val_short_side=64",
    "dataset.max_size=96",
    "trainer.max_epochs=2",
]
CASCADE = [
    *BOXES,
    "head.box.conv_channels=[32]",
    "head.box.hidden=32",
    "head.box.batch_size_per_image=16",
    "head.mask.channels=[16]",
    "head.mask.predictor_channels=16",
    "head.rpn.post_nms_train=50",
    "head.rpn.post_nms_test=50",
]
PIXELS = ["dataset.short_side=64", "dataset.max_size=96", "dataset.crop_size=64", "dataset.num_classes=3"]
XML = """<annotation><size><width>48</width><height>40</height><depth>3</depth></size>
<object><name>cat</name><difficult>0</difficult>
<bndbox><xmin>5</xmin><ymin>6</ymin><xmax>30</xmax><ymax>33</ymax></bndbox></object></annotation>"""


def photo(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)


def coco(root: Path) -> None:
    for split in ("train2017", "val2017"):
        images = [{"id": i, "file_name": f"{i}.jpg", "width": 48, "height": 40} for i in (1, 2)]
        polygon = [[5, 6, 30, 6, 30, 33, 5, 33]]
        annotations = [
            {"id": i, "image_id": i, "category_id": 3, "bbox": [5, 6, 25, 27], "area": 675, "iscrowd": 0}
            | {"segmentation": polygon}
            for i in (1, 2)
        ]
        for i in (1, 2):
            photo(root / split / f"{i}.jpg", i)
        content = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "cat"}]}
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def voc(root: Path) -> None:
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / "VOC2007" / name).mkdir(parents=True)
    for split, stems in (("trainval", ("a", "b")), ("test", ("c", "d"))):
        (root / "VOC2007/ImageSets/Main" / f"{split}.txt").write_text("\n".join(stems))
        for seed, stem in enumerate(stems):
            photo(root / "VOC2007/JPEGImages" / f"{stem}.jpg", seed)
            (root / "VOC2007/Annotations" / f"{stem}.xml").write_text(XML)


def ade20k(root: Path) -> None:
    for split in ("training", "validation"):
        for stem in ("a", "b"):
            photo(root / "images" / split / f"{stem}.jpg", 1)
            labels = np.random.default_rng(0).integers(0, 4, (40, 48), dtype=np.uint8)
            (root / "annotations" / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels).save(root / "annotations" / split / f"{stem}.png")


@pytest.mark.parametrize(
    ("experiment", "make", "words", "result"),
    [
        ("coco_cascade_swin_b", coco, CASCADE, "mask"),
        pytest.param("coco_cascade_swin_l", coco, CASCADE, "mask", marks=pytest.mark.slow),
        ("voc_retinanet_swin_l", voc, BOXES, "box"),
        ("ade20k_upernet_swin_l", ade20k, [*PIXELS, "schedule.iterations=1"], "mIoU"),
    ],
)
def test_an_experiment_runs(e3va, tmp_path, experiment, make, words, result):
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    done = e3va("train", f"experiment={experiment}", f"dataset.root={root}", *SMALL, *words)
    rescaled = experiment != "voc_retinanet_swin_l"  # whose recipe is for the two images of this run
    assert ("total batch of 16" in done.stdout) == rescaled, "the recipe's batch is named"
    if "voc" in experiment or "coco" in experiment:
        assert "bf16-mixed" in done.stdout + done.stderr, "16-mixed needs a GPU, and what is done without one is said"
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert result in metrics
    assert (tmp_path / "run" / "predictions.png").is_file()
    again = e3va("evaluate", f"checkpoint={tmp_path}/run", f"hydra.run.dir={tmp_path}/again")
    assert json.loads((tmp_path / "again" / "metrics.json").read_text()) == metrics
    assert "Evaluation" in again.stdout


SMALL_CPU = {  # head, schedule, training images, steps of 8 images
    "bccd_retinanet_swin_nano": ("retinanet", "cosine", 292, 432),
    "bccd_retinanet_dinov2_s": ("retinanet", "cosine", 292, 216),
    "kangaroo_retinanet_swin_nano": ("retinanet", "cosine", 130, 640),
    "kangaroo_retinanet_dinov2_s": ("retinanet", "cosine", 130, 256),
    "camvid_upernet_swin_nano": ("upernet", "poly", 367, 540),
    "camvid_upernet_dinov2_s": ("upernet", "poly", 367, 225),
}
PAPERS = {"coco_cascade_swin_b", "coco_cascade_swin_l", "voc_retinanet_swin_l", "ade20k_upernet_swin_l"}


def test_every_experiment_is_tested():
    files = (Path(e3va_cli.conf.__file__).parent / "experiment").glob("*.yaml")
    assert {file.stem for file in files} == PAPERS | set(SMALL_CPU)


@pytest.mark.parametrize("experiment", SMALL_CPU)
def test_an_experiment_for_a_small_cpu(experiment):
    head, decay, images, steps = SMALL_CPU[experiment]
    config = load_config("train", [f"experiment={experiment}", "dataset.root=x"])
    assert config.backbone.name == experiment.split("_", 2)[2]
    assert (config.head.name, config.head.fpn_channels, config.schedule.name) == (head, 64, decay)
    schedule = train_schedule_from_config(config, batches_per_epoch=images // config.data.batch_size, devices=1)
    assert (schedule.total_steps, schedule.lr, schedule.rescaled) == (steps, 1e-3, False)
    assert config.trainer.val_every_epochs <= schedule.epochs
    assert config.backbone.pretrained == (config.backbone.name == "swin_nano") and config.backbone.weights is None
    saved = to_dict(config)
    assert to_dict(load_config("train", overrides_of_config(saved))) == saved, "a run can be resumed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "root"),
    [("bccd_retinanet_swin_nano", "bccd/VOCdevkit"), ("camvid_upernet_swin_nano", "camvid_small")],
)
def test_an_experiment_for_a_small_cpu_trains(e3va, real_data, experiment, root):
    words = ["trainer.max_steps=2", "data.num_workers=0", "hydra.run.dir=run"]
    done = e3va("train", f"experiment={experiment}", f"dataset.root={real_data(root)}", *words)
    assert " from 0.001 after" in done.stdout and "weights are random" not in done.stdout
