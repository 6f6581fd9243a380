"""Run folders as `e3va train` writes them, with random weights: no training needed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from e3va_cli.components.options import UNCHANGED, group_of, info_of
from e3va_cli.config.composition import load_config
from e3va_cli.config.run_config import RunConfig, kind_of
from e3va_cli.models.model import build_model
from e3va_cli.training.checkpoints import METADATA_KEY, build_metadata, trainable_state_dict

SMALL = ["head=mask_rcnn_nano", "dataset.val_short_side=96", "dataset.max_size=128", "head.rpn.post_nms_test=20"]
SEGMENTER = [
    "dataset=ade20k",
    "dataset.root=x",
    "dataset.num_classes=3",
    "head=upernet_nano",
    "dataset.short_side=96",
    "dataset.max_size=128",
    "backbone=swin_nano",
]
CLASSES = {5: ["circle", "square", "triangle", "star", "ring"], 3: ["sky", "road", "tree"]}


def craft(
    folder: Path, *overrides: str, seed: int = 0, tens: bool = True, classes: Sequence[str] | None = None
) -> Path:
    """A run folder of the configuration under `overrides`; what would be trained is drawn from `seed`.

    Classes have the numbers 10, 20, ... of a data set that counts in tens, else 1, 2, ... as the program's own do.
    """
    config = load_config("train", overrides)
    if classes is None:
        assert config.dataset.num_classes is not None
        classes = CLASSES[config.dataset.num_classes]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(config, num_classes=len(classes))
        state = {
            f"model.{name}": value + 0.03 * torch.randn_like(value) if value.is_floating_point() else value
            for name, value in trainable_state_dict(model).items()
        }
    numbers = [(10 if tens else 1) * k for k in range(1, len(classes) + 1)]
    belongs_to = build_metadata(model.identity, config, list(classes), numbers)
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": state, METADATA_KEY: belongs_to, "global_step": 1}, folder / "checkpoints" / "last.ckpt")
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "overrides.yaml").write_text("[]")
    return folder


def aged(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as it was before the options existed that are younger than their components."""
    config = copy.deepcopy(config)

    def remove(kind: type, options: dict[str, Any]) -> None:
        for one in fields(kind):
            if info_of(one).legacy_value is not UNCHANGED:
                del options[one.name]
            elif (group := group_of(one)) is not None:
                remove(group, options[one.name])

    remove(RunConfig, config)
    for name, options in config.items():
        if isinstance(options, dict) and (kind := kind_of(name, options)) is not None:
            remove(kind, options)
    return config


@contextmanager
def counted(backbone):
    """How often a backbone embeds images and runs its last block, the heaviest it has."""
    counts = {"stem": 0, "block": 0}

    def count(name):
        def hook(*_):
            counts[name] += 1

        return hook

    handles = [
        backbone.model.patch_embed.register_forward_hook(count("stem")),
        backbone.model.layers[-1].blocks[-1].mlp.register_forward_hook(count("block")),
    ]
    yield counts
    for handle in handles:
        handle.remove()
