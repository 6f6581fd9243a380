"""Every shipped YAML composes, and names the commands that use it."""

from functools import partial
from pathlib import Path

import pytest

import e3va_cli.conf
from e3va_cli.config.compatibility import check_compatibility
from e3va_cli.config.composition import validate_overrides
from e3va_cli.data import DATASET_FORMATS
from e3va_cli.errors import UserError
from e3va_cli.evaluation import EVALUATORS
from e3va_cli.models.adapters import METHODS, FrozenBackbone
from e3va_cli.models.backbones import build_backbone, build_meta_backbone
from e3va_cli.models.heads import HEADS
from e3va_cli.models.model import build_meta_model
from e3va_cli.optim.lr_schedules import SCHEDULES
from e3va_cli.training.trainer import build_trainer

CONF = Path(next(iter(e3va_cli.conf.__path__)))
GROUPED = sorted(p.relative_to(CONF) for p in CONF.glob("*/*.yaml"))
ROOT = ["dataset.root=x"]


@pytest.mark.parametrize("path", GROUPED, ids=str)
def test_every_choice_composes(path):
    group, name = path.parts[0], path.stem
    words = [f"{group}={name}"]
    text = (CONF / path).read_text()
    validate_overrides("train", [*words, *(ROOT if "dataset.root=" in text else [])])


@pytest.mark.parametrize(
    "path", [p for p in GROUPED if p.parts[0] in ("backbone", "adapter", "head", "dataset")], ids=str
)
def test_a_choice_opens_with_the_command_that_uses_it(path):
    head = (CONF / path).read_text().splitlines()[:3]
    assert any(line.startswith("# e3va train") for line in head)


ONLY = {
    "shapes": {"mask_rcnn", "cascade_mask_rcnn", "retinanet"},
    "coco": {"mask_rcnn", "cascade_mask_rcnn", "retinanet"},
    "voc": {"retinanet"},
    "ade20k": {"upernet"},
}


@pytest.mark.parametrize("head", sorted(HEADS))
@pytest.mark.parametrize("dataset", sorted(DATASET_FORMATS))
def test_a_head_is_accepted_for_data_that_it_can_be_trained_on(config, dataset, head):
    options = config(f"dataset={dataset}", f"head={head}", *ROOT[: dataset != "shapes"])
    if head in ONLY[dataset]:
        check_compatibility(options)
        return
    with pytest.raises(UserError) as refused:
        check_compatibility(options)
    (line,) = refused.value.messages
    assert f"head={head}" in line and f"dataset={dataset}" in line
    advice = line.partition("for this data: head=")[2].partition("; for this head: dataset=")
    assert set(advice[0].split(" or ")) == ONLY[dataset]
    assert set(advice[2].split(" or ")) == {name for name, heads in ONLY.items() if head in heads}


def test_a_data_set_brings_its_head_and_its_metric(config):
    for dataset, head, metric in (
        ("shapes", "mask_rcnn", "coco"),
        ("coco", "mask_rcnn", "coco"),
        ("voc", "retinanet", "voc"),
        ("ade20k", "upernet", "miou"),
    ):
        options = config(f"dataset={dataset}", *ROOT[: dataset != "shapes"])
        assert (options.head.name, options.dataset.metric) == (head, metric)
        needs, _ = EVALUATORS[metric]
        assert needs <= HEADS[head].target_types <= DATASET_FORMATS[dataset].target_types


@pytest.mark.parametrize("dataset", ["coco", "voc", "ade20k"])
def test_every_schedule_composes_with_every_data_set(config, dataset):
    for name in SCHEDULES:
        options = config(f"dataset={dataset}", "dataset.root=x", f"schedule={name}")
        assert options.schedule.name == name
        assert options.schedule.total_batch == (2 if dataset == "voc" else 16)


def test_registries_and_choices_agree():
    names = {group: {p.stem for p in (CONF / group).glob("*.yaml")} for group in ("adapter", "dataset", "head")}
    assert set(METHODS) == names["adapter"]
    assert set(DATASET_FORMATS) == names["dataset"]
    assert set(HEADS) <= names["head"]


@pytest.mark.parametrize("option", ["backbone.dtype=int8", "backbone.offload=cpu", "backbone.compile=true"])
def test_what_a_frozen_backbone_alone_can_is_refused_where_gradients_go_through_it(config, option):
    for method in METHODS:
        options = config(option, f"adapter={method}")
        if issubclass(METHODS[method], FrozenBackbone):
            check_compatibility(options)
            build_meta_model(options, num_classes=3)
            continue
        for check in (check_compatibility, partial(build_meta_model, num_classes=3)):
            with pytest.raises(
                UserError, match=f"{option}: not supported by adapter={method}, .* adapter=e3va or e3va_plus or frozen"
            ):
                check(options)


@pytest.mark.parametrize("backbone", ["swin_nano", "convnext_t"])
def test_a_simple_pyramid_of_a_backbone_with_several_strides_is_refused(config, backbone):
    options = config(f"backbone={backbone}", "neck=simple_pyramid")
    for check in (check_compatibility, partial(build_meta_model, num_classes=3)):
        with pytest.raises(UserError, match=f"neck=simple_pyramid: .*backbone={backbone} has .* 4, 8, 16, 32; leave"):
            check(options)
    check_compatibility(config("backbone=dinov2_s", "neck=simple_pyramid"))


NO_SENSE = {
    "neck=fpn": "one of rescale, simple_pyramid",
    "seed=-1": "from 0 to 4294967295",
    "dataset.seed=-1": "from 0 to 4294967295",
    "backbone.seed=4294967296": "from 0 to 4294967295",
    "optimizer.betas=[0.9]": "two numbers from 0 to below 1",
    "trainer.limit_train_batches=0": "must be above 0",
    "head.rpn.anchor_sizes=[32,64]": "5 sizes in pixels",
    "head.box.regression_weights=[1,2]": "must be four numbers above 0",
    "dataset.flip=1.5": "from 0 to 1",
    "backbone.drop_path_rate=1": "from 0 to below 1",
    "schedule.warmup_max_fraction=0": "above 0 and at most 1",
    "schedule.epochs=0": "must be above 0",
}


def test_values_that_make_no_sense_are_refused_all_at_once():
    with pytest.raises(UserError) as refused:
        validate_overrides("train", list(NO_SENSE))
    for word, says in NO_SENSE.items():
        key = word.partition("=")[0]
        assert any(line.startswith(key) and says in line for line in refused.value.messages), word
    assert len(refused.value.messages) == len(NO_SENSE)


@pytest.mark.parametrize(
    ("command", "words", "says"),
    [
        ("train", ["optimizer.betas=[0.9,2]"], "optimizer.betas=[0.9, 2.0]: two numbers"),
        (
            "train",
            ["head=retinanet", "head.anchor_sizes=[32,64,128]"],
            "head.anchor_sizes=[32, 64, 128]: must be 5 sizes",
        ),
        ("train", ["head=cascade_mask_rcnn", "head.box.loss=l2"], "head.box.loss=l2: one of giou, smooth_l1"),
        (
            "train",
            ["trainer.early_stopping_patience=3", "trainer.limit_val_batches=0"],
            "trainer.early_stopping_patience=3: waits for evaluations",
        ),
        (
            "train",
            ["dataset.crop_probability=0.5", "dataset.crop_range=[9,4]"],
            "dataset.crop_range=[9, 4]: set it to [least,most]",
        ),
        (
            "train",
            ["dataset.crop_probability=1", "dataset.crop_short_sides=[]"],
            "dataset.crop_short_sides=[]: set it to at least one",
        ),
        (
            "train",
            ["schedule.epochs=null"],
            "trainer.max_epochs=null: set one of trainer.max_epochs",
        ),
        ("predict", ["checkpoint=x", "input=x", "score_threshold=1.5"], "score_threshold=1.5: from 0 to 1"),
        ("predict", ["checkpoint=x", "input=x", "accelerator=tpu"], "accelerator=tpu: one of auto, cpu, gpu"),
        ("export_adapter", ["checkpoint=x", "precision=int8"], "precision=int8: one of fp32, fp16"),
        ("benchmark_memory", ["measure=perhaps"], "measure=perhaps: one of auto, true, false"),
    ],
)
def test_a_value_that_makes_no_sense_is_one_line(command, words, says):
    with pytest.raises(UserError) as refused:
        validate_overrides(command, words)
    (line,) = refused.value.messages
    assert line.startswith(says)


@pytest.mark.parametrize(
    "words",
    [
        ["backbone.timm_name=resnet50"],
        ["backbone.timm_name=swinv2_tiny_window8_256"],
        ["backbone.timm_name=nothing"],
        ["+backbone.model_args.depth=3"],
        ["backbone.model_args.depths=[2,2]"],
        ["backbone.model_args.embed_dim=0"],
    ],
)
def test_options_of_no_swin_are_one_line(config, words):
    options = config("backbone=swin_nano", *words).backbone
    for build in (build_backbone, build_meta_backbone):
        with pytest.raises(UserError, match="cannot build timm_name=") as refused:
            build(options)
        assert len(refused.value.messages) == 1


@pytest.mark.parametrize("word", ["trainer.strategy=foo", "trainer.accelerator=tpu", "trainer.accelerator=nothing"])
def test_a_trainer_that_this_machine_has_not_is_one_line(config, tmp_path, word):
    with pytest.raises(UserError, match=r"^trainer: ") as refused:
        build_trainer(config(word), tmp_path, monitor="val/box_AP")
    assert len(refused.value.messages) == 1
