"""Compare benchmark results with the paper's claims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from e3va_cli.memory.result import DIGITS, Result, relative_saving
from e3va_cli.paper.published import (
    CARD_MIB,
    COCO,
    MEMORY_SAVED_PCT,
    SETTINGS,
    TIME_SAVED_PCT,
    TRAINABLE_PCT,
    VOC,
)

Verdict = Literal["holds", "does not hold", "not measured"]


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, and the value of our runs.

    Attributes:
        claim: text with the unit.
        published: the paper's value.
        value: ours, None if no run has it.
        at_least: whether the published value is a lower bound, else an upper bound.
        source: of our value, `measured`, `planned` or `measured and planned`; None if no run has it.
    """

    claim: str
    published: float
    value: float | None
    at_least: bool
    source: str | None

    @property
    def verdict(self) -> Verdict:
        """Return whether our value is within the published bound."""
        if self.value is None:
            return "not measured"
        holds = self.value >= self.published if self.at_least else self.value <= self.published
        return "holds" if holds else "does not hold"

    def entry(self) -> dict[str, Any]:
        """Return the claim as one of `claims` in `benchmark.json`."""
        return {
            "claim": self.claim,
            "published": self.published,
            "found": None if self.value is None else round(self.value, DIGITS),
            "verdict": self.verdict,
            "source": self.source,
        }


@dataclass(frozen=True)
class BenchmarkRun:
    """Results of all methods on one backbone, head and image size; all measured or all estimated.

    Attributes:
        backbone, head: names.
        image_size: height and width, in pixels.
        results: one per method.
    """

    backbone: str
    head: str
    image_size: tuple[int, int]
    results: list[Result]

    def e3va_value(self, attribute: str) -> float | None:
        """Return `peak_mib` or `trainable_pct` of E3VA, None if it is not among the results."""
        return next((getattr(r, attribute) for r in self.results if r.method == "e3va"), None)


def collect_values(
    runs: Sequence[BenchmarkRun], value_of: Callable[[BenchmarkRun], float | None]
) -> list[tuple[float, str]]:
    """Return the value and its source (measured or planned) of each run that has the value."""
    values = [(value_of(run), run.results[0].source) for run in runs if run.results]
    return [(value, source) for value, source in values if value is not None]


def mean_claim(title: str, published: float, values: Sequence[tuple[float, str]], *, at_least: bool) -> Claim:
    """Return a claim with the mean of the values."""
    mean = fmean(value for value, _ in values) if values else None
    source = " and ".join(sorted({source for _, source in values})) or None
    return Claim(title, published, mean, at_least, source)


def compare_with_paper(runs: list[BenchmarkRun], *, reserve_mib: float) -> list[Claim]:
    """Compare each claim of the paper with the runs.

    Memory is compared if backbone and image size are those of a published setting, time and parameters if the
    backbone is.

    Args:
        reserve_mib: memory of a GPU that tensors cannot use.
    """
    claims, saved = [], []
    for setting in SETTINGS:
        matching = [r for r in runs if r.backbone == setting.backbone and r.image_size == setting.image_size]
        values = collect_values(matching, lambda run: relative_saving(run.results, "e3va", "peak_mib"))[:1]
        saved.append(values)
        published = setting.saved_pct("e3va")
        assert published is not None
        title = f"memory saved, {setting.title}{head_note(matching, setting.head)} (%)"
        claims.append(mean_claim(title, round(published, 1), values, at_least=True))
    both = [value for values in saved for value in values] if all(saved) else []
    claims.append(mean_claim("memory saved, average of both settings (%)", MEMORY_SAVED_PCT, both, at_least=True))
    published_runs = [run for run in runs if run.backbone in (COCO.backbone, VOC.backbone)]
    times = collect_values(published_runs, lambda run: relative_saving(run.results, "e3va", "step_time_s"))
    claims.append(mean_claim("training time saved (%)", TIME_SAVED_PCT, times, at_least=True))
    percentages = sorted(collect_values(published_runs, lambda run: run.e3va_value("trainable_pct")))
    claims.append(mean_claim("trainable backbone parameters (%)", TRAINABLE_PCT, percentages[-1:], at_least=False))
    on_card = [
        r for r in runs if r.backbone == VOC.backbone and "mask_rcnn" in r.head and r.image_size == COCO.image_size
    ]
    peaks = collect_values(on_card, lambda run: run.e3va_value("peak_mib"))
    needed = [(peak + reserve_mib, source) for peak, source in peaks]
    title = f"Swin-L Cascade Mask R-CNN{head_note(on_card, COCO.head)} on an 11 GB card (MiB)"
    claims.append(mean_claim(title, float(CARD_MIB), needed[:1], at_least=False))
    return claims


def head_note(runs: list[BenchmarkRun], head: str) -> str:
    """Return a note on heads that differ from the paper's."""
    other_heads = sorted({run.head for run in runs} - {head})
    return f" (here {', '.join(other_heads)})" if other_heads else ""
