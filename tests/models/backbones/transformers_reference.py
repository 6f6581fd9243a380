"""Small networks of the package transformers: their tensors' names and shapes, and features on given weights.

python tests/models/backbones/transformers_reference.py     # needs transformers; writes transformers_reference.json
"""

import json
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

FILE = Path(__file__).with_suffix(".json")
SWIN = {
    "image_size": 128,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 1, 2, 1],
    "num_heads": [1, 2, 4, 8],
    "window_size": 4,
}
CONVNEXT = {"depths": [1, 1, 2, 1], "hidden_sizes": [16, 32, 64, 128]}
HIERA = {
    "hidden_size": 16,
    "image_size": [128, 128],
    "blocks_per_stage": [1, 2, 3, 2],
    "embed_dim_per_stage": [16, 32, 64, 128],
    "num_attention_heads_per_stage": [1, 2, 4, 8],
    "window_size_per_stage": [8, 4, 6, 2],
    "global_attention_blocks": [4],
}
CONFIGS = {  # class in transformers: its arguments
    "SwinForImageClassification": SWIN,
    "SwinForMaskedImageModeling": SWIN,
    "Swinv2Model": SWIN,
    "ConvNextForImageClassification": CONVNEXT,
    "ConvNextV2Model": CONVNEXT,
    "DINOv3ConvNextModel": CONVNEXT,
    "Sam2HieraDetModel": HIERA,
}
SIZES = {"Swin": 128, "Conv": 64, "DINO": 64, "Sam2": 128}  # of images, by the first letters of a class


def numbers(name, shape):
    """Weights that depend on a tensor's name, as large as those of a trained network: scales about 1, biases small."""
    generator = np.random.RandomState(zlib.crc32(name.encode()))
    values = torch.from_numpy(generator.standard_normal(shape)).float()
    if len(shape) > 1 and max(shape[1:]) > 1:
        return values / values[0].numel() ** 0.5
    return 0.1 * values if name.endswith("bias") else 1 + 0.3 * values


def images(size):
    """A batch of one image (1, 3, size, size)."""
    return numbers("images", (1, 3, size, size)) * size


def sample(features):
    """A few of the values of each map (1, H, W, C), layer-normalized."""
    normed = (torch.nn.functional.layer_norm(x, x.shape[-1:]).flatten() for x in features)
    return [x[torch.linspace(0, len(x) - 1, 12).long()] for x in normed]


def reference(class_name):
    """The names and shapes that `save_pretrained` writes, and a `sample` of the features at the end of each stage."""
    import transformers

    kind = getattr(transformers, class_name)
    model = kind(kind.config_class(**CONFIGS[class_name]))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        shapes = {name: list(x.shape) for name, x in load_file(f"{folder}/model.safetensors").items()}
        state = {name: numbers(name, shape) for name, shape in shapes.items()}
        save_file(state, f"{folder}/model.safetensors", {"format": "pt"})
        network = kind.from_pretrained(folder).eval()
    features = []

    def append(_, __, output):
        output = output[0] if isinstance(output, tuple) else output
        if output.ndim == 3:  # B, N, C
            output = output.unflatten(1, (int(output.shape[1] ** 0.5), -1))
        elif not hasattr(network, "blocks"):  # B, C, H, W
            output = output.permute(0, 2, 3, 1)
        features.append(output)

    if hasattr(network, "blocks"):
        ends = [network.blocks[end] for end in network.stage_ends]
    else:
        stages = next(module for name, module in network.named_modules() if name.endswith(("encoder.layers", "stages")))
        ends = [stage.blocks[-1] if hasattr(stage, "blocks") else stage for stage in stages]
    for end in ends:
        end.register_forward_hook(append)
    with torch.no_grad():
        network(images(SIZES[class_name[:4]]))
    return {"shapes": shapes, "features": [[round(float(x), 7) for x in values] for values in sample(features)]}


if __name__ == "__main__":
    lines = (f"{json.dumps(name)}: {json.dumps(reference(name))}" for name in CONFIGS)
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
