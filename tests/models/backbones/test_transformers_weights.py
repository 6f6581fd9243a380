"""Weights of Swin, Swin V2, ConvNeXt and Hiera in the layouts of transformers and of the authors.

Names, shapes and features of transformers' networks are of version 5.24, by `transformers_reference.py`.
"""

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from e3va_cli.errors import UserError
from tests.components import build_backbone
from tests.models.backbones.transformers_reference import CONVNEXT, FILE, HIERA, SIZES, SWIN, images, numbers, sample

REFERENCE = json.loads(FILE.read_text())
SWIN_ARGS = {key: SWIN[key] for key in ("embed_dim", "depths", "num_heads", "window_size")}
CONVNEXT_ARGS = {"depths": CONVNEXT["depths"], "dims": CONVNEXT["hidden_sizes"]}
HIERA_ARGS = {
    "embed_dim": HIERA["hidden_size"],
    "stages": HIERA["blocks_per_stage"],
    "window_spec": HIERA["window_size_per_stage"],
    "global_att_blocks": HIERA["global_attention_blocks"],
}
OURS = {  # class of transformers: family, timm's name, arguments
    "SwinForImageClassification": ("swin", "swin_tiny_patch4_window7_224", SWIN_ARGS),
    "SwinForMaskedImageModeling": ("swin", "swin_tiny_patch4_window7_224", SWIN_ARGS),
    "Swinv2Model": ("swinv2", "swinv2_tiny_window8_256", SWIN_ARGS),
    "ConvNextForImageClassification": ("convnext", "convnext_tiny", CONVNEXT_ARGS),
    "ConvNextV2Model": ("convnext", "convnextv2_tiny", CONVNEXT_ARGS),
    "DINOv3ConvNextModel": ("convnext", "convnext_tiny.dinov3_lvd1689m", CONVNEXT_ARGS),
    "Sam2HieraDetModel": ("hiera", "sam2_hiera_tiny", HIERA_ARGS),
}
PREFIXES = {
    "SwinForImageClassification": "swin.",
    "SwinForMaskedImageModeling": "swin.",
    "ConvNextForImageClassification": "convnext.",
}
SWIN_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "attn.relative_position_bias_table": "attention.self.relative_position_bias_table",
    "attn.logit_scale": "attention.self.logit_scale",
    "attn.cpb_mlp.0": "attention.self.continuous_position_bias_mlp.0",
    "attn.cpb_mlp.2": "attention.self.continuous_position_bias_mlp.2",
    "attn.q_bias": "attention.self.query.bias",
    "attn.v_bias": "attention.self.value.bias",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
CONVNEXT_BLOCK = {
    "conv_dw": "dwconv",
    "norm": "layernorm",
    "mlp.fc1": "pwconv1",
    "mlp.fc2": "pwconv2",
    "mlp.grn": "grn",
    "gamma": "layer_scale_parameter",
}
DINOV3_BLOCK = {
    "conv_dw": "depthwise_conv",
    "norm": "layer_norm",
    "mlp.fc1": "pointwise_conv1",
    "mlp.fc2": "pointwise_conv2",
    "gamma": "gamma",
}
HIERA_NAMES = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.proj_in",
    "mlp.fc2": "mlp.proj_out",
    "patch_embed.proj": "patch_embed.projection",
}
AUTHORS_BLOCK = {"conv_dw": "dwconv", "norm": "norm", "mlp.fc1": "pwconv1", "mlp.fc2": "pwconv2", "gamma": "gamma"}


def build(class_name, **options):
    family, timm_name, model_args = OURS[class_name]
    backbone, _ = build_backbone(name="small", family=family, timm_name=timm_name, model_args=model_args, **options)
    return backbone.eval()


def random_state(class_name):
    state = build(class_name, seed=1).model.state_dict()
    return {name: nn.init.normal_(tensor) for name, tensor in state.items() if tensor.is_floating_point()}


def in_block(name, table):
    """Rename the part after `blocks.N.`, which may end in `.weight` or `.bias`."""
    return table.get(name) or ".".join((table[name.rpartition(".")[0]], name.rpartition(".")[2]))


def swin_in_transformers(state):
    named = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] == "patch_embed":
            named[f"embeddings.{'patch_embeddings.projection' if parts[1] == 'proj' else 'norm'}.{parts[2]}"] = tensor
        elif parts[2] == "downsample":
            named[f"encoder.layers.{int(parts[1]) - 1}.{'.'.join(parts[2:])}"] = tensor
        elif parts[2] == "blocks":
            block, rest = f"encoder.layers.{parts[1]}.blocks.{parts[3]}.", ".".join(parts[4:])
            if rest.startswith("attn.qkv."):
                for projection, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    named[f"{block}attention.self.{projection}.{parts[-1]}"] = part.clone()
            else:
                named[block + in_block(rest, SWIN_BLOCK)] = tensor
    return named


def convnext_renamed(state, table, stem, downsample, block):
    """Rename a ConvNeXt's tensors: `stem` and `downsample` by their numbers, those of a block by `table`."""
    named = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] == "stem":
            named[f"{stem[int(parts[1])]}.{parts[2]}"] = tensor
        elif parts[2] == "downsample":
            named[f"{downsample.format(*parts[1:])}.{parts[4]}"] = tensor
        else:
            named[f"{block.format(parts[1], parts[3])}.{in_block('.'.join(parts[4:]), table)}"] = tensor
    return named


def in_transformers(class_name, state):
    """Rename timm's tensors as transformers does, without what a backbone lacks."""
    if class_name.startswith("Swin"):
        return swin_in_transformers(state)
    if class_name.startswith("Sam2"):
        return renamed_parts(state, HIERA_NAMES)
    if class_name.startswith("DINO"):
        downsample = "stages.{0}.downsample_layers.{2}"
        stem = [downsample.format(0, None, number) for number in (0, 1)]
        return convnext_renamed(state, DINOV3_BLOCK, stem, downsample, "stages.{}.layers.{}")
    stem = ["embeddings.patch_embeddings", "embeddings.layernorm"]
    downsample, block = "encoder.stages.{0}.downsampling_layer.{2}", "encoder.stages.{}.layers.{}"
    named = convnext_renamed(state, CONVNEXT_BLOCK, stem, downsample, block)
    return {name: x[None, None, None] if ".grn." in name else x for name, x in named.items()}


def renamed_parts(state, table):
    """Rename by replacing parts of names."""
    for old, new in table.items():
        state = {re.sub(rf"(^|\.){re.escape(old)}\.", rf"\g<1>{new}.", name): x for name, x in state.items()}
    return state


def in_authors_layout(class_name, state):
    if class_name.startswith("Sam2"):
        named = renamed_parts(state, {"mlp.fc1": "mlp.layers.0", "mlp.fc2": "mlp.layers.1"})
        return {f"image_encoder.trunk.{name}": x for name, x in named.items()} | {"memory.weight": torch.zeros(1)}
    stem, downsample = ["downsample_layers.0.0", "downsample_layers.0.1"], "downsample_layers.{0}.{2}"
    return convnext_renamed(state, AUTHORS_BLOCK, stem, downsample, "stages.{}.{}")


@pytest.mark.parametrize("class_name", OURS)
def test_features_equal_those_of_transformers(tmp_path, class_name):
    state = {name: numbers(name, shape) for name, shape in REFERENCE[class_name]["shapes"].items()}
    save_file(state, tmp_path / "model.safetensors")
    backbone = build(class_name, weights=str(tmp_path / "model.safetensors"))
    with torch.no_grad():
        features = backbone(images(SIZES[class_name[:4]]))
    for ours, expected in zip(sample(features), REFERENCE[class_name]["features"], strict=True):
        torch.testing.assert_close(ours, torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("class_name", OURS)
def test_weights_are_equal_in_transformers_layout(tmp_path, class_name):
    state = random_state(class_name)
    named = {PREFIXES.get(class_name, "") + key: x for key, x in in_transformers(class_name, state).items()}
    others = {key: shape for key, shape in REFERENCE[class_name]["shapes"].items() if key not in named}
    assert {key: list(x.shape) for key, x in named.items()} | others == REFERENCE[class_name]["shapes"]
    assert all(re.search(r"layer_?norm\.|classifier|decoder|mask_token", key) for key in others)
    save_file(named, tmp_path / "model.safetensors")
    loaded = build(class_name, weights=str(tmp_path / "model.safetensors")).model.state_dict()
    torch.testing.assert_close({key: loaded[key] for key in state}, state, rtol=0, atol=0)


@pytest.mark.parametrize("class_name", ["ConvNextForImageClassification", "DINOv3ConvNextModel", "Sam2HieraDetModel"])
def test_weights_are_equal_in_the_authors_layout(tmp_path, class_name):
    state = random_state(class_name)
    others = {"norm.weight": torch.zeros(128), "norm.bias": torch.zeros(128), "head.weight": torch.zeros(9, 128)}
    torch.save({"model": in_authors_layout(class_name, state) | others}, tmp_path / "weights.pth")
    loaded = build(class_name, weights=str(tmp_path / "weights.pth")).model.state_dict()
    torch.testing.assert_close({key: loaded[key] for key in state}, state, rtol=0, atol=0)


def test_names_of_transformers_modules_are_read_too(tmp_path):
    """`state_dict()` of transformers 5 has other names than its files."""
    state = random_state("SwinForImageClassification")
    named = swin_in_transformers(state)
    for old, new in {
        "attention.self.query": "attention.q_proj",
        "attention.self.key": "attention.k_proj",
        "attention.self.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "attention.self.relative": "attention.relative_position_bias.relative",
        "intermediate.dense": "mlp.fc1",
        ".output.dense": ".mlp.fc2",
    }.items():
        named = {key.replace(old, new): x for key, x in named.items()}
    torch.save(named, tmp_path / "weights.pth")
    loaded = build("SwinForImageClassification", weights=str(tmp_path / "weights.pth")).model.state_dict()
    torch.testing.assert_close({key: loaded[key] for key in state}, state, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("class_name", "other", "says"),
    [
        ("SwinForImageClassification", "Swinv2Model", r"12 missing: .*qkv\.bias"),
        ("ConvNextV2Model", "ConvNextForImageClassification", r"10 missing: .*grn"),
        ("ConvNextForImageClassification", "Swinv2Model", "does not match this backbone"),
    ],
)
def test_weights_of_another_family_are_refused(tmp_path, class_name, other, says):
    state = {name: numbers(name, shape) for name, shape in REFERENCE[other]["shapes"].items()}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=says):
        build(class_name, weights=str(tmp_path / "model.safetensors"))
