"""Build the model card of an exported adapter."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from e3va_cli.models.heads import HEADS
from e3va_cli.runs.folder import ADAPTER_WEIGHTS
from e3va_cli.utils.environment import MIB
from e3va_cli.utils.text import pluralize

TASKS = {"masks": "instance segmentation", "boxes": "object detection", "semantic": "semantic segmentation"}
PLACEHOLDERS = {"dataset.root": "DATA", "backbone.weights": "FILE"}  # of paths on the training machine
HUB = "https://huggingface.co/timm"


def build_model_card(config: dict[str, Any], name: str) -> str:
    """Return the Markdown of `README.md`.

    Args:
        config: the content of `adapter_config.json`.
        name: of the folder, used as its path in commands.
    """
    sections = [
        _summary(config, name),
        _results(config),
        _usage(config, name),
        _backbone(config),
        _classes(config),
        _images(config),
        _training(config),
        "## License\n\nAdd a license before you distribute these weights. The terms of the backbone and of the dataset "
        f"({config['config']['dataset']['name']}) also apply.",
    ]
    return "\n\n".join(sections) + "\n"


def _summary(config: dict[str, Any], name: str) -> str:
    target_types = HEADS[config["head"]["name"]].target_types
    task = next(task for target_type, task in TASKS.items() if target_type in target_types)
    counts, weights = config["parameters"], config["weights"]
    included = (
        "All weights of the backbone are included, as they were fine-tuned."
        if config["adapter"]["name"] == "full"
        else "The frozen backbone is not included."
    )
    return (
        f"# {name}\n\n"
        f"Weights for {task}: method `{config['adapter']['name']}`, backbone `{config['backbone']['name']}`, head "
        f"`{config['head']['name']}`, trained with [e3va](https://arxiv.org/abs/2306.09729). {included}"
        "\n\n| weights | parameters |\n|---|--:|\n"
        f"| on the backbone: adapters, output norms | {counts['stored_on_backbone']:,} |\n"
        f"| neck and head | {counts['stored_neck_and_head']:,} |\n"
        f"| `{ADAPTER_WEIGHTS}` ({weights['precision']}) | {weights['bytes'] / MIB:.1f} MiB |"
    )


def _results(config: dict[str, Any]) -> str:
    metrics = config["metrics"]
    if not metrics:
        return "## Results\n\nThese weights were not evaluated before the export; run `e3va evaluate`."
    rows = {k: v for k, v in metrics.items() if k in ("box", "mask")} or {"all pixels": metrics}
    columns = [key for key in next(iter(rows.values())) if key != "per_class"]
    lines = [
        f"On the validation images of `{config['config']['dataset']['name']}`, in percent, after "
        f"{pluralize(config['steps'], 'step')} of training:\n",
        f"| | {' | '.join(column.replace('_', ' ') for column in columns)} |",
        f"|---|{'--:|' * len(columns)}",
        *(f"| {name} | {' | '.join(_percent(values.get(c)) for c in columns)} |" for name, values in rows.items()),
    ]
    return "## Results\n\n" + "\n".join(lines)


def _usage(config: dict[str, Any], name: str) -> str:
    path = shlex.quote(name)
    root = " dataset.root=DATA" if "root" in config["config"]["dataset"] else ""
    weights = " backbone.weights=FILE" if config["backbone"]["weights"] == "file" else ""
    return (
        f"## Usage\n\n```\ne3va evaluate checkpoint={path}{root}{weights}\n"
        f"e3va predict checkpoint={path} input=photo.jpg{weights}\n```\n\n"
        "```python\nfrom e3va_cli import load_adapter\n\n"
        f"model = load_adapter({name!r})\nmodel.predict('photo.jpg')\n```"
    )


def _backbone(config: dict[str, Any]) -> str:
    backbone = config["backbone"]
    timm_name = backbone["timm_name"]
    source = {
        "pretrained": f"The weights are timm's, [{timm_name}]({HUB}/{timm_name}), and are downloaded on first use. "
        f"Without a network, run `hf download timm/{timm_name} model.safetensors` on another machine and set "
        "`backbone.weights=FILE`.",
        "file": "The weights were loaded from a file (of timm, the authors or transformers); set `backbone.weights=`.",
        "random": f"The weights are random (seed {config['config']['backbone']['seed']}), for tests only.",
    }[backbone["weights"]]
    return (
        f"## Backbone\n\n`{backbone['name']}`, {config['parameters']['backbone_params']:,} parameters. {source}\n\n"
        f"Other weights are refused; the required fingerprint (SHA-256) is\n`{backbone['fingerprint']}`."
    )


def _classes(config: dict[str, Any]) -> str:
    pairs = zip(config["category_ids"], config["classes"], strict=True)
    return f"## Classes\n\n{len(config['classes'])}, with the category ids of the dataset: " + ", ".join(
        f"{category_id} {_escape_markdown(name)}" for category_id, name in pairs
    )


def _images(config: dict[str, Any]) -> str:
    size, norm = config["image_size"], config["normalisation"]
    side = size.get("val_short_side", size.get("short_side"))
    return (
        f"## Images\n\nRGB, resized to a short side of {side} and a long side of at most {size['max_size']} pixels; "
        f"largest training image: {' x '.join(map(str, size['largest_in_training']))} (height x width). "
        f"Normalized from 0..1 by mean {norm['mean']} and standard deviation {norm['std']}."
    )


def _training(config: dict[str, Any]) -> str:
    overrides = " ".join(shlex.quote(_hide_path(override)) for override in config["overrides"])
    versions = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    return f"## Training\n\n```\ne3va train {overrides}\n```\n\n{versions}."


def _hide_path(override: str) -> str:
    """Replace the value of an override that is a path on the training machine; of `init_from`, keep the run's name."""
    key, _, value = override.partition("=")
    if key == "init_from":
        path = Path(value.strip("'\""))
        return f"{key}={path.parent.parent.name if path.suffix == '.ckpt' else path.name}"
    return f"{key}={PLACEHOLDERS[key]}" if key in PLACEHOLDERS else override


def _escape_markdown(text: str) -> str:
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in " ".join(text.split()))


def _percent(value: Any) -> str:
    return f"{100 * value:.1f}" if isinstance(value, int | float) else "-"
