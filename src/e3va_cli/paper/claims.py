"""The paper's claims against what was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from e3va_cli.memory.benchmark_json import DIGITS
from e3va_cli.memory.result import Result, relative_saving
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
    """One claim.

    Attributes:
        claim: in words, with its unit.
        published: the paper's number.
        found: ours, None if this run cannot tell.
        at_least: whether ours must be at least the paper's number, rather than at most.
        source: how ours came about, `measured`, `planned` or `measured and planned`; None if this run cannot tell.
    """

    claim: str
    published: float
    found: float | None
    at_least: bool
    source: str | None

    @property
    def verdict(self) -> Verdict:
        """Whether it holds."""
        if self.found is None:
            return "not measured"
        holds = self.found >= self.published if self.at_least else self.found <= self.published
        return "holds" if holds else "does not hold"

    def entry(self) -> dict[str, Any]:
        """Return the claim as one of `claims` in `benchmark.json`."""
        found = None if self.found is None else round(self.found, DIGITS)
        values = {"claim": self.claim, "published": self.published, "found": found}
        return values | {"verdict": self.verdict, "source": self.source}


@dataclass(frozen=True)
class Run:
    """Results of one setting.

    Attributes:
        backbone, head: by name.
        image_size: height and width, in pixels.
        results: of each method.
    """

    backbone: str
    head: str
    image_size: tuple[int, int]
    results: list[Result]

    def of_ours(self, attribute: str) -> float | None:
        """`peak_mib` or `trainable_pct` of E3VA, if it is known."""
        return next((getattr(r, attribute) for r in self.results if r.method == "e3va"), None)


Told = tuple[float, str]
"""A number that a run tells, and whether it was measured or planned."""


def tell(runs: Iterable[Run], number: Callable[[Run], float | None]) -> list[Told]:
    """A number of each run that can tell it; the results of a run are all measured or all planned."""
    found = [(number(run), run.results[0].source) for run in runs if run.results]
    return [(value, source) for value, source in found if value is not None]


def claim(title: str, published: float, told: Sequence[Told], *, at_least: bool) -> Claim:
    """A claim against the mean of what is told."""
    found = fmean(value for value, _ in told) if told else None
    source = " and ".join(sorted({source for _, source in told})) or None
    return Claim(title, published, found, at_least, source)


def compare_with_paper(runs: list[Run], *, reserve_mib: float) -> list[Claim]:
    """Each claim of the paper, from all runs that can tell.

    A run tells of memory if backbone and image size are those of a published setting, and of time and parameters if
    the backbone is.

    Args:
        reserve_mib: what a GPU needs beside the tensors.
    """
    claims, saved = [], []
    for setting in SETTINGS:
        here = [r for r in runs if r.backbone == setting.backbone and r.image_size == setting.image_size]
        told = tell(here, lambda run: relative_saving(run.results, "e3va", "peak_mib"))[:1]
        saved.append(told)
        published = setting.saved_pct("e3va")
        assert published is not None
        title = f"memory saved, {setting.title}{instead(here, setting.head)} (%)"
        claims.append(claim(title, round(published, 1), told, at_least=True))
    both = [one for told in saved for one in told] if all(saved) else []
    claims.append(claim("memory saved, average of both settings (%)", MEMORY_SAVED_PCT, both, at_least=True))
    known = [run for run in runs if run.backbone in (COCO.backbone, VOC.backbone)]
    times = tell(known, lambda run: relative_saving(run.results, "e3va", "step_time_s"))
    claims.append(claim("training time saved (%)", TIME_SAVED_PCT, times, at_least=True))
    shares = sorted(tell(known, lambda run: run.of_ours("trainable_pct")))
    claims.append(claim("trainable backbone parameters (%)", TRAINABLE_PCT, shares[-1:], at_least=False))
    on_card = [
        r for r in runs if r.backbone == VOC.backbone and "mask_rcnn" in r.head and r.image_size == COCO.image_size
    ]
    needed = [(peak + reserve_mib, source) for peak, source in tell(on_card, lambda run: run.of_ours("peak_mib"))]
    title = f"Swin-L Cascade Mask R-CNN{instead(on_card, COCO.head)} on an 11 GB card (MiB)"
    claims.append(claim(title, float(CARD_MIB), needed[:1], at_least=False))
    return claims


def instead(runs: list[Run], head: str) -> str:
    """A word on the head that stands in for the paper's, if one does."""
    others = sorted({run.head for run in runs} - {head})
    return f" (here {', '.join(others)})" if others else ""
