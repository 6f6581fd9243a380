"""Which batch fits into a given memory."""

from __future__ import annotations

import re
from collections.abc import Callable

from e3va_cli.errors import UserError
from e3va_cli.utils.environment import MIB

UNITS = {"MiB": 2**20, "GiB": 2**30, "MB": 10**6, "GB": 10**9}
LARGEST_BATCH = 128  # images; nobody trains a detector with more on one device


def parse_budget(text: str) -> float:
    """The MiB that `text`, such as `11GiB` or `8000 MB`, stands for.

    Raises:
        UserError: not a number with one of these units.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    unit = next((u for u in UNITS if match and u.lower() == match[2].lower()), None)
    if match is None or unit is None or float(match[1]) <= 0:
        raise UserError(f"budget={text}: a number with its unit, such as 11GiB, 11000MiB, 11GB or 11000MB")
    return float(match[1]) * UNITS[unit] / MIB


def largest_batch(peak_mib: Callable[[int], float], limit_mib: float) -> int:
    """The most images whose step stays within `limit_mib`; 0 if not even one does, `LARGEST_BATCH` if so many do.

    A step's memory rises with the batch almost in proportion, so the search goes where the line through the two
    nearest known batches crosses the limit: four or five plans in all.
    """
    fits, too_many = 0, LARGEST_BATCH + 1
    known: dict[int, float] = {}

    def check(batch: int) -> None:
        nonlocal fits, too_many
        known[batch] = peak_mib(batch)
        if known[batch] <= limit_mib:
            fits = batch
        else:
            too_many = batch

    for batch in (1, 2):
        if batch < too_many:
            check(batch)
    while too_many - fits > 1:
        low, high = sorted(known)[-2:] if too_many > LARGEST_BATCH else (fits, too_many)
        slope = (known[high] - known[low]) / (high - low)
        guess = low + int((limit_mib - known[low]) / slope) if slope > 0 else LARGEST_BATCH
        check(min(max(guess, fits + 1), too_many - 1))
    return fits
