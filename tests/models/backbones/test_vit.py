"""Plain vision transformers against timm's own forward pass, at small sizes."""

import json

import pytest
import torch
from timm.layers import LayerNorm2d
from torch import nn

from e3va_cli.errors import UserError
from e3va_cli.inference.shared_backbone import predict_shared
from e3va_cli.models.adapters import METHODS
from e3va_cli.models.adapters.highway import forward_shared_backbone
from e3va_cli.models.backbones.vit import build_vit
from e3va_cli.models.model import build_random_model
from e3va_cli.models.necks.rescale import Rescale, rescaled_channels
from e3va_cli.models.necks.simple_pyramid import SimplePyramid
from tests.components import build_backbone, tune
from tests.conftest import QUICK

V, E = "vit_small_patch14_dinov2", "vit_small_patch16_dinov3"
TINY = {
    V: {"depth": 4, "embed_dim": 48, "num_heads": 3, "img_size": 70},
    E: {"depth": 5, "embed_dim": 64, "num_heads": 2},
}
OTHERS = [
    "vit_small_patch14_reg4_dinov2",
    "vit_giant_patch14_dinov2",
    "vit_base_patch8_224",
    "vit_base_patch32_224",
    "vit_base_patch16_siglip_224",
    "deit_tiny_distilled_patch16_224",
    "vit_small_patch16_dinov3_qkvb",
    "eva02_small_patch14_224",
    "eva02_base_patch14_224",
    "vit_base_patch16_rope_mixed_224",
]
E3VA = {"rank": 4, "hidden_ratio": 0.5}
TINY_OVERRIDES = {
    V: ["backbone=dinov2_s", "+backbone.model_args={depth: 4, embed_dim: 48, num_heads: 3, img_size: 70}"],
    E: ["backbone=dinov3_s", "+backbone.model_args={depth: 4, embed_dim: 64, num_heads: 2}"],
}
NECK = ["neck=simple_pyramid"]
SIMPLE_PYRAMID = [*TINY_OVERRIDES[E], *NECK]


def tiny(name, **model_args):
    """A network whose every part has an effect: not the tiny scales and zero biases that timm starts with."""
    torch.manual_seed(0)
    backbone = build_vit(name, **(model_args or TINY.get(name) or {"depth": 4, "embed_dim": 48, "num_heads": 3})).eval()
    for key, parameter in backbone.named_parameters():
        if parameter.ndim <= 1 or "token" in key or "pos_embed" in key:
            nn.init.normal_(parameter, std=0.3)
    return backbone


def timms(backbone, images):
    """Timm's features at the end of each stage, (B, C, H, W), of images as the stem resizes them."""
    if backbone.patch != backbone.stride:
        size = [side // backbone.stride * backbone.patch for side in images.shape[2:]]
        images = nn.functional.interpolate(images, size=size, mode="bilinear")
    ends = [len(backbone.model.blocks) * stage // 4 - 1 for stage in (1, 2, 3, 4)]
    with torch.no_grad():
        return backbone.model.forward_intermediates(images, indices=ends, intermediates_only=True)


def normed(feature):
    return nn.functional.layer_norm(feature.movedim(1, -1), feature.shape[1:2]).movedim(-1, 1)


@pytest.mark.parametrize("name", [V, E])
def test_fresh_adapters_give_timms_normed_features_at_published_sizes(name):
    backbone = tiny(name, drop_path_rate=0.0)
    extractor = tune(backbone, "e3va", **E3VA).train()
    for size in ((96, 160), (128, 64)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            without_gradients = extractor(images)
        for of_pass in (without_gradients, extractor(images)):
            for ours, reference in zip(of_pass, timms(backbone, images), strict=True):
                torch.testing.assert_close(ours, normed(reference), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [V, E, *OTHERS])
def test_streams_equal_timms_features(name):
    backbone = tiny(name)
    images = torch.randn(2, 3, 64, 96)
    for with_gradients in (False, True):
        with torch.set_grad_enabled(with_gradients):
            streams = backbone(images)
        for ours, reference in zip(streams, timms(backbone, images), strict=True):
            torch.testing.assert_close(ours.permute(0, 3, 1, 2), reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [V, E, "vit_base_patch16_224", "eva02_base_patch14_224"])
def test_input_and_tapped_outputs_sum_to_the_blocks_output(name):
    backbone = tiny(name)
    grid = (3, 5)
    rows = backbone.prefix_rows(grid[1])
    x = 0.1 * torch.randn(2, rows + grid[0], grid[1], backbone.model.embed_dim)
    first = rows * grid[1] - backbone.model.num_prefix_tokens
    for stage in backbone.stages:
        for attention, mlp in zip(stage.branches[::2], stage.branches[1::2], strict=True):
            rope = getattr(backbone.model, "rope", None)
            words = {"rope": rope.get_embed(shape=grid)} if rope is not None else {}
            with torch.no_grad():
                reference = attention.block(x.flatten(1, 2)[:, first:], **words)
                between = x + attention(x)
                ours = (between + mlp(between)).flatten(1, 2)[:, first:]
            scale = reference.abs().max().clamp(min=1)
            torch.testing.assert_close(ours / scale, reference / scale, atol=5e-7, rtol=0)


@pytest.mark.parametrize("name", [V, "vit_small_patch16_dinov3_qkvb", "eva02_base_patch14_224"])
def test_lora_changes_queries_and_values_of_any_projection(name):
    backbone, images = tiny(name), torch.randn(1, 3, 64, 96)
    extractor = tune(backbone, "lora", rank=2, alpha=2).eval()
    start = extractor(images)
    assert len(extractor.updates) == len(backbone.model.blocks)
    for update in extractor.updates:
        nn.init.normal_(update.B)
    changed = extractor(images)
    assert all((ours - before).abs().max() > 1e-3 for ours, before in zip(changed, start, strict=True))
    sum(feature.square().sum() for feature in changed).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in extractor.updates.parameters())


def test_filters_of_mona_see_patches_alone():
    backbone, shapes = tiny(E), []
    extractor = tune(backbone, "mona", hidden=8, dropout=0.0)
    for module in extractor.inserted:
        module.register_forward_hook(lambda module, args, out: shapes.append(tuple(args[0].shape)))
    features = extractor(torch.randn(2, 3, 64, 96))
    assert set(shapes) == {(2, 4, 6, 64)} and all(feature.shape == (2, 64, 4, 6) for feature in features)


@pytest.mark.parametrize(
    ("name", "model_args", "says"),
    [
        (V, {"depth": 3}, "3 blocks, fewer than 4"),
        ("vit_base_patch16_xp_224", {"depth": 4}, "backbone of family vit"),
        ("resnet18", {}, "backbone of family vit"),
    ],
)
def test_other_networks_are_refused(name, model_args, says):
    with pytest.raises(UserError, match=says):
        build_backbone(name="other", family="vit", timm_name=name, model_args=model_args, seed=0)


def test_outputs_of_one_stride_become_a_pyramid():
    channels, strides = [64] * 4, [16] * 4
    rescale = Rescale(channels, strides, (0, 1, 2, 3))
    levels = rescale([torch.randn(1, 64, 4, 6) for _ in range(4)])
    assert [tuple(level.shape[2:]) for level in levels] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert [level.shape[1] for level in levels] == rescaled_channels(channels, strides) == [16, 32, 64, 64]


def test_a_head_that_reads_three_levels(config):
    model = build_random_model(config(*TINY_OVERRIDES[E], "head=retinanet", "head.fpn_channels=16"), num_classes=3)
    features = model.features(torch.randn(1, 3, 64, 96))
    assert [tuple(feature.shape[1:]) for feature in features] == [(32, 8, 12), (64, 4, 6), (64, 2, 3)]


def test_a_simple_pyramid_is_that_of_vitdet():
    """As detectron2's `SimpleFeaturePyramid` has it, without the convolutions that end each level."""
    pyramid = SimplePyramid(64, 16, (0, 1, 2, 3))
    layers = [[type(layer) for layer in level] for level in pyramid.levels]
    up = nn.ConvTranspose2d
    assert layers == [[up, LayerNorm2d, nn.GELU, up], [up], [], [nn.MaxPool2d]]
    last = torch.randn(1, 64, 4, 6)
    levels = pyramid([last])
    assert [tuple(level.shape[1:]) for level in levels] == [(16, 16, 24), (32, 8, 12), (64, 4, 6), (64, 2, 3)]
    assert [level.shape[1] for level in levels] == rescaled_channels([64] * 4, [16] * 4)
    assert torch.equal(levels[2], last) and torch.equal(levels[3], nn.functional.max_pool2d(last, 2, 2))


@pytest.mark.parametrize("head", ["mask_rcnn_nano", "retinanet"])
def test_a_simple_pyramid_reads_the_last_output_alone(config, head):
    model = build_random_model(config(*SIMPLE_PYRAMID, f"head={head}"), num_classes=3)
    ran = []
    for index, norm in enumerate(model.extractor.norms):
        norm.register_forward_hook(lambda *_, index=index: ran.append(index))
    features = model.features(torch.randn(1, 3, 64, 96))
    assert ran == [3] and [norm.weight.requires_grad for norm in model.extractor.norms] == [False] * 3 + [True]
    sizes = [(16, 16, 24), (32, 8, 12), (64, 4, 6), (64, 2, 3)]
    assert [tuple(feature.shape[1:]) for feature in features] == sizes[-len(model.head.out_indices) :]


@pytest.mark.parametrize("method", list(METHODS))
def test_a_simple_pyramid_trains_every_weight_of_a_method(config, method):
    model = build_random_model(config(*SIMPLE_PYRAMID, f"adapter={method}"), num_classes=3).train()
    for parameter in model.extractor.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    sum(feature.square().sum() for feature in model.features(torch.randn(1, 3, 64, 96))).backward()
    trained = [p for part in (model.extractor, model.rescale) for p in part.parameters() if p.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)


def test_several_extractors_share_one_pass():
    extractors = [tune(tiny(E), "e3va", rank=rank, hidden_ratio=0.5) for rank in (2, 4)]
    extractors[1].backbone = extractors[0].backbone
    for parameter in (p for extractor in extractors for p in extractor.adapters.parameters()):
        nn.init.normal_(parameter, std=0.1)
    images = torch.randn(2, 3, 64, 96)
    for extractor, features in zip(extractors, forward_shared_backbone(extractors, images), strict=True):
        assert all(torch.equal(ours, alone) for ours, alone in zip(features, extractor(images), strict=True))


def test_models_of_either_neck_share_one_pass(config):
    models = [build_random_model(config(*TINY_OVERRIDES[E], *neck), num_classes=3).eval() for neck in ([], NECK)]
    for model, seed in zip(models, (1, 2), strict=True):
        torch.manual_seed(seed)
        for parameter in model.extractor.adapters.parameters():
            nn.init.normal_(parameter, std=0.1)
    models[1].extractor.backbone = models[0].extractor.backbone
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    for (ours,), model in zip(predict_shared(models, images, [(64, 96)]), models, strict=True):
        (alone,) = model.predict(images, [(64, 96)])
        assert len(alone.boxes) and torch.equal(ours.boxes, alone.boxes) and torch.equal(ours.scores, alone.scores)


def transformers_layout(state, *, v3):
    """As transformers names DINOv2's and DINOv3's tensors."""
    named = {}
    for key, tensor in state.items():
        key = key.replace("patch_embed.proj.", f"embeddings.patch_embeddings.{'' if v3 else 'projection.'}")
        key = key.replace("pos_embed", "embeddings.position_embeddings")
        key = {"cls_token": "embeddings.cls_token", "reg_token": "embeddings.register_tokens"}.get(key, key)
        key = key.replace("blocks.", "layer." if v3 else "encoder.layer.")
        for number in "12":
            for scale in (f"gamma_{number}", f"ls{number}.gamma"):
                key = key.replace(scale, f"layer_scale{number}.lambda1")
        key = key.replace("attn.proj.", "attention.o_proj." if v3 else "attention.output.dense.")
        if v3:
            key = key.replace("mlp.fc1.", "mlp.up_proj.").replace("mlp.fc2.", "mlp.down_proj.")
        if ".attn.qkv." in key:
            names = ("q_proj", "k_proj", "v_proj") if v3 else ("attention.query", "attention.key", "attention.value")
            for name, part in zip(names, tensor.chunk(3), strict=True):
                named[key.replace("attn.qkv.", f"attention.{name}.")] = part.clone()
        else:
            named[key] = tensor
    return named | {"embeddings.mask_token": torch.zeros(1, state["cls_token"].shape[-1])}


@pytest.mark.parametrize("layout", ["timm", "authors", "transformers"])
@pytest.mark.parametrize("name", [V, E])
def test_every_layout_gives_the_same_weights(tmp_path, name, layout):
    donor = tiny(name).model
    state = donor.state_dict()
    if layout == "transformers":
        state = transformers_layout(state, v3=name == E)
    elif layout == "authors":
        state = {k.replace("gamma_", "ls").replace("reg_token", "storage_tokens"): v for k, v in state.items()}
        state = {k + ".gamma" if k[-4:] in (".ls1", ".ls2") else k: v for k, v in state.items()}
        state |= {"mask_token": torch.zeros(1, 8), "norm.weight": torch.ones(8)}
        if name == E:
            state |= {f"blocks.{i}.attn.qkv.bias": torch.zeros(192) for i in range(5)}
    torch.save(state, tmp_path / "weights.pth")
    options = {"name": "tiny", "family": "vit", "timm_name": name, "model_args": TINY[name]}
    loaded, _ = build_backbone(**options, weights=str(tmp_path / "weights.pth"), seed=0)
    torch.testing.assert_close(loaded.model.state_dict(), donor.state_dict(), rtol=0, atol=0)


def test_weights_with_biases_are_no_weights_without(tmp_path):
    state = tiny("vit_small_patch16_dinov3_qkvb", **TINY[E]).model.state_dict()
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"10 unexpected: .*q_bias"):
        build_backbone(
            name="tiny", family="vit", timm_name=E, model_args=TINY[E], weights=str(tmp_path / "weights.pth"), seed=0
        )


@pytest.mark.slow
def test_train_evaluate_export_and_predict_with_a_simple_pyramid(e3va, tmp_path):
    e3va("train", *SIMPLE_PYRAMID, *QUICK, "dataset.image_size=64", "hydra.run.dir=run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    e3va("export-adapter", "checkpoint=run", "output=adapter", "precision=fp32")
    e3va("evaluate", "checkpoint=adapter", "trainer.accelerator=cpu", "hydra.run.dir=evaluation")
    assert json.loads((tmp_path / "evaluation" / "metrics.json").read_text()) == metrics
    e3va("export", "checkpoint=run", "output=model.pt2", "image_size=[64,96]")
    e3va("predict", "checkpoint=adapter", "input=run/predictions.png", "output=found", "accelerator=cpu")
    assert list((tmp_path / "found").iterdir())
