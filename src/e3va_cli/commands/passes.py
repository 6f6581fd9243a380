"""What commands print of several adapters: which of them share a pass of the backbone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from e3va_cli.commands.console import console
from e3va_cli.inference.shared_passes import Adapter


def print_passes(passes: Iterable[Sequence[Adapter]]) -> None:
    """A line for each pass of the backbone that an image takes."""
    for adapters in passes:
        names, resize = ", ".join(adapter.name for adapter in adapters), adapters[0].resize
        sharing = "in one pass of the backbone" if len(adapters) > 1 else "a pass of its own"
        sides = f"images of short side {resize.size} and long side up to {resize.max_size}"
        console.print(f"{names}: {adapters[0].alone or f'{sharing}, for {sides}'}", markup=False)
