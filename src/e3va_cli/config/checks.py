"""Checks of values that types alone do not show, within one option and across several."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from e3va_cli.config.backbones import unpublished_args
from e3va_cli.config.commands import BenchmarkMemoryConfig

PRECISIONS = ("32", "16-mixed", "bf16-mixed")
COMPUTED_IN = {"16-mixed": "float16", "bf16-mixed": "bfloat16"}
EXPORT_PRECISIONS = ("fp32", "fp16")
CHOICES: dict[str, tuple[Any, ...]] = {
    "schedule.lr_scaling": ("linear", "sqrt", "none"),
    "adapter.init": ("zero", "kaiming"),
    "adapter.activations": ("keep", "compress", "recompute"),
    "adapter.compress_bits": (16, 8),
    "head.box.loss": ("giou", "smooth_l1"),
    "head.box.score_averaging": ("logits", "probabilities"),
    "head.p6_from": ("c5", "p5"),
    "backbone.dtype": ("float32", "bfloat16", "float16"),
    "measure": ("auto", True, False),
    "accelerator": ("auto", "cpu", "gpu"),
    "precision": EXPORT_PRECISIONS,
}
PROBABILITIES = (
    "dataset.flip",
    "dataset.crop_one_class",
    "dataset.crop_probability",
    "adapter.dropout",
    "head.dropout",
    "score",
)
LENGTHS = ("trainer.max_epochs", "schedule.epochs", "schedule.iterations")
ANCHOR_SIZES = ("head.rpn.anchor_sizes", "head.anchor_sizes")
LEVELS = 5  # of the feature pyramids of detectors
SEEDS = ("seed", "dataset.seed", "backbone.seed")

POSITIVE = (
    "adapter.rank",
    "adapter.hidden_ratio",
    "adapter.hidden",
    "adapter.scale",
    "adapter.alpha",
    "adapter.branches",
    "adapter.init_std",
    "head.fpn_channels",
    "head.anchors_per_octave",
    "head.auxiliary_channels",
    "head.window",
    "head.stride",
    "batch_size",
    "data.batch_size",
    "data.val_batch_size",
    "optimizer.lr",
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.limit_train_batches",
    "trainer.num_nodes",
    "trainer.accumulate_grad_batches",
    "trainer.val_every_epochs",
    "trainer.log_every_n_steps",
    "trainer.checkpoint_every_steps",
    "trainer.max_bad_losses",
    "trainer.gradient_clip_norm",
    "dataset.image_size",
    "dataset.train_images",
    "dataset.val_images",
    "dataset.val_short_side",
    "dataset.max_size",
    "dataset.num_classes",
    "dataset.short_side",
    "dataset.crop_size",
    "schedule.epochs",
    "schedule.iterations",
    "schedule.total_batch",
    "instances_per_image",
    "repeats",
)
NOT_NEGATIVE = (
    "data.num_workers",
    "optimizer.weight_decay",
    "head.auxiliary_weight",
    "head.box.sampling_ratio",
    "head.mask.sampling_ratio",
    "schedule.warmup_steps",
    "schedule.min_steps",
    "trainer.limit_val_batches",
    "trainer.early_stopping_patience",
    "pictures",
    "warmup",
    "reserve_mib",
    "tolerance",
)

NEEDED = "a value is needed"
Value = Callable[[str], Any]
"""The value of a dotted key; None where there is no such key, or nothing in it."""


def is_encoding(name: str) -> bool:
    """Whether Python has an encoding of text of that name."""
    try:
        "".encode(name)
    except (LookupError, UnicodeError, ValueError):
        return False
    return True


def problems(cfg: DictConfig) -> list[str]:
    """Every mistake that types alone do not show, one line each, naming the option and what would be right."""
    reads_data = OmegaConf.get_type(cfg) is not BenchmarkMemoryConfig
    missing = OmegaConf.missing_keys(cfg)
    needed = sorted(key for key in missing if reads_data or key != "dataset.root")

    def value(key: str) -> Any:
        return None if key in missing else OmegaConf.select(cfg, key)

    found = [f"{key}: {NEEDED}" for key in needed]
    for check in (_ranges, _choices, _precision, _trainer, _optimizer, _schedule, _backbone, _head, _images):
        found += check(value)
    if "trainer" in cfg and reads_data and all(value(key) is None for key in LENGTHS):
        found.append(f"trainer.max_epochs=null: how long? Give one of {', '.join(LENGTHS)}")
    return found


def _ranges(value: Value) -> Iterator[str]:
    for key in (*POSITIVE, *NOT_NEGATIVE):
        number = value(key)
        if not isinstance(number, int | float):
            continue
        if key in POSITIVE and not number > 0:
            yield f"{key}={number}: must be above 0"
        elif key in NOT_NEGATIVE and not number >= 0:
            yield f"{key}={number}: must be 0 or above"
    for key in PROBABILITIES:
        probability = value(key)
        if probability is not None and not 0 <= probability <= 1:
            yield f"{key}={probability}: from 0 to 1"
    for key in SEEDS:
        seed = value(key)
        if seed is not None and not 0 <= seed < 2**32:
            yield f"{key}={seed}: from 0 to {2**32 - 1}"


def _choices(value: Value) -> Iterator[str]:
    for key, allowed in CHOICES.items():
        chosen = value(key)
        if chosen is not None and chosen not in allowed:
            yield f"{key}={chosen}: one of {', '.join(str(one).lower() for one in allowed)}"


def _precision(value: Value) -> Iterator[str]:
    precision = value("trainer.precision")
    if precision == "bf16-true":
        yield (
            "trainer.precision=bf16-true: torchvision has no NMS in bfloat16, and box coordinates up to 1333 need "
            "more than its 8 bits; use bf16-mixed"
        )
    elif precision is not None and precision not in PRECISIONS:
        yield f"trainer.precision={precision}: one of {', '.join(PRECISIONS)}"
    dtype, computed_in = value("backbone.dtype"), COMPUTED_IN.get(str(precision))
    if computed_in and dtype in set(COMPUTED_IN.values()) - {computed_in}:
        yield (
            f"backbone.dtype={dtype} does not go with trainer.precision={precision}; choose "
            f"backbone.dtype={computed_in} or float32, or trainer.precision=32"
        )


def _trainer(value: Value) -> Iterator[str]:
    devices = value("trainer.devices")
    is_list = OmegaConf.is_list(devices) and len(devices) > 0 and all(isinstance(d, int) for d in devices)
    is_count = isinstance(devices, int) and not isinstance(devices, bool) and (devices > 0 or devices == -1)
    if devices is not None and devices != "auto" and not is_list and not is_count:
        yield f"trainer.devices={devices}: a count, auto, or a list of device indices such as [0,1]"
    preemption = value("trainer.preemption_signal")
    if preemption is not None and preemption not in signal.Signals.__members__:
        yield f"trainer.preemption_signal={preemption}: the name of a signal, such as SIGUSR1 or SIGUSR2, or null"
    patience = value("trainer.early_stopping_patience")
    if patience is not None and value("trainer.limit_val_batches") == 0:
        yield (
            f"trainer.early_stopping_patience={patience}: waits for evaluations, which trainer.limit_val_batches=0 "
            "leaves out; leave out one of them"
        )


def _optimizer(value: Value) -> Iterator[str]:
    betas = value("optimizer.betas")
    if betas is not None and (len(betas) != 2 or not all(0 <= beta < 1 for beta in betas)):
        yield f"optimizer.betas={betas}: two numbers from 0 to below 1"


def _schedule(value: Value) -> Iterator[str]:
    ratio = value("schedule.warmup_ratio")
    if ratio is not None and not 0 < ratio <= 1:
        yield f"schedule.warmup_ratio={ratio}: above 0 and at most 1"
    fraction = value("schedule.warmup_max_fraction")
    if fraction is not None and not 0 < fraction <= 1:
        yield f"schedule.warmup_max_fraction={fraction}: above 0 and at most 1"
    milestones = value("schedule.milestones")
    if milestones is not None and list(milestones) != sorted(set(milestones)):
        yield f"schedule.milestones={milestones}: must rise"


def _backbone(value: Value) -> Iterator[str]:
    others = unpublished_args(value("backbone.model_args") or {})
    if value("backbone.pretrained") and others:
        yield (
            f"backbone.pretrained=true: nobody publishes weights for {value('backbone.name')} with "
            f"{', '.join(f'model_args.{name}' for name in others)}; choose swin_t, swin_s, swin_b or swin_l unchanged, "
            "or give backbone.weights=FILE"
        )
    drop_path = value("backbone.drop_path_rate")
    if drop_path is not None and not 0 <= drop_path < 1:
        yield f"backbone.drop_path_rate={drop_path}: from 0 to below 1"
    if value("backbone.pretrained") and value("backbone.weights"):
        yield "backbone.pretrained=true and backbone.weights= exclude each other: give one of them"


def _head(value: Value) -> Iterator[str]:
    for key in ANCHOR_SIZES:
        sizes = value(key)
        if sizes is not None and (len(sizes) != LEVELS or min(sizes) < 1):
            yield f"{key}={sizes}: {LEVELS} sizes in pixels, one for each level of the feature pyramid"
    weights = value("head.box.regression_weights")
    if weights is None:
        return
    stage_weights = value("head.box.stage_loss_weights")
    for one in [weights] if stage_weights is None else weights:
        numbers = list(one) if OmegaConf.is_list(one) else []
        if len(numbers) != 4 or not all(isinstance(n, int | float) and n > 0 for n in numbers):
            yield f"head.box.regression_weights: {one} is no list of four numbers above 0"
    if stage_weights is not None:
        lists = {"fg_iou": value("head.box.fg_iou"), "regression_weights": weights, "stage_loss_weights": stage_weights}
        if len({len(one) for one in lists.values()}) > 1:
            counts = ", ".join(f"head.box.{key} has {len(one)}" for key, one in lists.items())
            yield f"{counts}: each needs one entry for each stage"


def _images(value: Value) -> Iterator[str]:
    sides = value("dataset.train_short_sides")
    if sides is not None and (not sides or min(sides) < 1):
        yield f"dataset.train_short_sides={sides}: at least one size, in pixels"
    if value("dataset.crop_probability"):
        crop_sides, crop = value("dataset.crop_short_sides"), value("dataset.crop_range")
        if not crop_sides or min(crop_sides) < 1:
            yield f"dataset.crop_short_sides={crop_sides}: at least one size, in pixels"
        if not crop or len(crop) != 2 or not 0 < crop[0] <= crop[1]:
            yield f"dataset.crop_range={crop}: [least,most] of the sides of a crop, in pixels"
    scales = value("dataset.scales")
    if scales is not None and (len(scales) != 2 or not 0 < scales[0] <= scales[1]):
        yield f"dataset.scales={scales}: [least,most], factors of the size above 0"
    encoding = value("dataset.encoding")
    if encoding is not None and not is_encoding(encoding):
        yield f"dataset.encoding={encoding}: no encoding of text, such as gbk, cp1251 or latin-1"
    limits = value("dataset.intensity_range")
    if limits is not None and (len(limits) != 2 or not limits[0] < limits[1]):
        yield f"dataset.intensity_range={limits}: [least,most], what becomes black and white, such as [0,4095]"
    percentiles = value("dataset.intensity_percentiles")
    if percentiles is not None and (len(percentiles) != 2 or not 0 <= percentiles[0] < percentiles[1] <= 100):
        yield f"dataset.intensity_percentiles={percentiles}: [least,most], from 0 to 100"
    image_size = value("image_size")
    if image_size is not None and (len(image_size) != 2 or min(image_size) < 32):
        yield f"image_size={image_size}: [height,width] in pixels, at least 32 each"
