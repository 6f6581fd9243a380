"""E3VA: parallel low-rank adapters on the highway (`highway.py`), as published in arXiv 2306.09729."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from e3va_cli.components.options import option
from e3va_cli.models.adapters.activation_storage import ActivationStorage
from e3va_cli.models.adapters.base import METHODS
from e3va_cli.models.adapters.dual_low_rank import DualLowRankAdapter
from e3va_cli.models.adapters.highway import HighwayExtractor, HighwayOptions


@dataclass
class E3VAOptions(HighwayOptions):
    """Options of E3VA."""

    rank: int = option(help="parameters grow with it; memory hardly does", gt=0)
    hidden_ratio: float = option(help="bottleneck width over the stage's width", gt=0)
    init: str = option(
        "zero",
        help="zero: last factor zero, so that training starts at the pre-trained features; kaiming: all factors random",
        choices=("zero", "kaiming"),
        free=True,
    )


@METHODS.register("e3va", E3VAOptions)
class E3VA(HighwayExtractor):
    """The highway with E3VA's adapters, `DualLowRankAdapter`.

    Args:
        backbone: any residual backbone; it is frozen and put into eval mode.
        options: see `E3VAOptions`; the paper has rank 16 and hidden ratio 1/2, and leaves initialization open.
    """

    def build_adapter(self, width: int, options: E3VAOptions, storage: ActivationStorage) -> nn.Module:
        """Return an adapter for a stream of `width` channels."""
        hidden = max(1, round(width * options.hidden_ratio))
        adapter = DualLowRankAdapter(width, hidden=hidden, rank=options.rank, storage=storage)
        if options.init == "kaiming":
            adapter.init_kaiming_uniform()
        return adapter
