"""Issues of a data set, and the report of `e3va check-data`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from e3va_cli.utils.text import escape_text, pluralize

Progress = Callable[[int, int], None]  # (done, total)

MAX_LOCATIONS = 5  # of each issue
ADVICE = "run `e3va check-data` for all problems of the data set"


@dataclass(frozen=True)
class Location:
    """Where an issue is; None where unknown or not applicable."""

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
    """All occurrences of one type of issue: their number, and the first few locations."""

    type: str
    count: int = 0
    locations: list[Location] = field(default_factory=list)


class IssueCollector:
    """Issues by type, in the order of first occurrence."""

    def __init__(self) -> None:
        self._by_type: dict[str, Issue] = {}

    def add(self, issue_type: str, location: Location) -> None:
        """Count one more occurrence."""
        issue = self._by_type.setdefault(issue_type, Issue(issue_type))
        issue.count += 1
        if len(issue.locations) < MAX_LOCATIONS:
            issue.locations.append(location)

    def __iter__(self) -> Iterator[Issue]:
        return iter(self._by_type.values())


def counted(count: int, several: str) -> str:
    """Return a number with its noun, given in the plural; `difficult` has none."""
    one = several.removesuffix("es") if several.endswith("sses") else several.removesuffix("s")
    return pluralize(count, one, several)


@dataclass(frozen=True)
class Report:
    """The issues and counts of one split.

    Attributes:
        source: name of the split.
        problems: issues that stop training, or drop annotations.
        notes: issues that do not.
        totals: numbers of images, annotations, ...
        per_class: number of `unit` of each class, in the order of the classes.
        unit: objects or pixels.
    """

    source: str
    problems: list[Issue]
    notes: list[Issue]
    totals: dict[str, int]
    per_class: dict[str, int]
    unit: str = "objects"

    @property
    def ok(self) -> bool:
        """Return whether there are no problems."""
        return not self.problems

    def lines(self) -> list[str]:
        """Return the report as text, without `per_class`."""
        lines = [f"{self.source}: " + ", ".join(counted(count, name) for name, count in self.totals.items())]
        for title, issues in (("problem", self.problems), ("note", self.notes)):
            for issue in issues:
                lines.append(f"  {title}: {issue.type}: {issue.count:,}")
                lines += [f"      {location}" for location in issue.locations]
                if issue.count > len(issue.locations):
                    lines.append(f"      and {issue.count - len(issue.locations):,} more")
        return lines if self.problems else [*lines, "  no problems"]
