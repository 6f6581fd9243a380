"""Which part of the network keeps an activation: backbone, adapters, neck or head."""

from __future__ import annotations

from torch import nn

from e3va_cli.models import adapters
from e3va_cli.models.model import DenseModel


def kinds_of(model: nn.Module) -> dict[nn.Module, str]:
    """The part that each module of a `DenseModel` belongs to.

    What a tuning method adds counts as adapters, wherever it sits: output norms, the highway, and modules of its own
    inside the backbone; the backbone's own modules inside those stay the backbone's.
    """
    assert isinstance(model, DenseModel)
    kinds: dict[nn.Module, str] = {}

    def visit(module: nn.Module, kind: str) -> None:
        if type(module).__module__.startswith(adapters.__name__):
            kind = "adapters"
        elif module is model.extractor.backbone:
            kind = "backbone"
        elif module in (model.rescale, getattr(model.head, "neck", None)):
            kind = "neck"
        elif module is model.head:
            kind = "head"
        kinds[module] = kind
        for child in module.children():
            visit(child, kind)

    visit(model, "transient")
    return kinds
