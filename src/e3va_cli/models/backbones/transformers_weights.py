"""Renaming of tensors in the layout of the package transformers."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

PROJECTION = re.compile(r"\.attention\.(?:attention\.|self\.)?(q|k|v)(?:uery|ey|alue|_proj)\.(weight|bias)$")


def prefix_of(ending: str, state: dict[str, Tensor]) -> str | None:
    """Return what precedes `ending` in the name of a tensor, such as `swin.`; None if no name ends so."""
    return next((name.removesuffix(ending) for name in state if name.endswith(ending)), None)


def rename_tensors(state: dict[str, Tensor], prefix: str, renames: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """Rename the tensors below `prefix`, drop the others, and fuse query, key and value projections to `attn.qkv`.

    Args:
        renames: regular expressions and their replacements, applied in this order to a name without its prefix.
    """
    renames = list(renames)
    named: dict[str, Tensor] = {}
    projections: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if not name.startswith(prefix):
            continue
        short = name.removeprefix(prefix)
        for pattern, replacement in renames:
            short = re.sub(pattern, replacement, short)
        if found := PROJECTION.search(short):
            projections.setdefault(PROJECTION.sub(rf".attn.qkv.{found[2]}", short), {})[found[1]] = tensor
        else:
            named[short] = tensor
    for name, parts in projections.items():
        zeros = torch.zeros_like(next(iter(parts.values())))  # a bias that a network does without
        named[name] = torch.cat([parts.get(letter, zeros) for letter in "qkv"])
    return named
