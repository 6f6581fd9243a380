"""Options that take one name or a list of them."""

from __future__ import annotations

from typing import Any


def listed(value: Any) -> list[str]:
    """The names that were given; one may be a number, as a folder may be called 7."""
    return [str(one) for one in (value if isinstance(value, list) else [value])]
