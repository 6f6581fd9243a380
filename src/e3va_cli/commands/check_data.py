"""`e3va check-data`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection
from pathlib import Path

from rich.markup import escape

from e3va_cli.commands.console import console, print_table
from e3va_cli.commands.image_grids import draw_annotations
from e3va_cli.commands.run_summary import print_warnings
from e3va_cli.config.run_config import CheckDataConfig
from e3va_cli.data import SPLITS, DatasetFormat, DenseDataset, Split
from e3va_cli.data.dataset import check_same_classes
from e3va_cli.data.formats.base import check_class_count
from e3va_cli.data.validation.issues import Report
from e3va_cli.errors import UserError
from e3va_cli.evaluation.detection_limit import detection_limit_warning
from e3va_cli.models.heads import HEADS
from e3va_cli.utils.terminal import TerminalProgress
from e3va_cli.utils.text import pluralize


def run(config: CheckDataConfig, *, folder: Path) -> None:
    """Report all problems of both splits, draw samples, compare classes; exit code 1 if there are problems.

    Raises:
        UserError: a split is missing or unreadable, once the other is reported.
    """
    source = config.dataset
    targets = HEADS[config.head.name].target_types
    warnings.filterwarnings("ignore", module="PIL")  # the report has them
    sound, refusals, opened, left_out = True, [], [], 0
    for split in SPLITS:
        try:
            report = check_with_progress(source, split, targets)
        except UserError as error:
            refusals += error.messages
            continue
        print_report(report)
        sound = sound and report.ok
        try:
            dataset = source.open(split, None, targets=targets)
            check_class_count(source, dataset)
        except UserError as error:
            print_refusal(error)
            sound = False
            continue
        opened.append(dataset)
        left_out += print_left_out(dataset, split)
        print_warnings([detection_limit_warning(dataset, config.head)])
        picture = folder / f"{split}.png"
        if draw_annotations(dataset, config.num_visualizations, picture):
            console.print(f"Annotated samples: {escape(str(picture))}\n")
    if len(opened) == len(SPLITS):
        try:
            check_same_classes(*opened)
        except UserError as error:
            print_refusal(error)
            sound = False
    if refusals:
        raise UserError(*dict.fromkeys(refusals))
    if not sound:
        console.print(
            "[yellow]There are problems.[/] `e3va train` leaves unusable boxes out and stops at all else, such as a "
            "file that is broken."
        )
        sys.exit(1)
    but = f" Left out, as said above: {pluralize(left_out, 'annotation')}." if left_out else ""
    console.print(f"[green]No problems.[/]{but}")


def check_with_progress(source: DatasetFormat, split: Split, targets: Collection[str]) -> Report:
    """Check a split for a head that needs `targets`, with a progress bar, and return the report."""
    with TerminalProgress(console=console, transient=True) as bar:
        task = bar.add_task(f"Checking {split} images", total=None)
        return source.check(split, lambda done, total: bar.update(task, completed=done, total=total), targets=targets)


def print_left_out(dataset: DenseDataset, split: Split) -> int:
    """Print how many annotations a run skips, by reason, and return their number."""
    if not dataset.dropped:
        return 0
    total = sum(dataset.dropped.values())
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in dataset.dropped.items())
    what = "not trained on" if split == "train" else "ignored in evaluation"
    console.print(f"{pluralize(total, 'annotation')} of {split} {'is' if total == 1 else 'are'} {what}: {reasons}")
    return total


def print_refusal(error: UserError) -> None:
    """Print why `e3va train` would refuse the data."""
    console.print(f"[red]Cannot be used for training:[/] {escape(str(error))}\n")


def print_report(report: Report) -> None:
    """Print the issues and the number of objects of each class."""
    for line in report.lines():
        console.print(line, markup=False)
    ranked = sorted(report.per_class.items(), key=lambda item: -item[1])
    print_table(None, ["class", report.unit], [[escape(name), f"{count:,}"] for name, count in ranked])
