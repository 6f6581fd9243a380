"""Write the outputs of pre-training: weights in float16, a card with their origin, and the results."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from labeled_images import LabeledImages
from safetensors.torch import save_file
from torch import nn

from e3va_cli.models.backbones import BackboneFingerprint
from e3va_cli.utils.environment import MIB, device_name, package_versions
from e3va_cli.utils.files import atomic_write, write_json

MACHINE = ("data", "output", "workers", "checkpoint_minutes", "data_name", "data_terms", "name", "val_size")
CARD = """# {name}, pre-trained

The weights of `backbone={name}` without a classifier, float16, in timm's names: `{file}`.

| | |
|---|---|
| data | {data}: {images:,} training images of {side}x{side} pixels, {classes} classes |
| terms of the data | {terms} |
| top-1 on the validation images, whole, float32 | {top1} |
| length | {epochs:.1f} epochs, {steps:,} steps of {batch}, {minutes:.1f} minutes in all |
| machine, date | {device}, {date} |
| fingerprint | `{fingerprint}` |

Supervised: random resized crops, flips, color, CutMix and mixup, label smoothing, stochastic depth; AdamW, linear
warm-up, cosine; the weights are a moving average. Written by `scripts/pretrain.py` with

{options}

Versions: {versions}.
"""


def write_weights(backbone: nn.Module, path: Path) -> None:
    """Write the backbone's parameters in float16 with timm's names."""
    model = backbone.get_submodule("model")
    state = {name: value.detach().half().cpu().contiguous() for name, value in model.named_parameters()}
    with atomic_write(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})


def write_outputs(
    options: argparse.Namespace,
    rows: Sequence[dict[str, float]],
    top1: dict[int, float],
    identity: BackboneFingerprint,
    train: LabeledImages,
    device: torch.device,
) -> None:
    """Write the card and the results."""
    recipe: dict[str, Any] = {key: value for key, value in vars(options).items() if key not in MACHINE}
    results = {
        "top1": {str(side): value for side, value in top1.items()},
        "fingerprint": identity.fingerprint,
        "device": device_name(device),
        "peak_gpu_mib": torch.cuda.max_memory_allocated(device) / MIB if device.type == "cuda" else None,
        "date": datetime.date.today().isoformat(),
        "versions": package_versions(),
        "options": recipe,
        "evaluations": list(rows),
    }
    write_json(options.output / "metrics.json", results)
    last = rows[-1]
    card = CARD.format(
        name=options.name,
        file=f"{options.name}.safetensors",
        data=options.data_name,
        images=len(train.labels),
        side=train.images.shape[-1],
        classes=len(train.classes),
        terms=options.data_terms,
        top1=", ".join(f"{value:.2f} % at {side}x{side}" for side, value in top1.items()),
        epochs=last["epoch"],
        steps=last["step"],
        batch=options.batch_size,
        minutes=last["seconds"] / 60,
        device=results["device"],
        date=results["date"],
        fingerprint=identity.fingerprint,
        options="\n".join(f"    {key} = {value}" for key, value in recipe.items()),
        versions=", ".join(f"{name} {version}" for name, version in package_versions().items()),
    )
    with atomic_write(options.output / f"{options.name}.md") as temporary:
        temporary.write_text(card, encoding="utf-8")
    print(card)
