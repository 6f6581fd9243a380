"""AdamW (arXiv 1711.05101) over the trainable parameters, and which of them have no weight decay.

Norms and relative position biases never have. For biases there are two rules: timm and Swin's classification code do
not decay them, which is the default here; mmdetection's Swin configurations (`custom_keys` for `norm` and
`relative_position_bias_table`), which the paper's authors train with, do: `decay_biases`.
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

FUSED_ON = frozenset({"cuda"})  # device types
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.BatchNorm2d, nn.SyncBatchNorm)


@dataclass
class OptimizerOptions(Options):
    """Options of AdamW."""

    lr: float = option(help="highest learning rate, at the total batch size schedule.total_batch", gt=0)
    weight_decay: float = option(help="of all but norms, relative position biases and, by default, biases", ge=0)
    betas: list[float] = option(help="decay rates of the moving averages of the gradient and its square")
    decay_biases: bool = option(
        False, help="true: biases and other vectors have weight decay too, as in mmdetection", legacy_value=False
    )
    adapter_lr_scale: float = option(
        1.0, help="learning rate of adapters, or a tuned backbone, over that of neck and head", gt=0, legacy_value=1.0
    )

    def errors(self, at: str) -> Iterator[str]:
        """Yield an error for invalid betas."""
        betas = self.betas
        if betas is not None and (len(betas) != 2 or not all(0 <= beta < 1 for beta in betas)):
            yield f"{at}.betas={betas}: two numbers from 0 to below 1"


def build_optimizer(model: nn.Module, options: OptimizerOptions) -> AdamW:
    """Return AdamW with two parameter groups, with weight decay and without.

    Norms and the parameters that a backbone exempts have none; other vectors only if `decay_biases`. If
    `adapter_lr_scale` is not 1, the first two groups are of the feature extractor, and two more of neck and head. On a
    GPU it is fused: one kernel for all parameters, no temporary copies, and `NonFiniteGuard` can skip a step on the
    device.
    """
    exempt = {
        id(module.get_parameter(name))
        for module in model.modules()
        if isinstance(module, ResidualBackbone)
        for name in module.no_weight_decay()
    }
    exempt |= {id(p) for module in model.modules() if isinstance(module, NORMS) for p in module.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    decayed = {id(p) for p in trainable if (p.ndim > 1 or options.decay_biases) and id(p) not in exempt}
    parts = [(1.0, trainable)]
    if options.adapter_lr_scale != 1:
        tuned = {id(p) for p in model.get_submodule("extractor").parameters()}
        parts = [
            (options.adapter_lr_scale, [p for p in trainable if id(p) in tuned]),
            (1.0, [p for p in trainable if id(p) not in tuned]),
        ]
    groups = [
        {
            "params": [p for p in parameters if (id(p) in decayed) == has_decay],
            "lr": options.lr * scale,
            "weight_decay": options.weight_decay if has_decay else 0.0,
        }
        for scale, parameters in parts
        for has_decay in (True, False)
    ]
    fused = bool(trainable) and all(p.device.type in FUSED_ON for p in trainable)
    return AdamW(groups, lr=options.lr, betas=(options.betas[0], options.betas[1]), fused=fused or None)


def set_fused(optimizer_state: dict[str, Any], device: torch.device) -> None:
    """Set whether the optimizer of a saved state is fused, as one built for `device` is; in place."""
    for group in optimizer_state["param_groups"]:
        group["fused"] = device.type in FUSED_ON or None


def update_options(
    optimizer_state: dict[str, Any],
    scheduler_state: dict[str, Any],
    optimizer: Optimizer,
    factor: Callable[[int], float],
) -> None:
    """Replace the options in saved states, in place: loading a state replaces those of an optimizer and its schedule.

    Args:
        optimizer_state: of an optimizer with the same parameter groups.
        scheduler_state: of its `LambdaLR`.
        optimizer: the new one, with the options to use.
        factor: of the learning rate at each step.
    """
    bases = [group["lr"] for group in optimizer.param_groups]
    lrs = [base * factor(scheduler_state["last_epoch"]) for base in bases]
    for saved, group, base, lr in zip(optimizer_state["param_groups"], optimizer.param_groups, bases, lrs, strict=True):
        saved |= {"weight_decay": group["weight_decay"], "betas": group["betas"], "initial_lr": base, "lr": lr}
    scheduler_state |= {"base_lrs": bases, "_last_lr": lrs}
