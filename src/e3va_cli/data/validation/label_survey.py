"""What semantic masks hold, counted: whether anything can be learned from them, and what a user may not expect."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from e3va_cli.data.formats.label_encoding import LabelEncoding
from e3va_cli.data.formats.semantic_masks import two_classes, validate_semantic_mask
from e3va_cli.data.images.reading import decode_image
from e3va_cli.errors import UserError

SAMPLE = 16  # masks that are looked at before a run
MUCH = 0.3  # part of the pixels that are 0, from which on it may well be a background
KEPT = 256  # values or colors that are remembered


class LabelSurvey:
    """Counts of the pixels of masks.

    Attributes:
        pixels: int64 [K + 1] of each label, from 0 for not labelled.
        keys: the values or colors that were seen, as many as are needed to tell of them.
        zeros: pixels of the value 0.
        masks: how many were counted.
    """

    def __init__(self, encoding: LabelEncoding) -> None:
        self.encoding = encoding
        self.pixels = np.zeros(encoding.num_classes + 1, dtype=np.int64)
        self.keys: set[int] = set()
        self.zeros = self.masks = 0

    def add(self, pixels: np.ndarray, keys: Iterable[int], zeros: int) -> None:
        """Count one more mask: pixels by label, the values or colors in it, and pixels of the value 0."""
        self.pixels += pixels
        self.zeros += zeros
        self.masks += 1
        self.keys.update(islice(keys, max(0, KEPT - len(self.keys))))

    @property
    def present(self) -> list[int]:
        """The labels that occur."""
        return [int(label) for label in np.flatnonzero(self.pixels[1:]) + 1]

    def nothing_to_learn(self, classes: Sequence[str], *, train: bool) -> str | None:
        """Why nothing can be learned from the masks, or measured on them; None where something can."""
        present = self.present
        if not self.masks or len(present) > (1 if train else 0):
            return None
        if present:
            [label] = present
            held = f"every labeled pixel of the {self.masks:,} masks is of one class, {classes[label - 1]}"
        else:
            held = f"no pixel of the {self.masks:,} masks is labeled"
        held += f" (they hold {self.encoding.show_some(self.keys)})"
        [*others] = sorted(self.keys - {0})
        remedy = "give dataset.label_map, the value or color of each class"
        if not self.encoding.mapped and not self.encoding.in_colors and len(others) == 1:
            remedy = f"where 0 is the background and {others[0]} the object: {two_classes(others[0])}"
        return f"{held}, so there is nothing to {'learn' if train else 'measure'}; {remedy}"

    @property
    def maybe_background(self) -> str | None:
        """What to say where many pixels are 0, which is not labelled."""
        share = self.zeros / max(1, int(self.pixels.sum()))
        if not self.encoding.from_one or share < MUCH:
            return None
        classes = self.encoding.num_classes + 1
        return (
            f"{100 * share:.0f} % of the pixels are 0, not labeled: neither trained nor evaluated, and predictions "
            f"have some class there; where 0 is the background: dataset.reduce_zero_label=false "
            f"dataset.num_classes={classes}"
        )


def survey_masks(labels: Path, names: Sequence[str], encoding: LabelEncoding, *, needed: int) -> LabelSurvey:
    """Look at some masks, evenly spread, and at more of them until `needed` classes were seen.

    Masks that cannot be used are passed over: what reads them later says why.
    """
    found = LabelSurvey(encoding)
    chosen = dict.fromkeys(np.linspace(0, len(names) - 1, min(SAMPLE, len(names))).round().astype(int).tolist())
    for count, index in enumerate([*chosen, *(i for i in range(len(names)) if i not in chosen)]):
        if count >= SAMPLE and len(found.present) >= needed:
            break
        try:
            mask = decode_image(labels / names[index])
        except UserError:
            continue
        if next(validate_semantic_mask(mask, mask.size, encoding), None) is None:
            found.add(*count_labels(encoding.keys_of(mask), encoding))
    return found


def count_labels(keys: np.ndarray, encoding: LabelEncoding) -> tuple[np.ndarray, list[int], int]:
    """Of a mask's values or colors [H, W]: the pixels of each label, those that occur, and the pixels of value 0."""
    labels = encoding.encode(keys)
    pixels = np.bincount(labels[labels >= 0], minlength=encoding.num_classes + 1)
    values, times = np.unique(keys, return_counts=True)
    zeros = int(times[0]) if values[0] == 0 and not encoding.in_colors else 0
    return pixels, values.tolist(), zeros
