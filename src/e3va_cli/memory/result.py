"""What is known of one method after planning or measuring it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from e3va_cli.memory.estimate import Plan
from e3va_cli.memory.measure import Measurement
from e3va_cli.utils.environment import MIB


@dataclass(frozen=True)
class Result:
    """One method.

    Attributes:
        trainable_params, trainable_pct: of the backbone, adapters and output norms included.
        peak_mib: of memory held by tensors; None if it could not be measured.
        step_time_s: median; None if planned.
        by_kind_mib: what held the memory at the peak.
        details: everything else worth keeping, for `details.json`.
    """

    method: str
    source: Literal["planned", "measured"]
    trainable_params: int
    trainable_pct: float
    peak_mib: float | None
    step_time_s: float | None
    by_kind_mib: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)


def planned(method: str, plan: Plan) -> Result:
    """The result of a plan."""
    return Result(
        method=method,
        source="planned",
        trainable_params=int(plan.parameters["trainable_backbone_params"]),
        trainable_pct=float(plan.parameters["trainable_backbone_pct"]),
        peak_mib=plan.peak.total_bytes / MIB,
        step_time_s=None,
        by_kind_mib={kind: nbytes / MIB for kind, nbytes in plan.peak.by_kind.items()},
        details={
            "peak_at": plan.peak.place,
            "peak_operator": plan.peak.operator,
            "resting_memory_mib": plan.resting_bytes / MIB,
            "regions": plan.regions,
            "parameters": plan.parameters,
            "operations_tflop": plan.operations / 1e12,
            "planning_time_s": plan.seconds,
        },
    )


def measured(method: str, measurement: Measurement, plan: Plan) -> Result:
    """The result of a measurement, with the plan of the same step beside it."""
    of_plan = planned(method, plan)
    return Result(
        method=method,
        source="measured",
        trainable_params=of_plan.trainable_params,
        trainable_pct=of_plan.trainable_pct,
        peak_mib=measurement.peak_mib,
        step_time_s=measurement.step_time_s,
        by_kind_mib=measurement.by_kind_mib or of_plan.by_kind_mib,
        details={
            "device": measurement.device_name,
            "error": measurement.error or None,
            "warnings": measurement.warnings,
            "peak_at": measurement.peak_at or of_plan.details["peak_at"],
            "peak_reserved_memory_mib": measurement.peak_reserved_mib,
            "planned_peak_memory_mib": of_plan.peak_mib,
            "step_times_s": measurement.step_times_s,
            "step_time_interquartile_range_s": measurement.spread_s,
            "regions": measurement.regions,
            "planned_regions": plan.regions,
            "parameters": plan.parameters,
            "operations_tflop": of_plan.details["operations_tflop"],
        },
    )


def saved_pct(ours: float | None, full: float | None) -> float | None:
    """How much less than full fine-tuning, in percent."""
    return None if ours is None or full is None else 100 * (1 - ours / full)


def relative_saving(results: list[Result], method: str, attribute: str) -> float | None:
    """How much less `method` takes of `attribute` (`peak_mib` or `step_time_s`) than full fine-tuning, in percent."""
    by_name = {result.method: getattr(result, attribute) for result in results}
    return saved_pct(by_name.get(method), by_name.get("full"))
