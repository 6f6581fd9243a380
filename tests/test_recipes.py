"""The experiments against the recipes of the paper's group, written out here from its configurations."""

import pytest
import torch
from timm.layers import DropPath

from e3va_cli.config.composition import validate_overrides
from e3va_cli.config.run_config import to_dict
from e3va_cli.errors import UserError
from e3va_cli.training.run import train_schedule_from_config
from tests.components import build_backbone, build_meta_backbone, build_optimizer, build_schedule, tune
from tests.conftest import NANO

COMMON = {
    "backbone.timm_name": "swin_large_patch4_window7_224.ms_in22k",
    "optimizer.lr": 1e-4,
    "optimizer.weight_decay": 0.05,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.decay_biases": True,  # paramwise_cfg exempts norms and tables of relative position bias alone
    "trainer.gradient_clip_norm": None,
    "trainer.precision": "16-mixed",
}
COCO = {
    **COMMON,
    "backbone.drop_path_rate": 0.3,
    "head.name": "cascade_mask_rcnn",
    "dataset.train_short_sides": [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
    "dataset.max_size": 1333,
    "dataset.flip": 0.5,
    "dataset.crop_probability": 0.5,  # AutoAugment draws one of two policies
    "dataset.crop_short_sides": [400, 500, 600],
    "dataset.crop_range": [384, 600],
    "dataset.filter_empty": True,
    "dataset.metric": "coco",
    "schedule.epochs": 36,
    "schedule.milestones": [27, 33],
    "schedule.gamma": 0.1,
    "schedule.warmup_steps": 1000,
    "schedule.warmup_ratio": 0.001,
    "schedule.total_batch": 16,
    "trainer.val_every_epochs": 3,
}
RECIPES = {
    "coco_cascade_swin_l": COCO,
    "coco_cascade_swin_b": {**COCO, "backbone.timm_name": "swin_base_patch4_window7_224.ms_in22k"},
    "voc_retinanet_swin_l": {
        **COMMON,
        "backbone.drop_path_rate": 0.2,
        "head.name": "retinanet",
        "dataset.train_short_sides": [600],
        "dataset.max_size": 1000,
        "dataset.flip": 0.5,
        "dataset.crop_probability": 0.0,
        "dataset.metric": "voc_11_point",
        "schedule.epochs": 4 * 3,
        "schedule.milestones": [3 * 3],
        "schedule.warmup_steps": 0,
        "schedule.total_batch": 2,
        "trainer.val_every_epochs": 3,
    },
    "ade20k_upernet_swin_l": {
        **COMMON,
        "backbone.drop_path_rate": 0.3,
        "head.name": "upernet",
        "optimizer.lr": 6e-5,
        "optimizer.weight_decay": 0.01,
        "dataset.crop_size": 512,
        "dataset.metric": "miou",
        "schedule.name": "poly",
        "schedule.iterations": 160_000,
        "schedule.warmup_steps": 1500,
        "schedule.total_batch": 16,
        "trainer.precision": "32",
    },
}


def value_of(options, key):
    for name in key.split("."):
        options = getattr(options, name)
    return options


@pytest.mark.parametrize("experiment", RECIPES)
def test_an_experiment_is_the_groups_recipe(config, experiment):
    options = config(f"experiment={experiment}", "dataset.root=x")
    assert {key: value_of(options, key) for key in RECIPES[experiment]} == RECIPES[experiment]


def test_the_voc_experiments_learning_rate(config):
    """16,551 images, 2 a step: 1e-4 from the first step on, 1e-5 from the 10th pass on, nothing rescaled."""
    options = config("experiment=voc_retinanet_swin_l", "dataset.root=x")
    course = train_schedule_from_config(options, batches_per_epoch=8275, devices=1)
    assert (course.rescaled, course.total_steps) == (False, 12 * 8275)
    factor = build_schedule("multistep", course, warmup_ratio=0.001, milestones=[9], gamma=0.1)
    rates = [course.lr * factor(step) for step in (0, 9 * 8275 - 1, 9 * 8275, 12 * 8275 - 1)]
    assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5])


def rates_of(backbone):
    return [
        b.drop_path.drop_prob if isinstance(b.drop_path, DropPath) else 0.0 for s in backbone.stages for b in s.branches
    ]


@pytest.mark.parametrize("experiment", RECIPES)
def test_drop_path_rises_from_block_to_block(config, experiment):
    options = to_dict(config(f"experiment={experiment}", "dataset.root=x").backbone)
    backbone, _ = build_meta_backbone(**options)
    expected = torch.linspace(0, RECIPES[experiment]["backbone.drop_path_rate"], 24).repeat_interleave(2)
    assert rates_of(backbone) == pytest.approx(expected.tolist())


def test_the_last_of_two_words_on_drop_path():
    """An option of timm's in model_args, as before there was one of ours, is the more special one."""
    options = {**NANO, "model_args": {**NANO["model_args"], "drop_path_rate": 0.4}}
    backbone, _ = build_backbone(**options, pretrained=False, weights=None, seed=0, drop_path_rate=0.2)
    assert max(rates_of(backbone)) == pytest.approx(0.4)


@pytest.mark.parametrize("method", ["e3va", "frozen", "lora"])
def test_a_frozen_backbone_drops_nothing(config, method):
    backbone, _ = build_backbone(**NANO, pretrained=False, weights=None, seed=0, drop_path_rate=0.9)
    extractor = tune(backbone, **to_dict(config(f"adapter={method}").adapter)).train()
    images = torch.randn(2, 3, 64, 64)
    first, second = extractor(images), extractor(images)
    same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert same == (method != "lora")


def test_output_norms_are_trained_and_not_decayed_under_every_method(nano, config):
    for method in ("full", "e3va", "lora"):
        extractor = tune(nano, **to_dict(config(f"adapter={method}").adapter))
        groups = build_optimizer(extractor, lr=1.0, weight_decay=0.1, betas=[0.9, 0.9], decay_biases=True).param_groups
        plain = {id(p) for p in groups[1]["params"]}
        assert {id(p) for p in extractor.norms.parameters()} <= plain


@pytest.mark.parametrize(
    "words",
    [
        ["backbone=swin_b", "+backbone.model_args.drop_path_rate=0.3"],
        ["backbone=swin_l", "+backbone.model_args.drop_path_rate=0.3", "+backbone.model_args.attn_drop_rate=0.1"],
        ["backbone=swin_b", "backbone.drop_path_rate=0.3"],
    ],
)
def test_published_weights_go_with_options_that_change_none(words):
    validate_overrides("train", ["backbone.pretrained=true", *words])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["backbone=swin_nano", "backbone.packaged_weights=null"],
            "there are no published weights for swin_nano with model_args.depths, model_args.embed_dim",
        ),
        (
            ["backbone=swin_b", "+backbone.model_args.window_size=12", "+backbone.model_args.drop_path_rate=0.3"],
            "there are no published weights for swin_b with model_args.window_size;",
        ),
    ],
)
def test_published_weights_do_not_go_with_another_network(words, says):
    with pytest.raises(UserError) as refused:
        validate_overrides("train", ["backbone.pretrained=true", *words])
    (line,) = refused.value.messages
    assert says in line and "or set backbone.weights=FILE" in line
