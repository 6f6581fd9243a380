"""`benchmark.json`: the results, with the claims that they were compared with, in the shape that others can rely on."""

from __future__ import annotations

from typing import Any

from e3va_cli.memory.result import Result, relative_saving

DIGITS = 4


def rounded(value: float | None) -> float | None:
    """As many digits as mean something."""
    return None if value is None else round(value, DIGITS)


def method_entry(result: Result, results: list[Result]) -> dict[str, Any]:
    """One of `methods`; None where a thing was not measured."""
    return {
        "method": result.method,
        "source": result.source,
        "trainable_params": result.trainable_params,
        "trainable_pct": rounded(result.trainable_pct),
        "peak_memory_mib": rounded(result.peak_mib),
        "memory_saved_pct": rounded(relative_saving(results, result.method, "peak_mib")),
        "step_time_s": rounded(result.step_time_s),
        "time_saved_pct": rounded(relative_saving(results, result.method, "step_time_s")),
        "memory_by_kind_mib": {kind: rounded(value) for kind, value in result.by_kind_mib.items()},
    }


def benchmark_json(settings: dict[str, Any], results: list[Result], claims: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole file."""
    return {
        "settings": settings,
        "methods": [method_entry(result, results) for result in results],
        "claims": claims,
    }
