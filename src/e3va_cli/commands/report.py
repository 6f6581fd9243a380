"""What commands print: the start of a run, its results, and what to do next."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from e3va_cli.adapters import METHODS, FrozenBackbone
from e3va_cli.command_line import command_line
from e3va_cli.commands.console import console
from e3va_cli.metrics.limits import limit_note
from e3va_cli.model import parameter_counts
from e3va_cli.run_folder import BAD_BATCHES, BEST, CHECKPOINTS, LAST, METRICS, METRICS_HISTORY, PICTURES, RESOURCES
from e3va_cli.text import count_of, first_few
from e3va_cli.training.course import Course, longer
from e3va_cli.training.run import Run

CLASSES_SHOWN = 20
NUMBER = len("50.0")
PLACEHOLDERS = "IMAGES stands for an image file or a folder of them, ADAPTER for a new folder"
TITLES = {"pixel_accuracy": "pixel accuracy", "mean_accuracy": "mean accuracy"}


def hide_lightning_hints() -> None:
    """Leave out Lightning's advice to programmers: nothing there for the user of a command."""
    logging.getLogger("lightning").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*number of training batches.*",
        ".*LeafSpec.*",
        ".*in eval mode at the start of training.*",  # the frozen backbone is meant to be
        ".*`training_step` returned `None`.*",  # the guard says why
        ".*when logging on epoch level in distributed setting.*",  # every process logs the results of all
    ):
        warnings.filterwarnings("ignore", text)


def print_start(config: dict[str, Any], run: Run, folder: Path, checkpoint: Path | None, step: int = 0) -> None:
    """What is about to be trained, on what, and where it will lie; a resumed run goes on after `step`."""
    counts = parameter_counts(run.model)
    assert run.train is not None
    table = Table.grid(padding=(0, 2))
    table.add_row(
        "Backbone", f"{config['backbone']['name']}, {counts['backbone_params']:,} parameters, {drop_path(config)}"
    )
    table.add_row(
        "Method",
        f"{config['adapter']['name']}, {counts['trainable_backbone_params']:,} trainable "
        f"({counts['trainable_backbone_pct']:.2f} % of the backbone)",
    )
    table.add_row(
        "Head",
        f"{config['head']['name']}, {counts['trainable_params'] - counts['trainable_backbone_params']:,} trainable",
    )
    empty = run.train.left_out_images
    left_out = f" ({empty:,} without objects are left out)" if empty else ""
    table.add_row(
        "Data",
        f"{config['dataset']['name']}, {len(run.train):,} images to train on{left_out}, {len(run.val):,} to evaluate",
    )
    table.add_row("Classes", escape(named(run.val.classes)))
    assert run.course is not None
    course, schedule = run.course, config["schedule"]
    table.add_row("Schedule", described(course, schedule["name"]))
    table.add_row("Run folder", escape(str(folder)))
    if checkpoint is not None:
        table.add_row("Resumes", escape(f"{checkpoint}, after step {step:,}"))
    console.print(table)
    print_warnings(warnings_of(course, schedule))
    if step >= course.total_steps:
        console.print(
            f"Training is complete after {count_of(course.total_steps, 'step')}; to train longer: "
            f"{command_line('train', {'resume': str(folder), **longer(config, course)})}",
            markup=False,
        )
    if run.model.identity.weights == "random":
        console.print(
            "[yellow]Warning: the backbone's weights are random.[/] Give backbone.pretrained=true or "
            "backbone.weights=FILE for real use; adapters trained here fit only this random backbone."
        )
    if run.train.dropped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in run.train.dropped.items())
        console.print(f"Annotations left out of training: {reasons}")
    print_warnings([*run.train.notes, *run.val.notes, limit_note(run.val, config["head"])])


def drop_path(config: dict[str, Any]) -> str:
    """What `backbone.drop_path_rate` comes to under the method."""
    if issubclass(METHODS[config["adapter"]["name"]], FrozenBackbone):
        return "frozen, so without drop path"
    backbone = config["backbone"]
    return f"drop path {backbone['model_args'].get('drop_path_rate', backbone['drop_path_rate']):g}"


def named(classes: list[str]) -> str:
    """Their number and names, as far as a few lines hold them."""
    return f"{len(classes)}: {first_few(classes, CLASSES_SHOWN)}"


def described(course: Course, schedule: str) -> str:
    """How long the run will be and how fast it will learn."""
    epochs = course.total_steps / course.steps_per_epoch
    adapted = f" (the recipe's is for a total batch of {course.recipe_batch})" if course.rescaled else ""
    return (
        f"{count_of(course.total_steps, 'step')} of {count_of(course.total_batch, 'image')}: "
        f"{count_of(epochs, 'epoch')} of {count_of(course.steps_per_epoch, 'step')}; {schedule} from "
        f"{course.lr:.3g}{adapted} after {count_of(course.warmup_steps, 'step')} of warm-up"
    )


def warnings_of(course: Course, schedule: dict[str, Any]) -> Iterator[str]:
    """What of a schedule does not fit a run of this length, a line each."""
    if course.warmup_steps < course.recipe_warmup:
        yield (
            f"the warm-up is shortened from {course.recipe_warmup:,} to {course.warmup_steps:,} of the run's "
            f"{count_of(course.total_steps, 'step')} (schedule.warmup_max_fraction={schedule['warmup_max_fraction']:g})"
        )
    late = [epoch for epoch in schedule.get("milestones", []) if round(epoch * course.stretch) >= course.epochs]
    if late:
        yield (
            f"the run ends after {count_of(course.epochs, 'epoch')}, before the learning rate falls at "
            f"{' and '.join(map(str, late))}; give schedule.milestones=[...] for its length"
        )


def print_results(results: dict[str, Any]) -> None:
    """A table of results over all classes, and one of each class."""
    kinds = results if "per_class" not in results else {"all pixels": results}
    names = [name for name in next(iter(kinds.values())) if name != "per_class"]
    table = Table(title="Evaluation, in percent")
    table.add_column("", overflow="fold")
    for name in names:
        table.add_column(TITLES.get(name, name), justify="right", overflow="fold")
    for kind, values in kinds.items():
        table.add_row(escape(kind), *(_percent(values[name]) for name in names))
    console.print(table)
    title = "IoU" if "mIoU" in names else names[0]
    classes = Table(title=f"{title} of each class, in percent")
    classes.add_column("class", overflow="fold")
    for kind in kinds:
        classes.add_column(escape(kind), justify="right", overflow="fold", min_width=NUMBER)
    for name in next(iter(kinds.values()))["per_class"]:
        classes.add_row(escape(name), *(_percent(values["per_class"][name]) for values in kinds.values()))
    console.print(classes)


def print_warnings(notes: Iterable[str | None]) -> None:
    """What is worth a warning, each once."""
    for note in dict.fromkeys(filter(None, notes)):
        console.print(f"[yellow]Warning:[/] {escape(note)}")


FILES = {
    METRICS: "results of the last evaluation",
    METRICS_HISTORY: "history of losses and results",
    RESOURCES: "memory, step time, parameters",
    PICTURES: "validation images with what was found",
    BAD_BATCHES: "batches that changed no weight: NaN or infinite losses, or memory that did not suffice",
    f"{CHECKPOINTS}/{LAST}": "the last state",
    f"{CHECKPOINTS}/{BEST}": "the state with the best evaluation",
}


def print_next(folder: Path, config: dict[str, Any], further: dict[str, Any]) -> None:
    """Where everything lies, and the commands that use it.

    Args:
        folder: of the run.
        config: its plain configuration.
        further: the options by which it goes on.
    """
    console.print(f"\nRun folder: {folder}", markup=False)
    for name, what in FILES.items():
        if (folder / name).exists():
            console.print(f"  {name:<22} {what}")
    checkpoint = {"checkpoint": str(folder)}
    unmeasured = config["trainer"]["limit_val_batches"] == 0
    console.print(f"\nNext ({PLACEHOLDERS}):")
    print_command("evaluate", {**checkpoint, **({"trainer.limit_val_batches": None} if unmeasured else {})})
    print_command("predict", {**checkpoint, "input": "IMAGES"})
    print_command("export-adapter", {**checkpoint, "output": "ADAPTER"})
    print_command("train", {"resume": str(folder), **further})


def print_command(command: str, options: dict[str, Any]) -> None:
    """One of the next commands."""
    console.print(f"  {command_line(command, options)}", markup=False)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
