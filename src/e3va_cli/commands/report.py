"""What commands print: the start of a run, its results, and what to do next."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

from rich.table import Table

from e3va_cli.commands.console import console
from e3va_cli.run_folder import CHECKPOINTS, LAST, METRICS, METRICS_HISTORY, PICTURES, RESOURCES
from e3va_cli.training.resources import parameter_counts
from e3va_cli.training.run import Run

SHOWN = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR100")


def hide_lightning_hints() -> None:
    """Leave out Lightning's advice to programmers: nothing there for the user of a command."""
    logging.getLogger("lightning").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*number of training batches.*",
        ".*LeafSpec.*",
        ".*in eval mode at the start of training.*",  # the frozen backbone is meant to be
    ):
        warnings.filterwarnings("ignore", text)


def print_start(config: dict[str, Any], run: Run, folder: Path, checkpoint: Path | None) -> None:
    """What is about to be trained, on what, and where it will lie."""
    counts = parameter_counts(run.model.extractor, run.model.head)
    assert run.train is not None
    table = Table.grid(padding=(0, 2))
    table.add_row("Backbone", f"{config['backbone']['name']}, {counts['backbone_params']:,} parameters")
    table.add_row(
        "Method",
        f"{config['adapter']['name']}, {counts['trainable_backbone_params']:,} trainable "
        f"({counts['trainable_backbone_pct']:.2f} % of the backbone)",
    )
    table.add_row(
        "Head",
        f"{config['head']['name']}, {counts['trainable_params'] - counts['trainable_backbone_params']:,} trainable, "
        f"{len(run.val.classes)} classes",
    )
    table.add_row(
        "Data",
        f"{config['dataset']['name']}, {len(run.train):,} images to train on, {len(run.val):,} to evaluate",
    )
    table.add_row("Run folder", str(folder))
    if checkpoint is not None:
        table.add_row("Resumes", str(checkpoint))
    console.print(table)
    if run.model.identity.weights == "random":
        console.print(
            "[yellow]Warning: the backbone's weights are random.[/] Give backbone.pretrained=true or "
            "backbone.weights=FILE for real use; adapters trained here fit only this random backbone."
        )
    if run.train.dropped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in run.train.dropped.items())
        console.print(f"Annotations left out of training: {reasons}")


def print_results(results: dict[str, Any]) -> None:
    """A table of average precision, over all classes and for each."""
    table = Table(title="Evaluation, in percent")
    table.add_column("")
    for name in SHOWN:
        table.add_column(name, justify="right")
    for kind, values in results.items():
        table.add_row(kind, *(_percent(values[name]) for name in SHOWN))
    console.print(table)
    classes = Table(title="AP of each class, in percent")
    classes.add_column("class")
    for kind in results:
        classes.add_column(kind, justify="right")
    for name in next(iter(results.values()))["per_class"]:
        classes.add_row(name, *(_percent(values["per_class"][name]) for values in results.values()))
    console.print(classes)


def print_next(folder: Path) -> None:
    """Where everything lies, and the commands that use it."""
    console.print(f"\nRun folder: {folder}")
    for name, what in (
        (METRICS, "results of the last evaluation"),
        (METRICS_HISTORY, "history of losses and results"),
        (RESOURCES, "memory, step time, parameters"),
        (PICTURES, "validation images with what was found"),
        (f"{CHECKPOINTS}/{LAST}", "last state; best.ckpt is the best one"),
    ):
        if (folder / name).exists():
            console.print(f"  {name:<22} {what}")
    console.print("\nNext:")
    console.print(f"  e3va evaluate checkpoint={folder}")
    console.print(f"  e3va train resume={folder} trainer.max_epochs=N")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
