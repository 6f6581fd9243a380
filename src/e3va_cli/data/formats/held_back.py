"""Validation images held back from the training images, for data without a validation split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from e3va_cli.components.options import Options, option
from e3va_cli.data.formats.base import Split
from e3va_cli.errors import UserError

SEED = 0
Item = TypeVar("Item")


@dataclass(kw_only=True)
class HeldBackOptions(Options):
    """The option of data sets that can be split at random."""

    val_fraction: float | None = option(
        None,
        help="evaluate on this fraction of the training images, held back at random; null: on the validation split",
        gt=0,
        lt=1,
        legacy_value=None,
    )

    def source_of(self, split: Split) -> Split:
        """Return the split whose files contain the images of `split`."""
        return split if self.val_fraction is None else "train"

    def select(self, split: Split, items: Sequence[Item]) -> list[Item]:
        """Return those of the items of `source_of(split)` that belong to `split`, in their order.

        The choice depends on their number only.

        Raises:
            UserError: there are too few to split.
        """
        if self.val_fraction is None:
            return list(items)
        count = round(self.val_fraction * len(items))
        if not 0 < count < len(items):
            raise UserError(
                f"dataset.val_fraction={self.val_fraction}: {len(items)} images cannot be split; "
                "set another fraction, or null to use the validation split"
            )
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(SEED)).tolist()
        held_back = set(order[:count])
        return [item for index, item in enumerate(items) if (index in held_back) == (split == "val")]
