"""AdamW (arXiv 1711.05101) over what is trainable; norms, biases and position biases are not decayed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from e3va_cli.backbones import ResidualBackbone

FUSED_ON = frozenset({"cuda"})  # kinds of devices


def build_optimizer(model: nn.Module, *, lr: float, weight_decay: float, betas: Sequence[float]) -> AdamW:
    """AdamW in two groups: matrices and kernels with weight decay; vectors, and what a backbone exempts, without.

    On a GPU it is fused: one kernel for all parameters, no temporary copies, and steps that can be left out on the
    device (`StepGuard`).
    """
    exempt = {
        id(module.get_parameter(name))
        for module in model.modules()
        if isinstance(module, ResidualBackbone)
        for name in module.no_weight_decay()
    }
    trainable = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.ndim > 1 and id(p) not in exempt]
    plain = [p for p in trainable if p.ndim <= 1 or id(p) in exempt]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    fused = bool(trainable) and all(p.device.type in FUSED_ON for p in trainable)
    return AdamW(groups, lr=lr, betas=(betas[0], betas[1]), fused=fused or None)


def fit_to_device(optimizer_state: dict[str, Any], device: torch.device) -> None:
    """Make the saved state of an optimizer, from whatever device, that of one built for `device`."""
    for group in optimizer_state["param_groups"]:
        group["fused"] = device.type in FUSED_ON or None
