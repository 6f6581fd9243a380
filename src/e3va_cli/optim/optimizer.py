"""AdamW (arXiv 1711.05101) over what is trainable; what is not decayed.

Norms and relative position biases never are. Of biases two rules are in use: timm and Swin's classification code leave
them alone, and so does this by default; mmdetection's Swin configurations (`custom_keys` for `norm` and
`relative_position_bias_table`), which the paper's group trains with, decay them: `decay_biases`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from e3va_cli.components.options import Options, option
from e3va_cli.models.backbones import ResidualBackbone

FUSED_ON = frozenset({"cuda"})  # kinds of devices
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.BatchNorm2d, nn.SyncBatchNorm)


@dataclass
class OptimizerOptions(Options):
    """Options of AdamW."""

    lr: float = option(help="the highest learning rate, at the schedule's total_batch", above=0)
    weight_decay: float = option(help="norms and relative position biases have none", least=0)
    betas: list[float] = option(help="of the two moments")
    decay_biases: bool = option(
        False, help="true: biases and other vectors are decayed too, as mmdetection does", before=False
    )

    def errors(self, at: str) -> Iterator[str]:
        """Yield what is wrong with the moments."""
        betas = self.betas
        if betas is not None and (len(betas) != 2 or not all(0 <= beta < 1 for beta in betas)):
            yield f"{at}.betas={betas}: two numbers from 0 to below 1"


def build_optimizer(model: nn.Module, options: OptimizerOptions) -> AdamW:
    """AdamW in two groups, with weight decay and without.

    Never decayed are norms and what a backbone exempts; all other vectors only if `decay_biases`. On a GPU it is fused:
    one kernel for all parameters, no temporary copies, and steps that can be left out on the device (`NonFiniteGuard`).
    """
    exempt = {
        id(module.get_parameter(name))
        for module in model.modules()
        if isinstance(module, ResidualBackbone)
        for name in module.no_weight_decay()
    }
    exempt |= {id(p) for module in model.modules() if isinstance(module, NORMS) for p in module.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trainable if (p.ndim > 1 or options.decay_biases) and id(p) not in exempt]
    kept = {id(p) for p in decayed}
    plain = [p for p in trainable if id(p) not in kept]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    fused = bool(trainable) and all(p.device.type in FUSED_ON for p in trainable)
    return AdamW(groups, lr=options.lr, betas=(options.betas[0], options.betas[1]), fused=fused or None)


def set_fused(optimizer_state: dict[str, Any], device: torch.device) -> None:
    """Make the saved state of an optimizer, from whatever device, that of one built for `device`."""
    for group in optimizer_state["param_groups"]:
        group["fused"] = device.type in FUSED_ON or None


def update_options(
    optimizer_state: dict[str, Any], scheduler_state: dict[str, Any], fresh: Optimizer, factor: Callable[[int], float]
) -> None:
    """Put the options of a new optimizer and schedule into saved states, which PyTorch would put in their place.

    Args:
        optimizer_state: of an optimizer with the same groups.
        scheduler_state: of its `LambdaLR`.
        fresh: the new optimizer.
        factor: the learning rate's, at each step.
    """
    bases = [group["lr"] for group in fresh.param_groups]
    lrs = [base * factor(scheduler_state["last_epoch"]) for base in bases]
    for saved, group, base, lr in zip(optimizer_state["param_groups"], fresh.param_groups, bases, lrs, strict=True):
        saved |= {"weight_decay": group["weight_decay"], "betas": group["betas"], "initial_lr": base, "lr": lr}
    scheduler_state |= {"base_lrs": bases, "_last_lr": lrs}
