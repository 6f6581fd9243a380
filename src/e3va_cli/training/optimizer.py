"""AdamW (arXiv 1711.05101) over what is trainable; what is not decayed.

Norms and relative position biases never are. Of biases two rules are in use: timm and Swin's classification code leave
them alone, and so does this by default; mmdetection's Swin configurations (`custom_keys` for `norm` and
`relative_position_bias_table`), which the paper's group trains with, decay them: `decay_biases`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import AdamW

from e3va_cli.backbones import ResidualBackbone

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.BatchNorm2d, nn.SyncBatchNorm)


def build_optimizer(
    model: nn.Module, *, lr: float, weight_decay: float, betas: Sequence[float], decay_biases: bool = False
) -> AdamW:
    """AdamW in two groups, with weight decay and without.

    Never decayed are norms and what a backbone exempts; all other vectors only if `decay_biases`.
    """
    exempt = {
        id(module.get_parameter(name))
        for module in model.modules()
        if isinstance(module, ResidualBackbone)
        for name in module.no_weight_decay()
    }
    exempt |= {id(p) for module in model.modules() if isinstance(module, NORMS) for p in module.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trainable if (p.ndim > 1 or decay_biases) and id(p) not in exempt]
    kept = {id(p) for p in decayed}
    plain = [p for p in trainable if id(p) not in kept]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return AdamW(groups, lr=lr, betas=(betas[0], betas[1]))
