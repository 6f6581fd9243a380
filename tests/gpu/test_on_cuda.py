"""What only a CUDA GPU can show; run with `make gpu-check`."""

import copy
import json

import pytest
import torch
from torch import nn

from e3va_cli.memory.estimate import estimate_memory
from e3va_cli.memory.measure import MeasuringProcess, Request
from e3va_cli.memory.step import StepSize
from e3va_cli.models.backbones.swin import build_swin
from e3va_cli.utils.environment import MIB
from tests.components import tune
from tests.conftest import QUICK

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
ON_CUDA = [word.replace("accelerator=cpu", "accelerator=cuda") for word in QUICK]


def test_features_equal_the_cpus():
    backbone = build_swin("swin_tiny_patch4_window7_224")
    extractor = tune(backbone, "e3va", rank=16, hidden_ratio=0.5)
    images = torch.randn(1, 3, 224, 320)
    with torch.no_grad():
        expected = extractor(images)
        found = extractor.cuda()(images.cuda())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, atol=1e-2, rtol=1e-2)  # TF32 may be on


@pytest.mark.parametrize("options", [{}, {"activations": "compress"}, {"activations": "recompute"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_equal_the_cpus(nano, options, dtype):
    images, results = torch.randn(2, 3, 224, 320), []
    for device in ("cpu", "cuda"):
        extractor = tune(copy.deepcopy(nano), "e3va", rank=4, hidden_ratio=0.5, **options)
        generator = torch.Generator().manual_seed(3)
        for parameter in extractor.adapters.parameters():
            nn.init.normal_(parameter, std=0.1, generator=generator)
        if dtype != torch.float32 and device == "cuda":
            extractor.backbone.cast_weights(dtype)
        extractor.to(device)
        sum(f.sin().sum() for f in extractor(images.to(device))).backward()
        results.append([p.grad.cpu() for p in extractor.adapters.parameters()])
    for ours, reference in zip(results[1], results[0], strict=True):
        assert (ours - reference).norm() < 0.05 * reference.norm()


@pytest.mark.parametrize("precision", ["32", "16-mixed", "bf16-mixed"])
def test_a_run_reports_its_memory(e3va, tmp_path, precision):
    e3va("train", *ON_CUDA, f"trainer.precision={precision}", f"hydra.run.dir={tmp_path}/run")
    resources = json.loads((tmp_path / "run" / "resources.json").read_text())
    assert resources["device"] == "cuda"
    assert 0 < resources["peak_memory_allocated_mib"] <= resources["peak_memory_reserved_mib"]


@pytest.fixture(scope="module")
def process():
    with MeasuringProcess() as process:
        yield process


@pytest.mark.parametrize("method", ["full", "lora", "e3va"])
@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
@pytest.mark.parametrize("head", ["cascade_mask_rcnn", "retinanet", "upernet"])
def test_the_plan_is_within_ten_percent_of_the_peak(config, process, method, precision, head):
    words = [f"adapter={method}", "backbone=swin_t", f"head={head}", f"trainer.precision={precision}", "dataset.root=."]
    options = config(*words, command="benchmark_memory")
    size = StepSize(2, (512, 672), 20, precision, 1.0)
    estimate = estimate_memory(options, size, num_classes=80).peak.total_bytes / MIB
    measurement = process.measure(Request(options, size, 80, "cuda", warmup=1, repeats=1))
    assert estimate == pytest.approx(measurement.peak_mib, rel=0.1)


def test_the_command_measures(e3va, tmp_path):
    words = ["methods=[e3va]", "backbone=swin_t", "image_size=[512,672]", f"hydra.run.dir={tmp_path}/run"]
    e3va("benchmark-memory", *words)
    (entry,) = json.loads((tmp_path / "run" / "benchmark.json").read_text())["methods"]
    assert entry["source"] == "measured" and entry["peak_memory_mib"] > 0 and entry["step_time_s"] > 0
