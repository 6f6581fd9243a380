"""AdamW (arXiv 1711.05101) over what is trainable; norms, biases and position biases are not decayed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import AdamW

from e3va_cli.backbones import ResidualBackbone


def build_optimizer(model: nn.Module, *, lr: float, weight_decay: float, betas: Sequence[float]) -> AdamW:
    """AdamW in two groups: matrices and kernels with weight decay; vectors, and what a backbone exempts, without."""
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
    return AdamW(groups, lr=lr, betas=(betas[0], betas[1]))
