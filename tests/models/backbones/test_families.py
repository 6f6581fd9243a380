"""What holds for every backbone family under every tuning method, against timm's own networks."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import layer_norm

from e3va_cli.memory.estimate import estimate_memory
from e3va_cli.memory.measure import Request, measure_in_process
from e3va_cli.memory.step import StepSize
from e3va_cli.models.adapters import METHODS
from e3va_cli.models.backbones import chunked
from tests.components import build_backbone, tune
from tests.conftest import QUICK

MIB = 2**20


@dataclass(frozen=True)
class Family:
    """A small backbone of a family, as options and in timm."""

    backbone: str  # `backbone=`
    family: str
    timm_name: str
    model_args: dict[str, Any]
    timm_args: dict[str, Any]  # with which timm's own network takes images of these sizes
    shapes: list[tuple[int, int]]  # of the features of an image of 61x130

    @property
    def overrides(self) -> list[str]:
        """The overrides of a command."""
        args = (f"+backbone.model_args.{key}={value}".replace(" ", "") for key, value in self.model_args.items())
        return [f"backbone={self.backbone}", f"backbone.timm_name={self.timm_name}", *args]


CONVNEXT = {"depths": [1, 1, 2, 1], "dims": [16, 32, 64, 128]}
SWIN = {"embed_dim": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8], "window_size": 4}
VIT = {"depth": 4, "embed_dim": 48, "num_heads": 3, "img_size": 70}
HIERA = {"embed_dim": 16, "num_heads": 1, "stages": [1, 2, 3, 2], "window_spec": [8, 4, 6, 2], "global_att_blocks": [4]}
EVA = {"depth": 5, "embed_dim": 64, "num_heads": 2}
STRIDES_4_TO_32 = [(16, 40), (8, 20), (4, 10), (2, 5)]
FAMILIES = {
    "convnext": Family("convnext_t", "convnext", "convnext_tiny", CONVNEXT, {}, STRIDES_4_TO_32),
    "convnextv2": Family("convnextv2_t", "convnext", "convnextv2_tiny", CONVNEXT, {}, STRIDES_4_TO_32),
    "swinv2": Family(
        "swinv2_t",
        "swinv2",
        "swinv2_tiny_window8_256",
        SWIN,
        {"strict_img_size": False, "always_partition": True},
        [(16, 33), (8, 17), (4, 9), (2, 5)],
    ),
    "hiera": Family("hiera_t", "hiera", "sam2_hiera_tiny", HIERA, {}, STRIDES_4_TO_32),
    "dinov2": Family("dinov2_s", "vit", "vit_small_patch14_dinov2", VIT, {"dynamic_img_size": True}, [(4, 9)] * 4),
    "dinov3": Family("dinov3_s", "vit", "vit_small_patch16_dinov3", EVA, {"dynamic_img_size": True}, [(4, 9)] * 4),
}
QUICK_RUNS = ("convnext", "dinov3")  # families whose commands run without the marker `slow`
WITHOUT_ATTENTION = ("convnext", "convnextv2")
ESTIMATED_ELSEWHERE = ("dinov2", "dinov3")  # tests/memory/test_estimate_against_measurement.py
OPTIONS = {
    "e3va": {"rank": 4, "hidden_ratio": 0.5},
    "e3va_plus": {"rank": 4},
    "lora": {"rank": 4, "alpha": 1.0},
    "adapter": {"hidden": 8},
    "adaptformer": {"hidden": 8, "scale": 0.1},
    "lorand": {"hidden_ratio": 0.5, "rank": 2, "branches": 2},
    "mona": {"hidden": 8, "dropout": 0.0},
    "colin": {"hidden": 8, "branches": 2, "rank": 4, "orthogonality": 0.5},
}
SIZES = ((128, 256), (256, 128))  # maps of whole windows


def small(name):
    """A small backbone of a family whose weights differ from tensor to tensor, norms and layer scales included."""
    family = FAMILIES[name]
    backbone, _ = build_backbone(
        name=name, family=family.family, timm_name=family.timm_name, model_args=family.model_args
    )
    torch.manual_seed(1)
    for parameter in backbone.parameters():
        if parameter[0].numel() > 1:
            nn.init.normal_(parameter.data, std=0.1)
        else:
            nn.init.uniform_(parameter.data, 0.2, 1.0)
    return backbone.eval()


def timm_features(name, backbone, images):
    """The outputs of the stages of timm's own network with the same weights: (B, C, H, W) each."""
    family = FAMILIES[name]
    network = timm.create_model(family.timm_name, num_classes=0, **family.timm_args, **family.model_args).eval()
    state = backbone.model.state_dict()
    missing = set(network.load_state_dict(state, strict=False).missing_keys)
    assert missing <= {f"{norm}.{key}" for norm in ("norm", "norm_pre", "head.norm") for key in ("weight", "bias")}
    if family.family == "vit":
        size = [side // backbone.stride * backbone.patch for side in images.shape[2:]]
        images = nn.functional.interpolate(images, size=size, mode="bilinear")
        last = [len(network.blocks) * stage // 4 - 1 for stage in (1, 2, 3, 4)]
    else:
        last = None
    with torch.no_grad():
        return network.forward_intermediates(images, indices=last, intermediates_only=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_fresh_adapters_give_timms_normed_features(name):
    backbone = small(name)
    extractor = tune(backbone, "e3va", **OPTIONS["e3va"]).train()
    for size in SIZES:
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            without_gradients = extractor(images)
        for features in (without_gradients, extractor(images)):
            for ours, stream in zip(features, timm_features(name, backbone, images), strict=True):
                normed = layer_norm(stream.permute(0, 2, 3, 1), stream.shape[1:2]).permute(0, 3, 1, 2)
                torch.testing.assert_close(ours, normed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_branch_in_chunks_equals_the_branch_as_a_whole(name, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 400)
    backbone = small(name)
    x = torch.randn(2, 48, 40, backbone.stages[0].width)
    for stage in backbone.stages:
        with torch.no_grad():
            x, branches = stage.start(x)
        for branch in branches:
            with torch.no_grad():
                in_chunks = branch(x)
            torch.testing.assert_close(in_chunks, branch(x), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_images_of_any_size_have_features_at_the_strides(name):
    backbone = small(name)
    with torch.no_grad():
        shapes = [tuple(x.shape[1:3]) for x in backbone(torch.randn(1, 3, 61, 130))]
    assert shapes == FAMILIES[name].shapes


@pytest.mark.parametrize("name", FAMILIES)
def test_features_with_bfloat16_weights(name):
    backbone, images = small(name), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        exact = backbone(images)
        backbone.cast_weights(torch.bfloat16)
        for ours, reference in zip(backbone(images), exact, strict=True):
            assert ours.dtype == torch.float32, "the stream keeps its precision"
            assert 0 < (ours - reference).norm() < 0.02 * reference.norm()


def modules_of_downsampling(backbone):
    """The modules that the highway runs: in Hiera they lie in blocks."""
    modules, x = set(), backbone.stem(torch.randn(1, 3, 64, 64))
    hooks = [module.register_forward_hook(lambda module, *_: modules.add(module)) for module in backbone.modules()]
    for stage in backbone.stages:
        x = stage.downsample(x)
    for hook in hooks:
        hook.remove()
    return modules


@pytest.mark.parametrize("name", FAMILIES)
def test_no_gradient_enters_a_branch(name):
    backbone = small(name)
    extractor = tune(backbone, "e3va", **OPTIONS["e3va"]).train()
    outputs, downsampling = [], modules_of_downsampling(backbone)
    for stage in backbone.stages:
        for branch in stage.branches:
            for module in set(branch.block.modules()) - downsampling:
                module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    features = extractor(torch.randn(1, 3, 64, 64, requires_grad=True))
    assert outputs and not any(output.requires_grad for output in outputs)
    sum(feature.square().sum() for feature in features).backward()
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert all(p.grad is not None for p in [*extractor.adapters.parameters(), *extractor.norms.parameters()])


def plain_features(extractor, images):
    """The method's equations by plain autograd, nothing in place, nothing recomputed."""
    backbone = extractor.backbone
    x = backbone.stem(images)
    highway, features = backbone.patches(x), []
    for index, stage in enumerate(backbone.stages):
        highway = stage.downsample(highway)
        x, branches = stage.start(x)
        for adapter, branch in zip(extractor.adapters[index], branches, strict=True):
            z = branch(x).detach()
            x, z = (x + z).detach(), backbone.patches(z)
            down_a, down_b, bias, up_a, up_b, up_bias = adapter.weights
            hidden = nn.functional.gelu(z @ down_a @ down_b + bias)
            highway = highway + z + hidden @ up_a @ up_b + up_bias
        features.append(extractor.norms[index](highway).permute(0, 3, 1, 2))
    return features


@pytest.mark.parametrize("activations", ["keep", "recompute"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_equal_those_of_plain_autograd(name, activations):
    backbone = small(name).double()
    extractor = tune(backbone, "e3va", **OPTIONS["e3va"], init="kaiming", activations=activations).double().train()
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    gradients = []
    for features in (extractor(images), plain_features(extractor, images)):
        loss = sum((feature * torch.linspace(-1, 2, feature.shape[-1])).sum() for feature in features)
        parameters = [*extractor.adapters.parameters(), *extractor.norms.parameters()]
        gradients.append(torch.autograd.grad(loss, parameters))
    for ours, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ESTIMATED_ELSEWHERE])
def test_the_estimate_is_within_five_percent_of_the_measurement(config, name, method):
    if method == "lora" and name in WITHOUT_ATTENTION:
        pytest.skip("no attention")
    options = config(f"adapter={method}", *FAMILIES[name].overrides, "head=mask_rcnn_nano")
    size = StepSize(1, (128, 160), 8, "32", clip_norm=1.0)
    estimate = estimate_memory(options, size, num_classes=10, device_type="cpu")
    measurement = measure_in_process(Request(options, size, 10, "cpu", warmup=0, repeats=0))
    assert estimate.peak.total_bytes / MIB == pytest.approx(measurement.peak_mib, rel=0.05)


@pytest.mark.parametrize("name", WITHOUT_ATTENTION)
def test_lora_is_refused_where_there_is_no_attention(e3va, name):
    done = e3va("train", *FAMILIES[name].overrides, "adapter=lora", expect=2)
    assert "adapter=lora: this backbone has no query-key-value projection" in done.stderr


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK_RUNS else pytest.mark.slow) for name in FAMILIES]
)
def test_from_training_to_prediction(e3va, tmp_path, name):
    e3va("train", *FAMILIES[name].overrides, *QUICK, "dataset.image_size=64", "hydra.run.dir=run")
    e3va("export-adapter", "checkpoint=run", "output=adapter", "precision=fp32")
    e3va("evaluate", "checkpoint=adapter", "trainer.accelerator=cpu", "hydra.run.dir=evaluation")
    trained, evaluated = (
        json.loads((tmp_path / folder / "metrics.json").read_text()) for folder in ("run", "evaluation")
    )
    assert evaluated == trained
    e3va("export", "checkpoint=run", "output=model.pt2", "image_size=[64,96]")
    e3va("predict", "checkpoint=adapter", "input=run/predictions.png", "output=predictions", "accelerator=cpu")
    assert (tmp_path / "predictions" / "predictions.json").is_file()
