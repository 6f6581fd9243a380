"""Memory budgets, and the largest batch within one."""

from __future__ import annotations

import re
from collections.abc import Callable

from e3va_cli.errors import UserError
from e3va_cli.utils.environment import MIB

UNITS = {"MiB": 2**20, "GiB": 2**30, "MB": 10**6, "GB": 10**9}
MAX_BATCH_SIZE = 128  # images; the search ends here


def parse_budget(text: str) -> float:
    """Return the MiB of a text such as `11GiB` or `8000 MB`.

    Raises:
        UserError: the text is not a number with one of `UNITS`.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    unit = next((u for u in UNITS if match and u.lower() == match[2].lower()), None)
    if match is None or unit is None or float(match[1]) <= 0:
        raise UserError(f"budget={text}: expected a number and a unit, such as 11GiB, 11000MiB, 11GB or 11000MB")
    return float(match[1]) * UNITS[unit] / MIB


def max_batch_size(peak_mib: Callable[[int], float], limit_mib: float) -> int:
    """Return the largest batch, 0 to `MAX_BATCH_SIZE`, whose step stays within `limit_mib`.

    Memory is almost linear in the batch size, so each guess is where the line through the two nearest known batch
    sizes crosses the limit: four or five estimates.
    """
    fits, too_many = 0, MAX_BATCH_SIZE + 1
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
        low, high = sorted(known)[-2:] if too_many > MAX_BATCH_SIZE else (fits, too_many)
        slope = (known[high] - known[low]) / (high - low)
        guess = low + int((limit_mib - known[low]) / slope) if slope > 0 else MAX_BATCH_SIZE
        check(min(max(guess, fits + 1), too_many - 1))
    return fits
