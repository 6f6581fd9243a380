"""Offloaded and quantized weights of frozen backbones."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from e3va_cli.config.composition import validate_overrides
from e3va_cli.errors import UserError
from e3va_cli.memory.estimate import estimate_memory
from e3va_cli.memory.measure import Request, measure_in_process
from e3va_cli.memory.step import StepSize
from e3va_cli.models.backbones.offload import cache_path, host_weights, map_weights
from e3va_cli.models.backbones.quantization import BITS, GROUP_SIZE, QuantizedLinear, pack, quantize, unpack
from e3va_cli.utils.environment import MIB
from tests.components import build_backbone, tune
from tests.conftest import NANO, QUICK
from tests.models.backbones.test_families import FAMILIES, OPTIONS, small

WEIGHTS = Path(__file__).parents[3] / "weights" / "swin_nano" / "swin_nano.safetensors"
NAMES = ["swin", *FAMILIES]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def backbone_of(name):
    return small(name) if name in FAMILIES else build_backbone(**NANO)[0].eval()


def step(backbone, activations, precision=torch.float32):
    """Features and adapters' gradients of the second of two steps."""
    torch.manual_seed(1)
    extractor = tune(backbone, "e3va", **OPTIONS["e3va"], activations=activations).train()
    for parameter in extractor.adapters.parameters():
        nn.init.normal_(parameter, std=0.1)
    images = torch.randn(2, 3, 64, 96)
    for _ in range(2):
        extractor.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision != torch.float32):
            features = extractor(images)
        sum(feature.float().sin().sum() for feature in features).backward()
    return [*features, *(parameter.grad for parameter in extractor.adapters.parameters())]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_a_streamed_step_equals_one_without(name, activations, tmp_path):
    expected = step(backbone_of(name), activations)
    for host in (host_weights, partial(map_weights, path=tmp_path / f"{name}.safetensors")):
        backbone = backbone_of(name)
        count, memory = backbone.num_params, sum(p.nbytes for p in backbone.parameters())
        backbone.offload_weights(host)
        streamer = backbone.streamer
        assert backbone.num_params == count
        assert streamer.offloaded_bytes == memory - sum(p.nbytes for p in backbone.parameters()) > 0.5 * memory
        for ours, reference in zip(step(backbone, activations), expected, strict=True):
            assert torch.equal(ours, reference)
        passes = {"keep": 1, "recompute": 2}[activations]
        assert streamer.streamed_bytes == 2 * passes * streamer.offloaded_bytes, "no block is copied in vain"
        blocks = [branch.block for stage in backbone.stages for branch in stage.branches]
        layers = [layer for block in blocks for layer in backbone.linears(block).values()]
        assert all(layer.weight.is_meta for layer in layers), "freed at the end of a pass"


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_a_streamed_step_in_few_bits_equals_one_without(dtype):
    for activations, precision in (("compress", torch.float32), ("recompute", torch.bfloat16)):
        plain, streamed = (build_backbone(**NANO, dtype=dtype, offload=offload)[0] for offload in ("none", "disk"))
        expected = step(plain, activations, precision)
        assert all(map(torch.equal, step(streamed, activations, precision), expected))


def test_streams_go_on_after_an_error(nano):
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = nano.eval()(images)
        nano.offload_weights(host_weights)
        hook = nano.model.layers[2].blocks[0].mlp.fc1.register_forward_pre_hook(lambda *_: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                nano(images)
        hook.remove()
        with torch.inference_mode():
            nano(images)
        assert all(map(torch.equal, nano(images), expected))


def test_the_cache_is_written_once_and_mended():
    options = {**NANO, "dtype": "int8", "offload": "disk"}
    backbone, identity = build_backbone(**options)
    path = cache_path(f"{identity.fingerprint}-int8")
    content = load_file(path)
    assert sum(tensor.nbytes for tensor in content.values()) == backbone.streamer.offloaded_bytes
    written = path.stat().st_mtime_ns
    build_backbone(**options)
    assert path.stat().st_mtime_ns == written
    path.write_bytes(path.read_bytes()[:-1])
    backbone, _ = build_backbone(**options)
    assert load_file(path).keys() == content.keys()
    path.unlink()
    with pytest.raises(UserError, match=r"offload=disk: .*safetensors was deleted or changed while in use .*; start"):
        backbone(torch.randn(1, 3, 64, 64))


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"offload=disk: cannot write 0.0 GiB of weights to .*; set .* XDG_CACHE_HOME"):
        build_backbone(**NANO, offload="disk")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("inputs", [96, 24, 10])
def test_errors_of_quantized_matrices(bits, inputs):
    layer = nn.Linear(inputs, 7)
    with torch.no_grad():
        layer.weight[0] *= 1e-6
        layer.weight[1] = 0
    quantized = QuantizedLinear(layer, bits)
    ours, exact = quantized.dequantize(torch.float32), layer.weight
    groups = exact.unflatten(1, (-1, quantized.scale.shape[1] and inputs // quantized.scale.shape[1]))
    largest = groups.abs().amax(2, keepdim=True).expand_as(groups).flatten(1)
    assert torch.all((ours - exact).abs() <= largest / 2 ** (bits - 1) * 1.02)
    assert ours[1].eq(0).all()
    torch.testing.assert_close(quantized(torch.eye(inputs)), ours.T + layer.bias)


def test_integers_are_packed_two_to_a_byte():
    integers = torch.randint(-8, 8, (3, 5, 16), dtype=torch.int8)
    packed = pack(integers)
    assert packed.nbytes * 2 == integers.nbytes and torch.equal(unpack(packed), integers)
    weight, scale = quantize(torch.randn(6, 64), 4)
    assert weight.nbytes == 6 * 64 / 2 and scale.nbytes == 6 * 64 / GROUP_SIZE[4] * 2


@pytest.mark.parametrize(("dtype", "bounds"), [("int8", [0.01] * 4), ("int4", [0.05, 0.05, 0.05, 0.08])])
def test_features_of_real_weights(dtype, bounds, photo):
    exact, identity = build_backbone(**NANO, weights=str(WEIGHTS))
    rounded, same = build_backbone(**NANO, weights=str(WEIGHTS), dtype=dtype)
    assert same == identity, "the fingerprint is that of the original weights"
    with torch.no_grad():
        for ours, reference, bound in zip(rounded.eval()(photo), exact.eval()(photo), bounds, strict=True):
            assert ours.dtype == torch.float32, "the stream keeps its precision"
            assert 0 < (ours - reference).norm() < bound * reference.norm()
    quantized = sum(p.nbytes for p in rounded.parameters() if not p.is_floating_point())
    assert quantized * 8 / BITS[dtype] > 0.5 * exact.num_params == 0.5 * rounded.num_params


@pytest.fixture
def photo():
    """A batch of two images with the statistics of photos: smooth regions and edges."""
    coarse = nn.functional.interpolate(torch.randn(2, 3, 8, 12), size=(192, 288), mode="bicubic")
    return coarse + (torch.randn(2, 1, 24, 36) > 0).float().repeat_interleave(8, 2).repeat_interleave(8, 3) - 0.5


def test_an_offloaded_backbone_is_not_compiled():
    with pytest.raises(UserError, match=r"backbone.compile=true and backbone.offload=cpu are mutually exclusive"):
        validate_overrides("train", ["backbone.compile=true", "backbone.offload=cpu"])


SMALL_STEP = ["head=retinanet", "head.fpn_channels=32", "adapter=e3va", "adapter.activations=recompute"]


@pytest.mark.parametrize("precision", ["32", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
def test_estimates_count_two_blocks(config, precision):
    size = StepSize(1, (64, 64), 2, precision, 1.0)

    def estimate(*words):
        return estimate_memory(config(*SMALL_STEP, *words), size, num_classes=3)

    whole, half, streamed, int8 = (
        estimate(),
        estimate("backbone.dtype=bfloat16"),
        estimate("backbone.offload=cpu"),
        estimate("backbone.dtype=int8"),
    )
    matrices = streamed.offloaded_bytes
    assert whole.offloaded_bytes == whole.streamed_bytes == 0
    assert streamed.streamed_bytes == 2 * matrices, "once in the forward pass and once in the backward pass"
    block = 12 * 256**2 * 4  # of the last stage
    assert whole.between_steps_bytes == streamed.between_steps_bytes + matrices
    assert half.between_steps_bytes == pytest.approx(whole.between_steps_bytes - matrices / 2, abs=2**16)
    assert int8.between_steps_bytes == pytest.approx(whole.between_steps_bytes - matrices * (1 - 8.5 / 32), abs=2**16)
    assert streamed.peak.phase == whole.peak.phase == "backward"
    assert streamed.peak.by_category["weights"] == whole.peak.by_category["weights"] - matrices + 2 * block
    assert streamed.parameters == whole.parameters == int8.parameters


@pytest.mark.parametrize("words", [["backbone.dtype=int8"], ["backbone.dtype=int4", "backbone.offload=disk"]], ids=str)
def test_estimates_are_within_five_percent(config, words):
    options = config("head=retinanet", "head.fpn_channels=32", "adapter=e3va", *words)
    size = StepSize(2, (96, 128), 4, "32", 1.0)
    estimate = estimate_memory(options, size, num_classes=3, device_type="cpu")
    measurement = measure_in_process(Request(options, size, 3, "cpu", warmup=0, repeats=0))
    assert estimate.peak.total_bytes / MIB == pytest.approx(measurement.peak_mib, rel=0.05)
    assert estimate.parameters == measurement.parameters


@pytest.mark.slow
def test_packed_weights_in_onnx(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    layer, x = QuantizedLinear(nn.Linear(256, 128), 4).eval(), torch.randn(3, 256)  # too large to be folded
    torch.onnx.export(layer, (x,), tmp_path / "layer.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "layer.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), layer(x).detach())


@pytest.mark.slow
def test_an_adapter_trained_with_int8(e3va, tmp_path):
    e3va("train", *QUICK, "backbone.dtype=int8", "backbone.offload=disk", f"hydra.run.dir={tmp_path}/run")
    e3va("export-adapter", f"checkpoint={tmp_path}/run", f"output={tmp_path}/adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["config"]["backbone"]["dtype"] == "int8"
    e3va("evaluate", f"checkpoint={tmp_path}/adapter", *QUICK[:2], f"hydra.run.dir={tmp_path}/evaluation")
    ours, theirs = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("run", "evaluation"))
    assert ours["box"] == theirs["box"]
