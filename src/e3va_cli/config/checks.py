"""Checks of values that types alone do not show, within one option and across several."""

from __future__ import annotations

import signal
from typing import Any

from omegaconf import DictConfig, OmegaConf

from e3va_cli.config.commands import BenchmarkMemoryConfig

PRECISIONS = ("32", "16-mixed", "bf16-mixed")
COMPUTED_IN = {"16-mixed": "float16", "bf16-mixed": "bfloat16"}
BOX_LOSSES = ("giou", "smooth_l1")
CHOICES: dict[str, tuple[Any, ...]] = {
    "schedule.lr_scaling": ("linear", "sqrt", "none"),
    "adapter.activations": ("keep", "compress", "recompute"),
    "adapter.compress_bits": (16, 8),
    "backbone.dtype": ("float32", "bfloat16", "float16"),
}

POSITIVE = (
    "adapter.rank",
    "adapter.hidden_ratio",
    "adapter.hidden",
    "adapter.scale",
    "adapter.alpha",
    "adapter.branches",
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
    "schedule.iterations",
    "schedule.total_batch",
    "instances_per_image",
    "repeats",
)
NOT_NEGATIVE = (
    "data.num_workers",
    "optimizer.weight_decay",
    "head.auxiliary_weight",
    "schedule.warmup_steps",
    "trainer.limit_train_batches",
    "trainer.limit_val_batches",
    "trainer.early_stopping_patience",
    "pictures",
    "warmup",
    "reserve_mib",
    "score",
    "tolerance",
)

NEEDED = "a value is needed"


def problems(cfg: DictConfig) -> list[str]:
    """Every mistake that types alone do not show, one line each, naming the option and what would be right."""
    reads_data = OmegaConf.get_type(cfg) is not BenchmarkMemoryConfig
    missing = OmegaConf.missing_keys(cfg)
    needed = sorted(key for key in missing if reads_data or key != "dataset.root")
    found = [f"{key}: {NEEDED}" for key in needed]

    def value(key: str) -> Any:
        return None if key in missing else OmegaConf.select(cfg, key)

    for key in (*POSITIVE, *NOT_NEGATIVE):
        number = value(key)
        if not isinstance(number, int | float):
            continue
        if key in POSITIVE and not number > 0:
            found.append(f"{key}={number}: must be above 0")
        elif key in NOT_NEGATIVE and not number >= 0:
            found.append(f"{key}={number}: must be 0 or above")
    precision = value("trainer.precision")
    if precision == "bf16-true":
        found.append(
            "trainer.precision=bf16-true: torchvision has no NMS in bfloat16, and box coordinates up to 1333 need "
            "more than its 8 bits; use bf16-mixed"
        )
    elif precision is not None and precision not in PRECISIONS:
        found.append(f"trainer.precision={precision}: one of {', '.join(PRECISIONS)}")
    dtype, computed_in = value("backbone.dtype"), COMPUTED_IN.get(str(precision))
    if computed_in and dtype in set(COMPUTED_IN.values()) - {computed_in}:
        found.append(
            f"backbone.dtype={dtype} does not go with trainer.precision={precision}; choose "
            f"backbone.dtype={computed_in} or float32, or trainer.precision=32"
        )
    preemption = value("trainer.preemption_signal")
    if preemption is not None and preemption not in signal.Signals.__members__:
        found.append(
            f"trainer.preemption_signal={preemption}: the name of a signal, such as SIGUSR1 or SIGUSR2, or null"
        )
    found += _cascade_problems(value("head.box"))
    devices = value("trainer.devices")
    is_list = OmegaConf.is_list(devices) and len(devices) > 0 and all(isinstance(d, int) for d in devices)
    is_count = isinstance(devices, int) and not isinstance(devices, bool) and (devices > 0 or devices == -1)
    if devices is not None and devices != "auto" and not is_list and not is_count:
        found.append(f"trainer.devices={devices}: a count, auto, or a list of device indices such as [0,1]")
    for key in ("dataset.flip", "dataset.crop_one_class", "adapter.dropout", "head.dropout"):
        probability = value(key)
        if probability is not None and not 0 <= probability <= 1:
            found.append(f"{key}={probability}: a probability from 0 to 1")
    for key, allowed in CHOICES.items():
        chosen = value(key)
        if chosen is not None and chosen not in allowed:
            found.append(f"{key}={chosen}: one of {', '.join(map(str, allowed))}")
    sides = value("dataset.train_short_sides")
    if sides is not None and (not sides or min(sides) < 1):
        found.append(f"dataset.train_short_sides={sides}: at least one size, in pixels")
    scales = value("dataset.scales")
    if scales is not None and (len(scales) != 2 or not 0 < scales[0] <= scales[1]):
        found.append(f"dataset.scales={scales}: [least,most], factors of the size above 0")
    lengths = ("trainer.max_epochs", "schedule.iterations")
    if "trainer" in cfg and reads_data and all(value(key) is None for key in lengths):
        found.append(f"trainer.max_epochs=null: how long? Give one of {', '.join(lengths)}")
    ratio = value("schedule.warmup_ratio")
    if ratio is not None and not 0 < ratio <= 1:
        found.append(f"schedule.warmup_ratio={ratio}: above 0 and at most 1")
    milestones = value("schedule.milestones")
    if milestones is not None and list(milestones) != sorted(set(milestones)):
        found.append(f"schedule.milestones={milestones}: must rise")
    if value("backbone.pretrained") and value("backbone.model_args"):
        found.append(
            f"backbone.pretrained=true: nobody publishes weights for {value('backbone.name')}; "
            "choose swin_t, swin_s, swin_b or swin_l, or give backbone.weights=FILE"
        )
    if value("backbone.pretrained") and value("backbone.weights"):
        found.append("backbone.pretrained=true and backbone.weights= exclude each other: give one of them")
    measure = value("measure")
    if measure is not None and measure not in ("auto", True, False):
        found.append(f"measure={measure}: auto, true or false")
    image_size = value("image_size")
    if image_size is not None and (len(image_size) != 2 or min(image_size) < 32):
        found.append(f"image_size={image_size}: [height,width] in pixels, at least 32 each")
    return found


def _cascade_problems(box: DictConfig | None) -> list[str]:
    """Mistakes in what a cascade's box stages list, one entry for each stage."""
    if box is None or "stage_loss_weights" not in box:
        return []
    found = []
    lengths = {f"head.box.{key}": len(box[key]) for key in ("fg_iou", "regression_weights", "stage_loss_weights")}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{key} has {count}" for key, count in lengths.items())
        found.append(f"{counts}: each needs one entry for each stage")
    for weights in box.regression_weights:
        numbers = list(weights) if OmegaConf.is_list(weights) else []
        if len(numbers) != 4 or not all(isinstance(n, int | float) and n > 0 for n in numbers):
            found.append(f"head.box.regression_weights: {weights} is no list of four numbers above 0")
    if box.loss not in BOX_LOSSES:
        found.append(f"head.box.loss={box.loss}: one of {', '.join(BOX_LOSSES)}")
    return found
