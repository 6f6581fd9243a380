"""What a check of a data set has found, in whichever format the data set is."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from e3va_cli.utils.text import escape_text, pluralize

PLACES_KEPT = 5
ADVICE = "run `e3va check-data` for all problems of the data set"


@dataclass(frozen=True)
class Place:
    """Where something was found; what is not known or does not apply is None."""

    file: str | None = None
    image_id: int | None = None
    annotation_id: int | None = None
    detail: str | None = None

    def __str__(self) -> str:
        parts = (
            self.file,
            None if self.image_id is None else f"image {self.image_id}",
            None if self.annotation_id is None else f"annotation {self.annotation_id}",
            self.detail,
        )
        return ", ".join(escape_text(part) for part in parts if part)


@dataclass
class Issue:
    """All finds of one kind: their number, and the first few places."""

    kind: str
    count: int = 0
    places: list[Place] = field(default_factory=list)


class IssueCollector:
    """Findings by kind, in the order in which the kinds first turned up."""

    def __init__(self) -> None:
        self._by_kind: dict[str, Issue] = {}

    def add(self, kind: str, place: Place) -> None:
        """Counts one more find of that kind."""
        finding = self._by_kind.setdefault(kind, Issue(kind))
        finding.count += 1
        if len(finding.places) < PLACES_KEPT:
            finding.places.append(place)

    def __iter__(self) -> Iterator[Issue]:
        return iter(self._by_kind.values())


def counted(count: int, several: str) -> str:
    """A number with its noun, of which the plural is given; `crowd` and the like have none."""
    one = several.removesuffix("es") if several.endswith("sses") else several.removesuffix("s")
    return pluralize(count, one, several)


@dataclass(frozen=True)
class Report:
    """The answer of `e3va check-data` for one split.

    problems    what has to be mended, or is left out of training
    notes       what is in order but good to know
    totals      how many images, annotations, ... there are
    per_class   how many `unit` each class has, in the order of the classes
    """

    source: str
    problems: list[Issue]
    notes: list[Issue]
    totals: dict[str, int]
    per_class: dict[str, int]
    unit: str = "objects"

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def lines(self) -> list[str]:
        """The report as text, without the counts of the classes."""
        lines = [f"{self.source}: " + ", ".join(counted(count, name) for name, count in self.totals.items())]
        for title, findings in (("problem", self.problems), ("note", self.notes)):
            for finding in findings:
                lines.append(f"  {title}: {finding.kind}: {finding.count:,}")
                lines += [f"      {place}" for place in finding.places]
                if finding.count > len(finding.places):
                    lines.append(f"      and {finding.count - len(finding.places):,} more")
        return lines if self.problems else [*lines, "  no problems"]
