"""Assign each module to the group whose activations it keeps: backbone, adapters, neck or head; or to the weights."""

from __future__ import annotations

from torch import nn

from e3va_cli.models import adapters
from e3va_cli.models.backbones.offload import BlockStreamer
from e3va_cli.models.model import DenseModel


def module_groups(model: nn.Module) -> dict[nn.Module, str]:
    """Return the group of each module of a `DenseModel`.

    All modules that a tuning method adds count as adapters: output norms, the highway and modules inserted into the
    backbone. The backbone's own modules inside those remain the backbone's. A `BlockStreamer` allocates weights.
    """
    assert isinstance(model, DenseModel)
    groups: dict[nn.Module, str] = {}

    def visit(module: nn.Module, group: str) -> None:
        if type(module).__module__.startswith(adapters.__name__):
            group = "adapters"
        elif isinstance(module, BlockStreamer):
            group = "weights"
        elif module is model.extractor.backbone:
            group = "backbone"
        elif module in (model.rescale, getattr(model.head, "neck", None)):
            group = "neck"
        elif module is model.head:
            group = "head"
        groups[module] = group
        for child in module.children():
            visit(child, group)

    visit(model, "transient")
    return groups
