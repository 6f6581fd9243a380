"""Offloaded and quantized weights on a CUDA GPU; run with `make gpu-check`."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from e3va_cli.memory.estimate import estimate_memory
from e3va_cli.memory.measure import MeasuringProcess, Request
from e3va_cli.memory.step import StepSize
from e3va_cli.models.backbones.offload import host_weights, map_weights
from e3va_cli.utils.environment import MIB
from tests.components import tune

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_streamed_steps_equal_those_without(nano, activations, bits, tmp_path):
    """Many steps without waiting for the GPU, so that copies meet blocks that still compute."""
    if bits is not None:
        nano.quantize_weights(bits)
    images, results = torch.randn(2, 3, 448, 640, device="cuda"), []
    for host in (None, host_weights, partial(map_weights, path=tmp_path / "weights.safetensors")):
        backbone = copy.deepcopy(nano)
        if host is not None:
            backbone.offload_weights(host)
        extractor = tune(backbone, "e3va", rank=4, hidden_ratio=0.5, activations=activations)
        generator = torch.Generator().manual_seed(3)
        for parameter in extractor.adapters.parameters():
            nn.init.normal_(parameter, std=0.1, generator=generator)
        extractor.cuda()
        steps = []
        for _ in range(5):
            extractor.zero_grad()
            features = extractor(images)
            sum(feature.sin().sum() for feature in features).backward()
            steps.append([*features, *(p.grad for p in extractor.adapters.parameters())])
        results.append(steps)
        assert backbone.streamer is None or all(not p.is_cuda for p in offloaded(backbone))
    for streamed in results[1:]:
        for ours, reference in zip(streamed, results[0], strict=True):
            for one, other in zip(ours, reference, strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def offloaded(backbone):
    """The weight matrices of all blocks."""
    blocks = [branch.block for stage in backbone.stages for branch in stage.branches]
    return [layer.weight for block in blocks for layer in backbone.linears(block).values()]


@pytest.mark.parametrize(
    "words",
    [
        ["backbone.dtype=int8"],
        ["backbone.dtype=bfloat16", "backbone.offload=cpu"],
        ["backbone.dtype=int4", "backbone.offload=disk", "adapter.activations=recompute"],
    ],
    ids=str,
)
@pytest.mark.parametrize("backbone", ["swin_l", "dinov3_l"])
def test_the_plan_is_within_ten_percent_of_the_peak(config, monkeypatch, tmp_path, backbone, words):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    common = ["head=mask_rcnn", "trainer.precision=bf16-mixed", "dataset=coco", "dataset.root=."]
    options = config("adapter=e3va", f"backbone={backbone}", *common, *words, command="benchmark_memory")
    size = StepSize(1, (512, 672), 20, "bf16-mixed", 1.0)
    estimate = estimate_memory(options, size, num_classes=80).peak.total_bytes / MIB
    with MeasuringProcess() as process:
        measurement = process.measure(Request(options, size, 80, "cuda", warmup=1, repeats=1))
    assert estimate == pytest.approx(measurement.peak_mib, rel=0.1)
