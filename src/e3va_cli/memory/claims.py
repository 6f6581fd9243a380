"""The paper's claims against what was found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from e3va_cli.memory.published import (
    CARD_MIB,
    COCO,
    MEMORY_SAVED_PCT,
    SETTINGS,
    TIME_SAVED_PCT,
    TRAINABLE_PCT,
    VOC,
)
from e3va_cli.memory.result import Result, against_full

Verdict = Literal["holds", "does not hold", "not measured"]


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        claim: in words, with its unit.
        published: the paper's number.
        found: ours, None if this run cannot tell.
        at_least: whether ours must be at least the paper's number, rather than at most.
    """

    claim: str
    published: float
    found: float | None
    at_least: bool

    @property
    def verdict(self) -> Verdict:
        """Whether it holds."""
        if self.found is None:
            return "not measured"
        holds = self.found >= self.published if self.at_least else self.found <= self.published
        return "holds" if holds else "does not hold"


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

    def peak_mib(self, method: str) -> float | None:
        """Of a method, if it is known."""
        return next((r.peak_mib for r in self.results if r.method == method), None)


def judge(runs: list[Run], *, reserve_mib: float) -> list[Claim]:
    """Each claim of the paper, from all runs that can tell.

    A run tells of memory if backbone and image size are those of a published setting, and of time and parameters if
    the backbone is.

    Args:
        reserve_mib: what a GPU needs beside the tensors.
    """
    claims, saved = [], []
    for setting in SETTINGS:
        here = [r for r in runs if r.backbone == setting.backbone and r.image_size == setting.image_size]
        found = first(against_full(run.results, "e3va", "peak_mib") for run in here)
        saved.append(found)
        published = setting.saved_pct("e3va")
        assert published is not None
        title = f"memory saved, {setting.title}{instead(here, setting.head)} (%)"
        claims.append(Claim(title, round(published, 1), found, at_least=True))
    average = None if None in saved else sum(s for s in saved if s is not None) / len(saved)
    claims.append(Claim("memory saved, average of both settings (%)", MEMORY_SAVED_PCT, average, at_least=True))
    known = [run for run in runs if run.backbone in (COCO.backbone, VOC.backbone)]
    times = [s for run in known if (s := against_full(run.results, "e3va", "step_time_s")) is not None]
    time = sum(times) / len(times) if times else None
    claims.append(Claim("training time saved (%)", TIME_SAVED_PCT, time, at_least=True))
    shares = [r.trainable_pct for run in known for r in run.results if r.method == "e3va"]
    share = max(shares, default=None)
    claims.append(Claim("trainable backbone parameters (%)", TRAINABLE_PCT, share, at_least=False))
    on_card = [
        r for r in runs if r.backbone == VOC.backbone and "mask_rcnn" in r.head and r.image_size == COCO.image_size
    ]
    needed = first(run.peak_mib("e3va") for run in on_card)
    card = None if needed is None else needed + reserve_mib
    title = f"Swin-L Cascade Mask R-CNN{instead(on_card, COCO.head)} on an 11 GB card (MiB)"
    claims.append(Claim(title, float(CARD_MIB), card, at_least=False))
    return claims


def instead(runs: list[Run], head: str) -> str:
    """A word on the head that stands in for the paper's, if one does."""
    others = sorted({run.head for run in runs} - {head})
    return f" (here {', '.join(others)})" if others else ""


def first(values: Iterable[float | None]) -> float | None:
    """The first value that is not None."""
    return next((v for v in values if v is not None), None)
