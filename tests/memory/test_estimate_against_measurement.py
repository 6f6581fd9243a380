"""Estimates against the same step with real tensors, and estimates of larger steps."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from e3va_cli.memory.benchmark import free_mib
from e3va_cli.memory.estimate import estimate_memory
from e3va_cli.memory.measure import Request, measure_in_process
from e3va_cli.memory.step import StepSize
from e3va_cli.memory.tracker import ACTIVATIONS, CATEGORIES
from e3va_cli.models.adapters import METHODS
from e3va_cli.models.backbones.swin import build_swin

MIB = 2**20
WITHIN = 0.05
NANO_ARGS = {"embed_dim": 32, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}


def step(precision="32", batch_size=1, image_size=(250, 320), instances=20):
    return StepSize(batch_size, image_size, instances, precision, clip_norm=1.0)


@pytest.mark.parametrize(
    ("method", "precision"),
    [
        ("full", "32"),
        ("lora", "32"),
        ("partial_1", "32"),
        ("e3va", "32"),
        ("full", "bf16-mixed"),
        ("e3va", "bf16-mixed"),
    ],
)
def test_estimate_is_within_five_percent_of_the_measurement(config, method, precision):
    options = config(f"adapter={method}", "head=mask_rcnn_nano")
    size = step(precision, batch_size=2, image_size=(90, 128))
    estimate = estimate_memory(options, size, num_classes=80, device_type="cpu")
    measurement = measure_in_process(Request(options, size, 80, "cpu", warmup=0, repeats=0))
    assert estimate.peak.total_bytes / MIB == pytest.approx(measurement.peak_mib, rel=WITHIN)
    assert estimate.rois == measurement.rois
    for kind in CATEGORIES:
        assert estimate.peak.by_category[kind] / MIB == pytest.approx(
            measurement.by_category_mib[kind], abs=WITHIN * measurement.peak_mib
        )


CASCADE = [
    "head=cascade_mask_rcnn",
    "head.fpn_channels=32",
    "head.box.conv_channels=[32]",
    "head.box.hidden=64",
    "head.box.batch_size_per_image=64",
    "head.rpn.pre_nms_train=400",
    "head.rpn.post_nms_train=300",
    "head.mask.channels=[32]",
    "head.mask.predictor_channels=32",
]


@pytest.mark.parametrize("precision", ["32", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["full", "e3va"])
@pytest.mark.parametrize(
    "head",
    [CASCADE, ["head=retinanet", "head.fpn_channels=64"], ["head=upernet_nano"]],
    ids=lambda arguments: arguments[0],
)
def test_every_head_is_within_five_percent(config, head, method, precision):
    options = config(f"adapter={method}", *head)
    size = step(precision, batch_size=2, image_size=(200, 256), instances=12)
    estimate = estimate_memory(options, size, num_classes=30, device_type="cpu")
    measurement = measure_in_process(Request(options, size, 30, "cpu", warmup=0, repeats=0))
    assert estimate.peak.total_bytes / MIB == pytest.approx(measurement.peak_mib, rel=WITHIN)
    assert estimate.rois == measurement.rois


TINY_VIT = {
    "dinov2_s": "+backbone.model_args={depth: 4, embed_dim: 48, num_heads: 3, img_size: 70}",
    "dinov3_s": "+backbone.model_args={depth: 4, embed_dim: 64, num_heads: 2}",
}


@pytest.mark.parametrize(
    ("backbone", "overrides"),
    [
        *(("dinov3_s", [f"adapter={method}"]) for method in METHODS),
        *(("dinov2_s", [f"adapter={method}"]) for method in ("full", "lora", "mona", "e3va")),
        ("dinov3_s", ["adapter=full", "trainer.precision=bf16-mixed"]),
        ("dinov3_s", ["adapter=e3va", "trainer.precision=bf16-mixed"]),
        ("dinov2_s", ["adapter=e3va", "adapter.activations=recompute"]),
        ("dinov3_s", ["adapter=e3va", "adapter.activations=compress"]),
        ("dinov3_s", ["adapter=e3va", "backbone.dtype=bfloat16"]),
        ("dinov3_s", ["adapter=full", "neck=simple_pyramid"]),
        ("dinov3_s", ["adapter=e3va", "neck=simple_pyramid"]),
    ],
    ids=str,
)
def test_vision_transformers_are_within_five_percent(config, backbone, overrides):
    options = config(f"backbone={backbone}", TINY_VIT[backbone], "head=upernet_nano", *overrides)
    size = step(options.trainer.precision, batch_size=2, image_size=(120, 160))
    estimate = estimate_memory(options, size, num_classes=5, device_type="cpu")
    measurement = measure_in_process(Request(options, size, 5, "cpu", warmup=0, repeats=0))
    assert estimate.peak.total_bytes / MIB == pytest.approx(measurement.peak_mib, rel=WITHIN)


def test_full_size_head_is_within_five_percent(config):
    options = config("backbone=swin_t", "adapter=e3va", "head=mask_rcnn")
    estimate = estimate_memory(options, step(), num_classes=80, device_type="cpu")
    measurement = measure_in_process(Request(options, step(), 80, "cpu", warmup=0, repeats=0))
    assert estimate.peak.total_bytes / MIB == pytest.approx(measurement.peak_mib, rel=WITHIN)
    assert (
        estimate.rois
        == measurement.rois
        == {
            "head.roi_heads.box_roi_pool": 512,
            "head.roi_heads.mask_roi_pool": 128,
        }
    )


def test_estimate_above_the_memory_of_this_machine(config):
    options = config("backbone=swin_l", "adapter=full", "head=mask_rcnn")
    batch = int(free_mib() / 4000) + 2  # more than 4 GiB an image
    estimate = estimate_memory(options, step(batch_size=batch, image_size=(800, 1333)), num_classes=80)
    assert estimate.peak.total_bytes / MIB > free_mib()
    assert sum(estimate.peak.by_category.values()) == estimate.peak.total_bytes


def test_e3va_needs_less_than_half_of_full_and_no_activation_of_the_blocks(config):
    size = step(batch_size=2, image_size=(800, 1333))
    plans = {
        method: estimate_memory(config("backbone=swin_t", f"adapter={method}", "head=mask_rcnn"), size, num_classes=80)
        for method in ("full", "frozen", "e3va")
    }
    activations = {m: sum(p.peak.by_category[kind] for kind in ACTIVATIONS) for m, p in plans.items()}
    assert plans["frozen"].peak.total_bytes < plans["e3va"].peak.total_bytes < plans["full"].peak.total_bytes / 2
    assert plans["e3va"].peak.by_category["backbone"] < 0.05 * plans["full"].peak.by_category["backbone"]
    assert activations["frozen"] < activations["e3va"] < activations["full"]


def test_memory_rises_with_the_batch_and_falls_in_half_precision(config):
    options = config("adapter=full", "head=mask_rcnn_nano")
    one, three = (estimate_memory(options, step(batch_size=b), num_classes=80).peak for b in (1, 3))
    assert 2 < three.by_category["backbone"] / one.by_category["backbone"] < 3.5
    cuda, cpu = (
        estimate_memory(options, step("bf16-mixed", batch_size=3), num_classes=80, device_type=s).peak
        for s in ("cuda", "cpu")
    )
    assert cuda.total_bytes < 0.9 * three.total_bytes
    # CUDA's autocast leaves norms and softmax in float32, the CPU's does not.
    assert 1.05 * cpu.by_category["backbone"] < cuda.by_category["backbone"] < three.by_category["backbone"]


def test_steady_state_has_optimizer_state_and_no_gradients_in_the_forward_pass(config):
    estimate = estimate_memory(config("adapter=full", "head=mask_rcnn_nano"), step(), num_classes=80)
    kinds = estimate.peak.by_category
    assert estimate.peak.phase == "forward" and kinds["gradients"] == 0
    assert kinds["optimizer"] == pytest.approx(2 * kinds["weights"], rel=0.02)


def test_estimate_for_a_gpu_has_cublas_workspaces(config):
    cuda, cpu = (
        estimate_memory(config(), step(), num_classes=80, device_type=device_type) for device_type in ("cuda", "cpu")
    )
    assert cuda.peak.by_category["workspaces"] == 2 * 32 * MIB and cpu.peak.by_category["workspaces"] == 0
    assert (
        cuda.peak.total_bytes - cpu.peak.total_bytes
        == cuda.between_steps_bytes - cpu.between_steps_bytes
        == 2 * 32 * MIB
    )


def test_the_largest_image_of_multi_scale_training(config):
    dataset = config("dataset=coco", "dataset.root=x").dataset
    assert dataset.largest_image == (800, 1333)
    assert step(image_size=(800, 1333)).padded_size == (800, 1344)


def test_accumulated_gradients_exist_in_the_forward_pass(config):
    options = config("adapter=full", "head=mask_rcnn_nano")
    sizes = [dataclasses.replace(step(), accumulates=accumulates) for accumulates in (False, True)]
    once, accumulated = (estimate_memory(options, size, num_classes=80, device_type="cpu").peak for size in sizes)
    assert accumulated.by_category["gradients"] == pytest.approx(accumulated.by_category["weights"], rel=0.01)
    assert accumulated.total_bytes == once.total_bytes + accumulated.by_category["gradients"]
    measurement = measure_in_process(Request(options, sizes[1], 80, "cpu", warmup=0, repeats=0))
    assert accumulated.total_bytes / MIB == pytest.approx(measurement.peak_mib, rel=WITHIN)


def test_flops_are_those_of_the_layers(config):
    """UPerNet's step is the backbone once with frozen weights, three times with trained ones, and the same head."""
    size = step(image_size=(128, 128))
    operations = {
        method: estimate_memory(config(f"adapter={method}", "head=upernet_nano"), size, num_classes=20).flops
        for method in ("full", "frozen", "e3va")
    }
    backbone = build_swin("swin_tiny_patch4_window7_224", **NANO_ARGS)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        backbone(torch.zeros(1, 3, 128, 128))
    # Nothing is differentiated with respect to the images, so that the patch embedding counts twice.
    stem = 2 * 32 * 32 * 32 * 48
    assert operations["full"] - operations["frozen"] == 2 * forward.get_total_flops() - stem
    assert operations["frozen"] < operations["e3va"] < 1.1 * operations["frozen"]
