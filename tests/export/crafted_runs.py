"""Run folders as `e3va train` leaves them, with random weights instead of trained ones: made in a moment."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module

from e3va_cli.composition import CONFIG_MODULE, plain
from e3va_cli.config import register_schemas
from e3va_cli.config.legacy import BY_NAME, LEGACY_OPTIONS
from e3va_cli.model import build_model
from e3va_cli.training.checkpoints import ABOUT, about_model, trained_state

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


def craft(folder: Path, *overrides: str, seed: int = 0, tens: bool = True) -> Path:
    """A run folder of the configuration under `overrides`; what would be trained is drawn from `seed`.

    Classes have the numbers 10, 20, ... of a data set that counts in tens, else 1, 2, ... as the program's own do.
    """
    register_schemas()
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        config = plain(compose("train", overrides=list(overrides)))
    config = {key: value for key, value in config.items() if key not in ("resume", "budget")}
    classes = CLASSES[config["dataset"]["num_classes"]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(config, num_classes=len(classes))
        state = {
            f"model.{name}": value + 0.03 * torch.randn_like(value) if value.is_floating_point() else value
            for name, value in trained_state(model).items()
        }
    numbers = [(10 if tens else 1) * k for k in range(1, len(classes) + 1)]
    about = about_model(model.identity, config, classes, numbers)
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": state, ABOUT: about, "global_step": 1}, folder / "checkpoints" / "last.ckpt")
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "overrides.yaml").write_text("[]")
    return folder


def aged(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as it was before the options of the table existed."""
    config = copy.deepcopy(config)

    def remove(part: dict[str, Any], options: dict[str, Any]) -> None:
        for key, value in options.items():
            if isinstance(value, dict) and isinstance(part[key], dict):
                remove(part[key], value)
            else:
                del part[key]

    for group, table in LEGACY_OPTIONS.items():
        remove(config[group], table.get(config[group]["name"], {}) if group in BY_NAME else table)
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
