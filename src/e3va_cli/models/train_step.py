"""The parts of a training step that a run under Lightning and an estimate of its memory share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from e3va_cli.data.collate import Batch
from e3va_cli.models.model import DenseModel


def compute_losses(model: DenseModel, batch: Batch) -> dict[str, Tensor]:
    """Return the losses of a batch by name, scalars, and their sum as `loss`, which the step minimizes.

    Heads that compute their losses in chunks run the backward pass of each chunk here (`heads.eager_backward`), so the
    sum must not be weighted.
    """
    losses = model.losses(batch.images, batch.image_sizes, batch.targets)
    return {"loss": torch.stack(list(losses.values())).sum(), **losses}


def gradient_norm(optimizer: Optimizer) -> Tensor:
    """Return the 2-norm of all gradients, a scalar."""
    return get_total_norm(p.grad for p in _parameters(optimizer) if p.grad is not None)


def clip_gradients(optimizer: Optimizer, max_norm: float | None, norm: Tensor) -> None:
    """Scale the gradients so that their 2-norm, now `norm`, is at most `max_norm`; None for no limit."""
    if max_norm is not None:
        clip_grads_with_norm_(_parameters(optimizer), max_norm, norm)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
