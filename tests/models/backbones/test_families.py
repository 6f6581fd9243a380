"""What holds for every backbone family under every tuning method, against timm's own networks."""

import json

import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import layer_norm

from e3va_cli.memory.estimate import estimate_memory
from e3va_cli.memory.measure import Request, measure_in_process
from e3va_cli.memory.step import StepSize
from e3va_cli.models.adapters import METHODS
from tests.components import build_backbone, tune
from tests.conftest import QUICK

MIB = 2**20
FAMILIES = {
    "convnext": ("convnext_tiny", {"depths": [1, 1, 2, 1], "dims": [16, 32, 64, 128]}),
    "convnextv2": ("convnextv2_tiny", {"depths": [1, 1, 2, 1], "dims": [16, 32, 64, 128]}),
}
WITHOUT_ATTENTION = ("convnext", "convnextv2")
OPTIONS = {
    "e3va": {"rank": 4, "hidden_ratio": 0.5},
    "lora": {"rank": 4, "alpha": 1.0},
    "adapter": {"hidden": 8},
    "adaptformer": {"hidden": 8, "scale": 0.1},
    "lorand": {"hidden_ratio": 0.5, "rank": 2, "branches": 2},
    "mona": {"hidden": 8, "dropout": 0.0},
    "colin": {"hidden": 8, "branches": 2, "rank": 4, "orthogonality": 0.5},
}
SIZES = ((64, 96), (160, 128))


def small(name, **options):
    """A small backbone of a family whose weights differ from tensor to tensor, layer scales of 1 included."""
    timm_name, model_args = FAMILIES[name]
    backbone, _ = build_backbone(
        name=name, family=name.removesuffix("v2"), timm_name=timm_name, model_args=model_args, **options
    )
    torch.manual_seed(1)
    for parameter in backbone.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter.data, std=0.1)
        else:
            nn.init.uniform_(parameter.data, 0.2, 1.0)
    return backbone.eval()


def reference(name, backbone):
    """The same weights in timm's own feature extractor."""
    timm_name, model_args = FAMILIES[name]
    network = timm.create_model(timm_name, features_only=True, **model_args).eval()
    renamed = {
        key.replace("stem.", "stem_").replace("stages.", "stages_"): tensor
        for key, tensor in backbone.model.state_dict().items()
    }
    network.load_state_dict(renamed)
    return network


@pytest.mark.parametrize("name", FAMILIES)
def test_fresh_adapters_give_timms_features(name):
    backbone = small(name)
    network = reference(name, backbone)
    extractor = tune(backbone, "e3va", **OPTIONS["e3va"]).train()
    for size in SIZES:
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = network(images)
        for ours, stream in zip(extractor(images), expected, strict=True):
            normed = layer_norm(stream.permute(0, 2, 3, 1), stream.shape[1:2]).permute(0, 3, 1, 2)
            torch.testing.assert_close(ours, normed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_branch_in_chunks_equals_the_branch_as_a_whole(name, monkeypatch):
    backbone = small(name)
    for stage in backbone.stages:
        x = torch.randn(2, 6, 5, stage.width)
        for branch in stage.branches:
            with torch.no_grad():
                chunked = branch(x)
            torch.testing.assert_close(chunked, branch(x), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_images_of_any_size_have_features_at_the_strides(name):
    backbone = small(name)
    with torch.no_grad():
        shapes = [tuple(x.shape[1:3]) for x in backbone(torch.randn(1, 3, 61, 130))]
    assert shapes == [(16, 40), (8, 20), (4, 10), (2, 5)]


@pytest.mark.parametrize("name", FAMILIES)
def test_no_gradient_enters_a_branch(name):
    backbone = small(name)
    extractor = tune(backbone, "e3va", **OPTIONS["e3va"]).train()
    outputs = []
    for stage in backbone.stages:
        for branch in stage.branches:
            for module in branch.block.modules():
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
    highway, features = x, []
    for index, stage in enumerate(backbone.stages):
        x, highway = stage.downsample(x), stage.downsample(highway)
        for adapter, branch in zip(extractor.adapters[index], stage.branches, strict=True):
            z = branch(x).detach()
            x = (x + z).detach()
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
        loss = sum((feature * torch.linspace(-1, 1, feature.shape[-1])).sum() for feature in features)
        parameters = [*extractor.adapters.parameters(), *extractor.norms.parameters()]
        gradients.append(torch.autograd.grad(loss, parameters))
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("name", FAMILIES)
def test_the_estimate_is_within_five_percent_of_the_measurement(config, name, method):
    if method == "lora" and name in WITHOUT_ATTENTION:
        pytest.skip("no attention")
    timm_name, model_args = FAMILIES[name]
    options = config(f"adapter={method}", "backbone=convnext_t", "head=mask_rcnn_nano")
    options.backbone.timm_name, options.backbone.model_args = timm_name, model_args
    size = StepSize(1, (128, 160), 8, "32", clip_norm=1.0)
    estimate = estimate_memory(options, size, num_classes=10, device_type="cpu")
    measurement = measure_in_process(Request(options, size, 10, "cpu", warmup=0, repeats=0))
    assert estimate.peak.total_bytes / MIB == pytest.approx(measurement.peak_mib, rel=0.05)


@pytest.mark.parametrize("name", WITHOUT_ATTENTION)
def test_lora_is_refused_where_there_is_no_attention(e3va, name):
    model_args = ",".join(f"{key}:{value}".replace(" ", "") for key, value in FAMILIES[name][1].items())
    done = e3va("train", "backbone=convnext_t", f"+backbone.model_args={{{model_args}}}", "adapter=lora", expect=2)
    assert "adapter=lora: this backbone has no query-key-value projection" in done.stderr


@pytest.mark.parametrize("name", FAMILIES)
def test_from_training_to_prediction(e3va, tmp_path, name):
    timm_name, model_args = FAMILIES[name]
    backbone = [
        "backbone=convnext_t",
        f"backbone.timm_name={timm_name}",
        *(f"+backbone.model_args.{key}={value}".replace(" ", "") for key, value in model_args.items()),
    ]
    e3va("train", *backbone, *QUICK, "dataset.image_size=64", "hydra.run.dir=run")
    e3va("export-adapter", "checkpoint=run", "output=adapter", "precision=fp32")
    e3va("evaluate", "checkpoint=adapter", "trainer.accelerator=cpu", "hydra.run.dir=evaluation")
    trained, evaluated = (
        json.loads((tmp_path / folder / "metrics.json").read_text()) for folder in ("run", "evaluation")
    )
    assert evaluated == trained
    e3va("predict", "checkpoint=adapter", "input=run/predictions.png", "output=predictions", "accelerator=cpu")
    assert (tmp_path / "predictions" / "predictions.json").is_file()
