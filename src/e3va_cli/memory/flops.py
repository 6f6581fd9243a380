"""Count a step's floating-point operations, by PyTorch's own formulas.

PyTorch's `FlopCounterMode` counts by module as well, with hooks that do not allow a backward pass within the forward
pass, as detectors have it here (`heads/backward_at_once.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Operations(TorchDispatchMode):
    """Counts those of matrix products, convolutions and fused attention, forward and backward.

    Attributes:
        total: of floating-point operations so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func`, and count it if there is a formula for it."""
        result = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result
