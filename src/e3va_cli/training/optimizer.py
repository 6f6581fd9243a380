"""AdamW (arXiv 1711.05101) over what is trainable; norms, biases and other vectors are not decayed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import AdamW


def build_optimizer(model: nn.Module, *, lr: float, weight_decay: float, betas: Sequence[float]) -> AdamW:
    """AdamW in two groups: matrices and kernels with weight decay, everything of one dimension without."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=lr, betas=(betas[0], betas[1]))
