"""The model card of an exported adapter."""

from __future__ import annotations

import shlex
from typing import Any

from e3va_cli.models.heads import HEADS
from e3va_cli.runs.folder import ADAPTER_WEIGHTS
from e3va_cli.utils.environment import MIB
from e3va_cli.utils.text import pluralize

TASKS = {"masks": "instance segmentation", "boxes": "object detection", "semantic": "semantic segmentation"}
PLACES = {"dataset.root": "DATA", "backbone.weights": "FILE"}
HUB = "https://huggingface.co/timm"


def card(config: dict[str, Any], name: str) -> str:
    """Markdown for `README.md`.

    Args:
        config: the content of `adapter_config.json`.
        name: of the folder, which stands for its path in the commands.
    """
    sections = [
        _head(config, name),
        _results(config),
        _use(config, name),
        _backbone(config),
        _classes(config),
        _images(config),
        _training(config),
        "## Licence\n\nWhoever passes these weights on names their licence here. They come from a backbone and a data "
        f"set ({config['config']['dataset']['name']}), whose own terms hold as well.",
    ]
    return "\n\n".join(sections) + "\n"


def _head(config: dict[str, Any], name: str) -> str:
    needs = HEADS[config["head"]["name"]].target_types
    task = next(text for what, text in TASKS.items() if what in needs)
    counts, weights = config["parameters"], config["weights"]
    return (
        f"# {name}\n\n"
        f"Trained weights for {task}: the method `{config['adapter']['name']}` on the backbone "
        f"`{config['backbone']['name']}`, with the head `{config['head']['name']}`, made by "
        "[e3va](https://arxiv.org/abs/2306.09729). The backbone itself is not in here"
        f"{'' if config['adapter']['name'] != 'full' else ', but all of its weights as they were trained further are'}."
        "\n\n| what | numbers |\n|---|--:|\n"
        f"| on the backbone: adapters, output norms | {counts['stored_on_backbone']:,} |\n"
        f"| neck and head | {counts['stored_neck_and_head']:,} |\n"
        f"| `{ADAPTER_WEIGHTS}` ({weights['precision']}) | {weights['bytes'] / MIB:.1f} MiB |"
    )


def _results(config: dict[str, Any]) -> str:
    metrics = config["metrics"]
    if not metrics:
        return "## Results\n\nThis state was not evaluated when it was exported; `e3va evaluate` does it."
    kinds = {k: v for k, v in metrics.items() if k in ("box", "mask")} or {"all pixels": metrics}
    measures = [key for key in next(iter(kinds.values())) if key != "per_class"]
    lines = [
        f"On the validation images of `{config['config']['dataset']['name']}`, in percent, after "
        f"{pluralize(config['steps'], 'step')} of training:\n",
        f"| | {' | '.join(measure.replace('_', ' ') for measure in measures)} |",
        f"|---|{'--:|' * len(measures)}",
        *(f"| {kind} | {' | '.join(_percent(values.get(m)) for m in measures)} |" for kind, values in kinds.items()),
    ]
    return "## Results\n\n" + "\n".join(lines)


def _use(config: dict[str, Any], name: str) -> str:
    place = shlex.quote(name)
    root = " dataset.root=DATA" if "root" in config["config"]["dataset"] else ""
    weights = " backbone.weights=FILE" if config["backbone"]["weights"] == "file" else ""
    return (
        f"## Use\n\n```\ne3va evaluate checkpoint={place}{root}{weights}\n"
        f"e3va predict checkpoint={place} input=photo.jpg{weights}\n```\n\n"
        "```python\nfrom e3va_cli import load_adapter\n\n"
        f"model = load_adapter({name!r})\nmodel.predict('photo.jpg')\n```"
    )


def _backbone(config: dict[str, Any]) -> str:
    backbone = config["backbone"]
    timm_name = backbone["timm_name"]
    how = {
        "pretrained": f"The weights are timm's, [{timm_name}]({HUB}/{timm_name}), and are fetched at the first use. "
        f"Without a network: `hf download timm/{timm_name} model.safetensors` elsewhere, and `backbone.weights=FILE`.",
        "file": "The weights came from a file; give it with `backbone.weights=FILE`, in timm's layout or the authors'.",
        "random": f"Its weights are random, drawn from seed {config['config']['backbone']['seed']}: nothing to fetch, "
        "and nothing to expect of the results.",
    }[backbone["weights"]]
    return (
        f"## Backbone\n\n`{backbone['name']}`, {config['parameters']['backbone_params']:,} parameters. {how}\n\n"
        f"Other weights are refused: theirs must have the fingerprint (SHA-256)\n`{backbone['fingerprint']}`."
    )


def _classes(config: dict[str, Any]) -> str:
    pairs = zip(config["category_ids"], config["classes"], strict=True)
    return f"## Classes\n\n{len(config['classes'])}, with the data set's own numbers: " + ", ".join(
        f"{number} {_plain(name)}" for number, name in pairs
    )


def _images(config: dict[str, Any]) -> str:
    size, norm = config["image_size"], config["normalisation"]
    side = size.get("val_short_side", size.get("short_side"))
    return (
        f"## Images\n\nRGB, resized to a short side of {side} and a long side of at most {size['max_size']} pixels; "
        f"the largest in training had {' x '.join(map(str, size['largest_in_training']))} (height x width). "
        f"Of values in 0..1: mean {norm['mean']}, standard deviation {norm['std']}."
    )


def _training(config: dict[str, Any]) -> str:
    words = " ".join(shlex.quote(_without_place(word)) for word in config["overrides"])
    versions = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    return f"## Training\n\n```\ne3va train {words}\n```\n\n{versions}."


def _without_place(word: str) -> str:
    """An override with a stand-in where it names a place on the machine that trained."""
    key = word.partition("=")[0]
    return f"{key}={PLACES[key]}" if key in PLACES else word


def _plain(text: str) -> str:
    """A text that Markdown leaves as it is."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in " ".join(text.split()))


def _percent(value: Any) -> str:
    return f"{100 * value:.1f}" if isinstance(value, int | float) else "-"
