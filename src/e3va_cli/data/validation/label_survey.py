"""Statistics of semantic masks, and warnings about too few classes or a background of 0."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from e3va_cli.data.formats.label_encoding import LabelEncoding
from e3va_cli.data.formats.semantic_masks import two_classes, validate_semantic_mask
from e3va_cli.data.images.reading import decode_image
from e3va_cli.data.sampling import evenly_spaced
from e3va_cli.errors import UserError

SAMPLE = 16  # masks read before a run
BACKGROUND_SHARE = 0.3  # of pixels with value 0, above which it is probably a background
MAX_KEYS = 256


class LabelSurvey:
    """Pixel counts of masks.

    Attributes:
        pixels: int64 [K + 1] of each label; 0 is unlabeled.
        keys: values or colors, up to 256 of them.
        zeros: pixels with value 0.
        masks: number of masks.
    """

    def __init__(self, encoding: LabelEncoding) -> None:
        self.encoding = encoding
        self.pixels = np.zeros(encoding.num_classes + 1, dtype=np.int64)
        self.keys: set[int] = set()
        self.zeros = self.masks = 0

    def add(self, pixels: np.ndarray, keys: Iterable[int], zeros: int) -> None:
        """Add one mask: pixels by label, its values or colors, and the number of pixels with value 0."""
        self.pixels += pixels
        self.zeros += zeros
        self.masks += 1
        self.keys.update(islice(keys, max(0, MAX_KEYS - len(self.keys))))

    @property
    def present(self) -> list[int]:
        """Return the labels that occur."""
        return [int(label) for label in np.flatnonzero(self.pixels[1:]) + 1]

    def nothing_to_learn(self, classes: Sequence[str], *, train: bool) -> str | None:
        """Return why the masks cannot be trained or evaluated on, or None."""
        present = self.present
        if not self.masks or len(present) > (1 if train else 0):
            return None
        if present:
            [label] = present
            content = f"all labeled pixels of the {self.masks:,} masks are of one class, {classes[label - 1]}"
        else:
            content = f"no pixel of the {self.masks:,} masks is labeled"
        content += f" (values: {self.encoding.format_keys(self.keys)})"
        [*others] = sorted(self.keys - {0})
        remedy = "set dataset.label_map to the value or color of each class"
        if not self.encoding.mapped and not self.encoding.in_colors and len(others) == 1:
            remedy = f"if 0 is the background and {others[0]} the object, set {two_classes(others[0])}"
        return f"{content}, so there is nothing to {'learn' if train else 'measure'}; {remedy}"

    @property
    def background_warning(self) -> str | None:
        """Return a warning if many pixels are 0 and therefore unlabeled, else None."""
        share = self.zeros / max(1, int(self.pixels.sum()))
        if not self.encoding.from_one or share < BACKGROUND_SHARE:
            return None
        classes = self.encoding.num_classes + 1
        return (
            f"{100 * share:.0f} % of the pixels are 0 (unlabeled): ignored in training and evaluation, but predicted "
            f"as some class; if 0 is the background, set dataset.reduce_zero_label=false dataset.num_classes={classes}"
        )


def survey_masks(labels: Path, names: Sequence[str], encoding: LabelEncoding, *, needed: int) -> LabelSurvey:
    """Return statistics of evenly spaced masks, and of more until `needed` classes occur; invalid masks are skipped."""
    survey = LabelSurvey(encoding)
    chosen = dict.fromkeys(evenly_spaced(len(names), SAMPLE))
    for count, index in enumerate([*chosen, *(i for i in range(len(names)) if i not in chosen)]):
        if count >= SAMPLE and len(survey.present) >= needed:
            break
        try:
            mask = decode_image(labels / names[index])
        except UserError:
            continue
        if next(validate_semantic_mask(mask, mask.size, encoding), None) is None:
            survey.add(*count_labels(encoding.keys_of(mask), encoding))
    return survey


def count_labels(keys: np.ndarray, encoding: LabelEncoding) -> tuple[np.ndarray, list[int], int]:
    """Return pixels by label, the values or colors that occur, and pixels of value 0, of a mask's keys [H, W]."""
    labels = encoding.encode(keys)
    pixels = np.bincount(labels[labels >= 0], minlength=encoding.num_classes + 1)
    values, times = np.unique(keys, return_counts=True)
    zeros = int(times[0]) if values[0] == 0 and not encoding.in_colors else 0
    return pixels, values.tolist(), zeros
