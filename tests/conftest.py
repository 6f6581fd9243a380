"""What tests share: a small Swin, a small configuration, and the `e3va` command in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module

from e3va_cli.backbones import ResidualBackbone, build_backbone
from e3va_cli.composition import CONFIG_MODULE, plain
from e3va_cli.config import register_schemas

NANO = {
    "name": "swin_nano",
    "timm_name": "swin_tiny_patch4_window7_224",
    "model_args": {"embed_dim": 32, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)},
}

# The shortest run that goes through everything.
QUICK = [
    "dataset.train_images=8",
    "dataset.val_images=4",
    "data.batch_size=2",
    "data.val_batch_size=2",
    "trainer.max_epochs=1",
    "trainer.log_every_n_steps=1",
    "trainer.tensorboard=false",
    "trainer.accelerator=cpu",
]


@pytest.fixture
def nano() -> ResidualBackbone:
    """The smallest backbone, random."""
    backbone, _ = build_backbone(**NANO, pretrained=False, weights=None, seed=0)
    return backbone


@pytest.fixture
def config() -> Callable[..., dict[str, Any]]:
    """The plain configuration of a command under overrides."""

    def build(*overrides: str, command: str = "train") -> dict[str, Any]:
        register_schemas()
        with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
            return plain(compose(command, overrides=list(overrides)))

    return build


@pytest.fixture
def e3va(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `e3va WORDS` from an empty folder."""

    def run(*words: str, expect: int = 0, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "e3va_cli", *words],
            cwd=cwd,
            env={**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert expect == 1 or "Traceback" not in done.stderr, done.stderr
        return done

    return run


torch.set_num_threads(1)  # the tests' networks are small, and what shares the machine disturbs one thread least


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
