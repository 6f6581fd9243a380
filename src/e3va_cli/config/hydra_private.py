"""Private parts of Hydra and OmegaConf that have no public name; `tests/config/test_hydra_private.py` tests each."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig


def parse_arguments(arguments: Sequence[str]) -> Namespace:
    """Return the arguments of a command as Hydra reads them: its flags, and `overrides`."""
    return get_args_parser().parse_args(list(arguments))


def child_config(cfg: DictConfig, key: str) -> DictConfig | None:
    """Return the group of options at `key` without resolving anything; None if it is no group, missing or null."""
    node = cfg._get_node(key)
    return node if isinstance(node, DictConfig) and not node._is_missing() and not node._is_none() else None
