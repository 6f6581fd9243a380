"""Results of a benchmark, one per tuning method, and `benchmark.json`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from e3va_cli.memory.estimate import MemoryEstimate
from e3va_cli.memory.measure import Measurement
from e3va_cli.utils.environment import MIB

DIGITS = 4  # after the point, in benchmark.json


@dataclass(frozen=True)
class Result:
    """Memory, time and parameters of one method.

    Attributes:
        source: planned (estimated) or measured; a value of `benchmark.json`.
        trainable_params, trainable_pct: of the backbone, adapters and output norms included.
        peak_mib: memory of all tensors; None if measuring failed.
        step_time_s: median; None if estimated.
        by_category_mib: breakdown of the peak.
        details: further values, for `details.json`.
    """

    method: str
    source: Literal["planned", "measured"]
    trainable_params: int
    trainable_pct: float
    peak_mib: float | None
    step_time_s: float | None
    by_category_mib: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)


def estimated_result(method: str, estimate: MemoryEstimate) -> Result:
    """Return the result of an estimate."""
    return Result(
        method=method,
        source="planned",
        trainable_params=int(estimate.parameters["trainable_backbone_params"]),
        trainable_pct=float(estimate.parameters["trainable_backbone_pct"]),
        peak_mib=estimate.peak.total_bytes / MIB,
        step_time_s=None,
        by_category_mib={category: nbytes / MIB for category, nbytes in estimate.peak.by_category.items()},
        details={
            "peak_at": estimate.peak.location,
            "peak_operator": estimate.peak.operator,
            "resting_memory_mib": estimate.between_steps_bytes / MIB,
            "regions": estimate.rois,
            "parameters": estimate.parameters,
            "operations_tflop": estimate.flops / 1e12,
            "offloaded_mib": estimate.offloaded_bytes / MIB,
            "streamed_mib": estimate.streamed_bytes / MIB,
            "planning_time_s": estimate.seconds,
        },
    )


def measured_result(method: str, measurement: Measurement, estimate: MemoryEstimate) -> Result:
    """Return the result of a measurement, with the estimate of the same step in its details."""
    estimated = estimated_result(method, estimate)
    return Result(
        method=method,
        source="measured",
        trainable_params=estimated.trainable_params,
        trainable_pct=estimated.trainable_pct,
        peak_mib=measurement.peak_mib,
        step_time_s=measurement.step_time_s,
        by_category_mib=measurement.by_category_mib or estimated.by_category_mib,
        details={
            "device": measurement.device_name,
            "error": measurement.error or None,
            "warnings": measurement.warnings,
            "peak_at": measurement.peak_at or estimated.details["peak_at"],
            "peak_reserved_memory_mib": measurement.peak_reserved_mib,
            "planned_peak_memory_mib": estimated.peak_mib,
            "step_times_s": measurement.step_times_s,
            "step_time_interquartile_range_s": measurement.interquartile_range_s,
            "regions": measurement.rois,
            "planned_regions": estimate.rois,
            "parameters": estimate.parameters,
            **{key: estimated.details[key] for key in ("operations_tflop", "offloaded_mib", "streamed_mib")},
        },
    )


def saved_pct(value: float | None, full: float | None) -> float | None:
    """Return the saving against full fine-tuning in percent, None if either value is unknown."""
    return None if value is None or full is None else 100 * (1 - value / full)


def relative_saving(results: list[Result], method: str, attribute: str) -> float | None:
    """Return what `method` saves of `attribute` (`peak_mib` or `step_time_s`) against full fine-tuning, in percent."""
    by_name = {result.method: getattr(result, attribute) for result in results}
    return saved_pct(by_name.get(method), by_name.get("full"))


def benchmark_json(settings: dict[str, Any], results: list[Result], claims: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the content of `benchmark.json`; what was not measured is None."""

    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, DIGITS)

    methods = [
        {
            "method": result.method,
            "source": result.source,
            "trainable_params": result.trainable_params,
            "trainable_pct": rounded(result.trainable_pct),
            "peak_memory_mib": rounded(result.peak_mib),
            "memory_saved_pct": rounded(relative_saving(results, result.method, "peak_mib")),
            "step_time_s": rounded(result.step_time_s),
            "time_saved_pct": rounded(relative_saving(results, result.method, "step_time_s")),
            "memory_by_kind_mib": {category: rounded(value) for category, value in result.by_category_mib.items()},
        }
        for result in results
    ]
    return {"settings": settings, "methods": methods, "claims": claims}
