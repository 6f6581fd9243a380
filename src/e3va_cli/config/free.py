"""Options of a method or head that the same trained weights may be used with at any value."""

from __future__ import annotations

from dataclasses import field, fields, is_dataclass
from typing import Any

from omegaconf import MISSING

FREE = "free"  # the key of a field's metadata


def free(default: Any = MISSING) -> Any:
    """Declare an option of how memory is used or what is predicted, which trained weights do not depend on."""
    return field(default=default, metadata={FREE: True})


def binding_options(schema: type, options: dict[str, Any]) -> dict[str, Any]:
    """Return those of the options, nested ones too, that trained weights depend on.

    Args:
        schema: the dataclass that declares them; what it does not declare counts as binding.
        options: plain.
    """
    declared = {one.name: one for one in fields(schema)}
    binding: dict[str, Any] = {}
    for name, value in options.items():
        option = declared.get(name)
        if option is not None and option.metadata.get(FREE):
            continue
        part = option.default_factory if option is not None else None
        nested = isinstance(value, dict) and isinstance(part, type) and is_dataclass(part)
        binding[name] = binding_options(part, value) if nested else value  # type: ignore[arg-type]
    return binding
