"""Count the floating-point operations of a step with PyTorch's formulas.

PyTorch's `FlopCounterMode` also counts by module, with hooks that do not allow a backward pass inside the forward
pass, which detectors run here (`heads/eager_backward.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.flop_counter import flop_registry

from e3va_cli.memory.torch_private import TorchDispatchMode, overload_packet


class FlopCounter(TorchDispatchMode):
    """Count matrix products, convolutions and fused attention, forward and backward.

    Attributes:
        total: floating-point operations so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func` and add its operations."""
        result = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(overload_packet(func)):
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result
